"""From the settings' `hypervisor` to a backend; each is imported only when it is chosen."""

from pymicro.shim.config import Settings
from pymicro.shim.errors import InvalidSettings
from pymicro.shim.host import find_vhost_vsock
from pymicro.shim.hypervisor.base import Hypervisor
from pymicro.shim.tsc import tsc_khz

NAMES = ("qemu",)


def hypervisor(settings: Settings) -> Hypervisor:
    """Return the backend that `vm.hypervisor` names. Raises InvalidSettings, HostMissing."""
    if settings.vm.hypervisor == "qemu":
        from pymicro.shim.hypervisor.qemu.backend import Qemu

        vsock = find_vhost_vsock(settings)
        return Qemu(vsock_program=vsock.program, tsc_khz=tsc_khz(), timeout=settings.timeouts.vmm)
    raise InvalidSettings(f"vm.hypervisor = {settings.vm.hypervisor!r} is unknown; known: {', '.join(NAMES)}")
