"""QEMU's command line: the words that matter, and why; and how a template's RAM is copied."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from pymicro.shim.hypervisor.base import VmSpec
from pymicro.shim.hypervisor.qemu import cmdline
from pymicro.shim.hypervisor.qemu.memory import copy_populated

KVM = VmSpec("/usr/bin/qemu-system-x86_64", Path("/k/vmlinux"), Path("/i/image.erofs"), 2, 512, "kvm")
TCG = replace(KVM, accel="tcg", vcpus=1)
PAGE = 4096


def words(spec: VmSpec, *, memory: str | None = None, incoming: bool = False) -> list[str]:
    return cmdline.command(spec, monitor_fds=(7, 8), tsc_khz=2_600_000, memory=memory, incoming=incoming)


def value(command: list[str], option: str) -> str:
    """Return what follows `option`, which must be there once."""
    assert command.count(option) == 1, f"{option} in {command}"
    return command[command.index(option) + 1]


def devices(command: list[str]) -> list[str]:
    return [command[index + 1] for index, word in enumerate(command) if word == "-device"]


@pytest.mark.parametrize("spec", [KVM, TCG], ids=["kvm", "tcg"])
def test_size(spec: VmSpec) -> None:
    command = words(spec)
    assert command[0] == spec.binary
    assert value(command, "-smp") == str(spec.vcpus)
    assert value(command, "-m") == "512M"
    assert "size=512M" in value(command, "-object")


@pytest.mark.parametrize("memory", [None, "/proc/self/fd/9"])
def test_memory_is_shared_with_vhost_user_devices(memory: str | None) -> None:
    backend = value(words(KVM, memory=memory), "-object")
    assert "share=on" in backend
    assert "id=ram" in backend
    assert "memory-backend=ram" in value(words(KVM), "-machine")
    assert (f"mem-path={memory}" in backend) == (memory is not None)


def test_it_waits_for_its_devices() -> None:
    assert "-S" in words(KVM)
    assert "pcie=on" in value(words(KVM), "-machine"), "nothing can be plugged into a microvm without"
    ports = [device for device in devices(words(KVM)) if device.startswith("pcie-root-port")]
    assert len(ports) == cmdline.ROOT_PORTS
    for name in ("id", "chassis", "slot"):
        values = [dict(part.split("=") for part in port.split(",")[1:])[name] for port in ports]
        assert len(set(values)) == cmdline.ROOT_PORTS, f"two root ports with the same {name}"


@pytest.mark.parametrize("incoming", [True, False])
def test_saved_state_is_waited_for_only_when_there_is_one(*, incoming: bool) -> None:
    assert ("-incoming" in words(KVM, incoming=incoming)) == incoming


def test_death_of_the_guest_is_the_end_of_qemu() -> None:
    """A panic must reboot at once, and a reboot must end QEMU: otherwise a dead pod would look alive."""
    assert "-no-reboot" in words(KVM)
    kernel = value(words(KVM), "-append").split(" -- ")[0].split()
    assert "panic=-1" in kernel
    assert "reboot=t" in kernel


def test_nothing_that_was_not_asked_for() -> None:
    command = words(KVM)
    assert "-nodefaults" in command
    assert "-no-user-config" in command, "a file of the host's owner must not change the VM"
    assert value(command, "-display") == "none"


def test_qemu_is_confined() -> None:
    sandbox = value(words(KVM), "-sandbox").split(",")
    assert sandbox[0] == "on"
    assert {"elevateprivileges=deny", "spawn=deny", "resourcecontrol=deny", "obsolete=deny"} <= set(sandbox)


def test_root_image_cannot_be_written() -> None:
    block = value(words(KVM), "-blockdev").split(",")
    assert "filename=/i/image.erofs" in block
    assert "read-only=on" in block
    assert "auto-read-only=off" in block
    assert " ro " in value(words(KVM), "-append")


def test_monitor_and_console() -> None:
    command = words(KVM)
    assert {"socket,id=early,fd=7", "socket,id=late,fd=8"} <= set(command)
    assert [command[n + 1] for n, word in enumerate(command) if word == "-mon"] == [
        "chardev=early,mode=control",
        "chardev=late,mode=control",
    ]
    assert "stdio,id=console,signal=off" in command, "a ^C in the guest's output must not reach QEMU"
    assert value(command, "-serial") == "chardev:console"


def test_kernel_gets_its_init_and_python_little_to_read() -> None:
    kernel, _, init = value(words(KVM), "-append").partition(" -- ")
    assert "init=/usr/bin/python3" in kernel.split()
    assert init.split()[-1] == "/usr/lib/pymicro/init.pyc"
    assert {"-I", "-S"} <= set(init.split())


def test_clock_arguments_are_for_emulation_alone() -> None:
    """Under TCG there is nothing to calibrate against, under KVM the host tells."""
    emulated = value(words(TCG), "-append").split()
    assert "tsc_early_khz=2600000" in emulated
    assert "init_on_alloc=1" in emulated
    assert any(word.startswith("lpj=") for word in emulated)
    assert "no_timer_check" in emulated
    real = value(words(KVM), "-append")
    assert "tsc_early_khz" not in real
    assert "init_on_alloc" not in real
    assert "lpj=" not in real


def test_cpu_is_the_hosts_only_where_it_virtualises() -> None:
    assert value(words(KVM), "-cpu") == "host"
    assert value(words(TCG), "-cpu") == "max"
    assert value(words(KVM), "-accel") == "kvm"
    assert value(words(TCG), "-accel").split(",")[0] == "tcg"


def test_kernel_command_line_fits() -> None:
    assert len(value(words(replace(TCG, vcpus=64)), "-append")) < 2048, "COMMAND_LINE_SIZE on x86"


# --- a template's RAM


def sparse(path: Path, size: int, pieces: dict[int, bytes]) -> None:
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
        for offset, data in pieces.items():
            os.pwrite(file.fileno(), data, offset)


def copied(source: Path, target: Path) -> os.stat_result:
    with target.open("w+b") as file:
        os.truncate(file.fileno(), source.stat().st_size)
        copy_populated(source, file.fileno())
        return os.fstat(file.fileno())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 63)), st.integers(64, 70))
def test_every_page_that_was_touched_is_copied(tmp_path: Path, pages: set[int], size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    sparse(source, size * PAGE, {page * PAGE: bytes([page + 1]) * PAGE for page in pages})
    copied(source, target)
    assert target.read_bytes() == source.read_bytes()


def test_holes_stay_holes(tmp_path: Path) -> None:
    sparse(tmp_path / "source", 512 << 20, {0: b"x", 300 << 20: b"y" * PAGE})
    status = copied(tmp_path / "source", tmp_path / "target")
    assert status.st_size == 512 << 20
    assert status.st_blocks * 512 < 1 << 20


def test_source_that_is_gone(tmp_path: Path) -> None:
    with (tmp_path / "target").open("w+b") as file, pytest.raises(OSError, match="No such file") as caught:
        copy_populated(tmp_path / "missing", file.fileno())
    assert caught.value.errno == errno.ENOENT
