"""A QEMU VM's vsock device: the kernel's vhost-vsock where the host has it, else the program vhost-device-vsock."""

from pathlib import Path
from typing import Any

from msgspec import Struct
from pymicro.shim.channel.hybrid import GUEST_CID, HybridListener
from pymicro.shim.channel.vsock import VsockListener
from pymicro.shim.spawn import Child, Place, spawn


class VsockBackend(Struct, frozen=True):
    """Where the guest's connections arrive, what QEMU is told, and the program that QEMU connects to, if it takes one.

    `chardev_path` is the socket that `child` creates in its own time, `uds` what else it leaves.
    """

    listener: HybridListener | VsockListener
    properties: dict[str, Any]  # QMP device_add arguments: their values are JSON of any kind
    child: Child | None = None
    chardev_path: Path | None = None
    uds: Path | None = None

    def close(self) -> None:
        """End the program, unless somebody watches it, and free the rest. Idempotent."""
        if self.child:
            self.child.end()
        self.listener.close()
        for path in (self.chardev_path, self.uds):
            if path:
                path.unlink(missing_ok=True)


def open_vsock(program: str | None, place: Place) -> VsockBackend:
    """Open a VM's vsock; `program` is vhost-device-vsock, or None for the kernel's device. Raises HostMissing."""
    if program is None:
        kernel = VsockListener()
        return VsockBackend(kernel, {"driver": "vhost-vsock-pci", "guest-cid": kernel.cid})
    chardev, uds = place.directory / "vsock-dev", place.directory / "vsock"
    for leftover in (chardev, uds):
        leftover.unlink(missing_ok=True)
    hybrid = HybridListener(uds, GUEST_CID)
    try:
        argv = [program, "--vm", f"guest-cid={GUEST_CID},socket={chardev},uds-path={uds}"]
        child = spawn("vhost-device-vsock", argv, place)
    except BaseException:
        hybrid.close()
        raise
    return VsockBackend(hybrid, {"driver": "vhost-user-vsock-pci", "chardev": "vsock"}, child, chardev, uds)
