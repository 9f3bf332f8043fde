"""From the settings' `hypervisor` to a backend, its program and what accelerates it; each is imported only when it is
chosen.
"""

from pymicro.shim import host, syscalls
from pymicro.shim.config import Settings
from pymicro.shim.errors import HostMissing, InvalidSettings
from pymicro.shim.hypervisor.base import Accel, Hypervisor
from pymicro.shim.tsc import tsc_khz

NAMES = ("qemu", "cloud-hypervisor")
LANDLOCK_ABI = 3
"""The first with which files can be protected from being cut off; Cloud Hypervisor demands it. Linux 6.2."""


def hypervisor(settings: Settings) -> Hypervisor:
    """Return the backend that `vm.hypervisor` names. Raises InvalidSettings, HostMissing."""
    if settings.vm.hypervisor == "qemu":
        from pymicro.shim.hypervisor.qemu.backend import Qemu

        vsock = host.find_vhost_vsock(settings)
        return Qemu(vsock_program=vsock.program, tsc_khz=tsc_khz(), timeout=settings.timeouts.vmm)
    if settings.vm.hypervisor == "cloud-hypervisor":
        from pymicro.shim.hypervisor.cloud_hypervisor.backend import CloudHypervisor

        return CloudHypervisor(landlock=syscalls.landlock_abi() >= LANDLOCK_ABI, timeout=settings.timeouts.vmm)
    raise InvalidSettings(f"vm.hypervisor = {settings.vm.hypervisor!r} is unknown; known: {', '.join(NAMES)}")


def binary(settings: Settings) -> str:
    """Return the absolute path of the VMM's program. Raises HostMissing."""
    if settings.vm.hypervisor == "cloud-hypervisor":
        return host.find_cloud_hypervisor(settings)
    return host.find_qemu(settings)


def accel(settings: Settings) -> Accel:
    """Return what runs the VM's instructions. Raises HostMissing, InvalidSettings."""
    if settings.vm.hypervisor != "cloud-hypervisor":
        return host.choose_accel(settings.vm.accel)
    if settings.vm.accel == "tcg":
        raise InvalidSettings('vm.hypervisor = "cloud-hypervisor" emulates no CPU: vm.accel = "tcg" needs "qemu"')
    if why := host.why_not_kvm():
        raise HostMissing(f'vm.hypervisor = "cloud-hypervisor" needs KVM: {why}; or set vm.hypervisor = "qemu"')
    return "kvm"
