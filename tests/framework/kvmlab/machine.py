"""QEMU's command line for the lab's machine. Pure: paths and descriptors in, words out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What an emulated CPU is spared: mitigations, zeroing of memory, security modules, and a clock that is a device.
# One CPU boots alone: QEMU 10 may fail an assertion (iotlb_to_section) when one CPU reads a device's registers while
# another moves them. Then the others take over and the first one is left alone (second.sh). For whenever another CPU
# restores an FPU's state, the emulator clears a bit in the first one's flags, and not in one step (QEMU 7.2 to 10,
# cpu_clear_ignne): what that CPU changes itself at this moment is undone. It does so at each entry and exit of a VM
# ("interrupts are held off"), and the kernel would be dead in minutes.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet oops=panic panic=-1 maxcpus=1 "
    "mitigations=off init_on_alloc=0 audit=0 security=none nowatchdog tsc=reliable"
)
# SVM is AMD's virtualisation, the one that QEMU emulates. With la57 kernels walk five levels of page tables, not four.
CPU = "max,+svm,-la57"


@dataclass(frozen=True, slots=True)
class Share:
    """A directory of the host that the lab sees by the name `tag`."""

    tag: str
    directory: Path
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """A lab: `outputs` are sockets for what a command writes, by number of the port; without them it is a terminal."""

    qemu: Path
    kernel: Path
    initramfs: Path
    console: Path
    shares: tuple[Share, ...]
    cpus: int
    memory_mib: int
    outputs: Mapping[int, int]


def command_line(machine: Machine) -> list[str]:
    """Return the words that run the lab's machine until it switches itself off."""
    return [
        str(machine.qemu),
        *("-name", "pymicro-kvm-lab", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU),
        *("-smp", str(machine.cpus), "-m", f"{machine.memory_mib}M"),
        *("-kernel", str(machine.kernel), "-initrd", str(machine.initramfs), "-append", KERNEL_ARGUMENTS),
        *("-chardev", f"file,id=console,path={_value(machine.console)}", "-serial", "chardev:console"),
        *("-device", "virtio-serial-pci"),
        *(word for port, fd in machine.outputs.items() for word in _output(port, fd)),
        *(() if machine.outputs else _terminal()),
        *(word for share in machine.shares for word in _share(share)),
    ]


def _output(port: int, fd: int) -> tuple[str, ...]:
    return ("-chardev", f"socket,id=output{port},fd={fd}", "-device", f"virtserialport,chardev=output{port},nr={port}")


def _terminal() -> tuple[str, ...]:
    """The keys belong to the shell, Ctrl-C as well; Ctrl-A X ends the machine."""
    return ("-chardev", "stdio,id=terminal,mux=on,signal=off", "-device", "virtconsole,chardev=terminal,nr=0")


def _share(share: Share) -> tuple[str, ...]:
    """Other file systems below the directory are shown too, their inode numbers kept apart."""
    options = f"local,id={share.tag},path={_value(share.directory)},security_model=none,multidevs=remap"
    read_only = ",readonly=on" if share.read_only else ""
    return ("-fsdev", options + read_only, "-device", f"virtio-9p-pci,fsdev={share.tag},mount_tag={share.tag}")


def _value(path: Path) -> str:
    """Return a path as the value of an option: there a comma is written twice."""
    return str(path).replace(",", ",,")
