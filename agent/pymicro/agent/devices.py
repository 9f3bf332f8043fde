"""Finding devices that the host has plugged in, by having the kernel scan its PCI ports again.

The guest's kernel has no driver for PCIe hot plug: it would sleep for a tenth of a second for every device. Where there
are no such ports (Cloud Hypervisor) the kernel is told by ACPI.
"""

import posix
import time

from pymicro.agent import files

PAUSE = 0.002
"""Seconds before a look. Only a VM that is about to be saved, or has just gone on, is without its devices for long."""
BLIND = 500
"""So many looks after the last scan there is one for which no port has given reason."""

PCI_DEVICES = "/sys/bus/pci/devices"
PCI_RESCAN = "/sys/bus/pci/rescan"

# A function's configuration space: linux/pci_regs.h
_HEADER_TYPE, _BRIDGE = 0x0E, 0x01
_CAPABILITIES, _PCI_EXPRESS = 0x34, 0x10
_SLOT_IMPLEMENTED = 0x01  # in the upper byte of the capability's flags
_SLOT_STATUS, _PRESENCE = 0x1A, 0x40

TYPE_CHECKING = False
if TYPE_CHECKING:
    Slot = tuple[int, int, str]
    """A port's configuration space, opened, where its slot's status is in there, and the port's directory."""


class Ports:
    """The PCIe ports that devices are plugged into. A port says at once that it is taken, which costs little to ask;
    a VM that waits to be saved is thus asleep, not in the middle of a scan.
    """

    def __init__(self) -> None:
        self._slots: list[Slot] | None = None
        self._rescan = -1
        self._known = b""
        self._looks = 0

    def look_again(self) -> None:
        """Pause, then scan if a port has been taken. What is found is bound to its driver when this returns. Raises
        OSError.
        """
        time.sleep(PAUSE)
        taken = self._taken()
        self._looks += 1
        if taken != self._known or self._looks >= BLIND:
            self._known = taken
            self.scan()

    def scan(self) -> None:
        """Have the kernel scan everything. Raises OSError."""
        self._looks = 0
        if self._rescan < 0:
            self._rescan = posix.open(PCI_RESCAN, posix.O_WRONLY | posix.O_CLOEXEC)
        posix.pwrite(self._rescan, b"1", 0)

    def rehearse(self) -> None:
        """Have the kernel do once for all that it does for the first device in each port, and scan. Raises OSError.

        To switch a port on it interprets ACPI's tables for the port's interrupt, which its device's is as well.
        """
        for _, _, path in self._all():
            files.write_text(f"{path}/enable", "1")
        self.scan()

    def _taken(self) -> bytes:
        """Return a byte for each port: whether there is something in it."""
        return bytes([posix.pread(fd, 1, offset)[0] & _PRESENCE for fd, offset, _ in self._all()])

    def _all(self) -> "list[Slot]":
        if self._slots is None:
            self._slots = _slots()
        return self._slots


def _slots() -> "list[Slot]":
    found = []
    for name in sorted(posix.listdir(PCI_DEVICES)):
        path = f"{PCI_DEVICES}/{name}"
        fd = posix.open(f"{path}/config", posix.O_RDONLY | posix.O_CLOEXEC)
        if offset := slot_status(posix.pread(fd, 256, 0)):
            found.append((fd, offset, path))
        else:
            posix.close(fd)
    return found


def slot_status(config: bytes) -> int:
    """Return where the slot status is in a function's configuration space, 0 if it is no port with a slot."""
    if config[_HEADER_TYPE] & 0x7F != _BRIDGE:
        return 0
    position = config[_CAPABILITIES]
    while position:
        if config[position] == _PCI_EXPRESS and config[position + 3] & _SLOT_IMPLEMENTED:
            return position + _SLOT_STATUS
        position = config[position + 1]
    return 0
