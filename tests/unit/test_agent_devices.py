"""Plugged-in devices: which functions are ports, when the kernel scans, and what a template's VM does first."""

import time
from pathlib import Path

import pytest
from pymicro.agent import boot, devices, files
from pymicro.agent.devices import Ports

EXPRESS_AT = 0x54


def config(*, bridge: bool = True, slot: bool = True) -> bytes:
    """Return a configuration space: of a port, of a bridge without a slot, or of a device."""
    space = bytearray(256)
    space[0x0E] = 0x81 if bridge else 0x00  # of several functions
    space[0x34] = 0x40
    space[0x40], space[0x41] = 0x05, EXPRESS_AT  # MSI, then PCI Express
    space[EXPRESS_AT], space[EXPRESS_AT + 3] = 0x10, 0x01 if slot else 0x00
    return bytes(space)


class Host:
    """A kernel's view of its PCI devices, as files."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices = directory / "devices"
        self._rescan = directory / "rescan"
        self._rescan.touch()
        monkeypatch.setattr(devices, "PCI_DEVICES", str(self.devices))
        monkeypatch.setattr(devices, "PCI_RESCAN", str(self._rescan))
        monkeypatch.setattr(devices, "PAUSE", 0)
        for name, space in (
            ("0000:00:00.0", config(bridge=False)),
            ("0000:00:01.0", config()),
            ("0000:00:02.0", config()),
            ("0000:00:03.0", config(slot=False)),
        ):
            (self.devices / name).mkdir(parents=True)
            (self.devices / name / "config").write_bytes(space)
            (self.devices / name / "enable").write_text("0")

    def plug(self, name: str) -> None:
        """Have the port say that something is in its slot."""
        with (self.devices / name / "config").open("r+b") as file:
            file.seek(EXPRESS_AT + 0x1A)
            file.write(b"\x40")

    def scanned(self) -> bool:
        """Tell whether the kernel was had to scan since the last call."""
        asked = self._rescan.read_text() == "1"
        self._rescan.write_text("")
        return asked

    def enabled(self) -> list[str]:
        return sorted(file.parent.name for file in self.devices.glob("*/enable") if file.read_text() == "1")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_a_slot_is_found_in_a_port_alone() -> None:
    assert devices.slot_status(config()) == EXPRESS_AT + 0x1A
    assert devices.slot_status(config(slot=False)) == 0
    assert devices.slot_status(config(bridge=False)) == 0


def test_the_kernel_scans_when_a_port_has_been_taken_and_not_before(host: Host) -> None:
    ports = Ports()
    seen = []
    for plugged in (None, None, "0000:00:01.0", None, "0000:00:02.0", None):
        if plugged:
            host.plug(plugged)
        ports.look_again()
        seen.append(host.scanned())
    assert seen == [True, False, True, False, True, False]  # the first time nothing is known yet


def test_a_device_that_no_port_tells_of_is_found_in_the_end(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "BLIND", 3)
    ports = Ports()
    seen = []
    for _ in range(7):
        ports.look_again()
        seen.append(host.scanned())
    assert seen == [True, False, False, True, False, False, True]


def test_a_vm_that_is_to_be_saved_switches_its_ports_on_and_scans(host: Host) -> None:
    Ports().rehearse()
    assert host.enabled() == ["0000:00:01.0", "0000:00:02.0"]
    assert host.scanned()


@pytest.mark.parametrize(
    ("clocks", "waits"), [(["kvm-clock"], 0), (["tsc-early", "tsc-early", "tsc"], 2), (["refined-jiffies", "tsc"], 1)]
)
def test_a_vm_that_is_to_be_saved_waits_for_the_kernels_own_clock(
    host: Host, monkeypatch: pytest.MonkeyPatch, clocks: list[str], waits: int
) -> None:
    slept: list[float] = []
    names = iter(clocks)
    read = files.read_text
    monkeypatch.setattr(files, "read_text", lambda path: next(names) if path == boot.CLOCK_SOURCE else read(path))
    monkeypatch.setattr(time, "sleep", slept.append)
    boot.settle(Ports())
    assert slept.count(boot.SETTLE_POLL) == waits
    assert host.scanned()


def test_a_vm_that_never_finds_its_own_clock_is_saved_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "read_text", lambda _: "tsc-early")
    monkeypatch.setattr(boot, "SETTLE_LIMIT", 0.1)
    boot.settle(Ports())
    assert host.scanned()
