"""QEMU's command line for a VmSpec. Pure: a spec in, words out; everything of one pod is attached later.

The machine is `microvm` with PCIe, because hot plug needs it; it boots as fast as without. The root image sits on
virtio-mmio, the pod's devices on PCIe root ports, one each.
"""

from pymicro.shim.hypervisor import kernel
from pymicro.shim.hypervisor.base import VmSpec

ROOT_PORTS = 6
"""Hot-plug slots: vsock, share, and four for NICs and disks."""

# 1. tsc_early_khz and lpj: under TCG the machine has no timer to calibrate against; without them the kernel hangs.
# 2. no_timer_check: there is no i8254 to check.
# 3. init_on_alloc: virtiofsd writes into the guest's memory behind QEMU's back. Code that was translated from a page
#    which is free by now would be run instead of the program that virtiofsd then reads into it, since QEMU 8 at any
#    address; the guest's own zeroing of the page lets QEMU know.
TCG_ARGUMENTS = "tsc_early_khz={tsc_khz} lpj=5000000 no_timer_check init_on_alloc=1"
# Rewriting the kernel's lock prefixes for a single CPU takes 0.14 s under TCG and gains nothing there.
TCG_UNIPROCESSOR = "noreplace-smp"

# No port has room for I/O addresses, and each scan would say so, until the kernel's log is full of it.
_PORTS = "pci=hpiosize=0"


def kernel_arguments(spec: VmSpec, tsc_khz: int) -> str:
    """Return the kernel command line; `tsc_khz` is the rate of the host's time-stamp counter, used under TCG only."""
    words = [_PORTS]
    if spec.accel == "tcg":
        words.append(TCG_ARGUMENTS.format(tsc_khz=tsc_khz))
        if spec.vcpus == 1:
            words.append(TCG_UNIPROCESSOR)
    return kernel.arguments(*words)


def _value(text: str) -> str:
    """Return `text` as the value of an option: there a comma is written twice."""
    return text.replace(",", ",,")


def _monitor(name: str, fd: int) -> tuple[str, ...]:
    return "-chardev", f"socket,id={name},fd={fd}", "-mon", f"chardev={name},mode=control"


def command(
    spec: VmSpec,
    *,
    monitor_fds: tuple[int, int],
    tsc_khz: int,
    memory: str | None = None,
    incoming: bool = False,
) -> list[str]:
    """Return the words that start QEMU for `spec`, paused, its two monitors on connected sockets.

    RAM lies in the file `memory`, or in memory of QEMU's own. With `incoming` the VM waits for a saved one's state.
    The guest's console is QEMU's stdout.
    """
    # kvm-clock tells the time under KVM; without it a kernel that finds no clock chip waits a second for one
    rtc = "off" if spec.accel == "kvm" else "on"
    machine = f"microvm,x-option-roms=off,pit=off,pic=off,rtc={rtc},isa-serial=on,pcie=on,acpi=on,memory-backend=ram"
    backend = f"memory-backend-file,mem-path={_value(memory)}" if memory else "memory-backend-memfd"
    # no power controller: the guest has no driver that would switch a port on, it scans them again
    ports = [
        f"pcie-root-port,id=port{n},chassis={n + 1},slot={n + 1},bus=pcie.0,power_controller_present=off"
        for n in range(ROOT_PORTS)
    ]
    return [
        spec.binary,
        *("-name", "pymicro,debug-threads=on"),
        *("-machine", machine),
        # an emulator may keep as much translated code as the VM has memory; QEMU's own default is a gigabyte. The start
        # of a container takes 40 MiB: with room for 32 QEMU begins anew half way, and needs 1.2 times as long
        *("-accel", "kvm" if spec.accel == "kvm" else f"tcg,tb-size={spec.memory_mib}"),
        *("-cpu", "host" if spec.accel == "kvm" else "max"),
        *("-smp", str(spec.vcpus)),
        *("-m", f"{spec.memory_mib}M"),
        # vhost-user devices read the guest's memory themselves, so it must be shared
        *("-object", f"{backend},id=ram,size={spec.memory_mib}M,share=on"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-global", "virtio-mmio.force-legacy=false"),
        *(word for name, fd in zip(("early", "late"), monitor_fds, strict=True) for word in _monitor(name, fd)),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *(
            "-blockdev",
            f"driver=file,node-name=image,filename={_value(str(spec.image))},read-only=on,auto-read-only=off",
        ),
        *("-device", "virtio-blk-device,drive=image"),
        *(word for port in ports for word in ("-device", port)),
        # with ACPI the machine's own default is bios-microvm.bin, which Debian 13 makes SeaBIOS: it finds no kernel
        # here
        *("-bios", "qboot.rom"),
        # a saved VM has its kernel in its memory
        *(
            ("-incoming", "defer")
            if incoming
            else ("-kernel", str(spec.kernel), "-append", kernel_arguments(spec, tsc_khz))
        ),
        "-S",
    ]
