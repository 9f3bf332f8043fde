"""The QEMU backend: a `microvm` machine. This half starts the processes; `vm` drives them, once asyncio is there."""

import socket
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, closing

from msgspec import Struct
from pymicro.shim.hypervisor.base import Device, Origin, Template, Vm, VmSpec, Vsock
from pymicro.shim.hypervisor.qemu import cmdline
from pymicro.shim.hypervisor.qemu.memory import Filling, Ram
from pymicro.shim.hypervisor.qemu.vsock import VsockBackend, open_vsock
from pymicro.shim.spawn import Child, Place, spawn


class SpawnedQemu:
    """QEMU and the helper of its vsock, just started. `monitor` is our end of QEMU's monitor."""

    def __init__(
        self, child: Child, monitor: socket.socket, vsock: VsockBackend | None, filling: Filling, origin: Origin
    ) -> None:
        self.child = child
        self.monitor = monitor
        self.vsock = vsock
        self.filling = filling
        self.origin = origin

    def __repr__(self) -> str:
        return f"<SpawnedQemu {self.child!r}>"

    def end(self) -> None:
        """End what nobody has taken over and free the rest. Idempotent."""
        self.child.end()
        self.monitor.close()
        if self.vsock:
            self.vsock.close()


class Qemu(Struct, frozen=True):
    """Launches QEMU VMs. `vsock_program` is None where the kernel has vhost-vsock; `timeout` (seconds) bounds each
    step.
    """

    vsock_program: str | None
    tsc_khz: int
    timeout: float

    def identity(self, spec: VmSpec) -> str:
        """Return QEMU's command line, without what differs from start to start."""
        return "\0".join(cmdline.command(spec, monitor_fd=0, tsc_khz=0))

    def spawn(self, spec: VmSpec, origin: Origin, place: Place, devices: Sequence[type[Device]]) -> SpawnedQemu:
        """Start QEMU for `spec`, paused, and what serves its vsock if that is among `devices`. Raises HostMissing."""
        with ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            ram = undo.enter_context(closing(Ram(spec, origin)))
            with theirs:
                words = cmdline.command(
                    spec,
                    monitor_fd=theirs.fileno(),
                    tsc_khz=self.tsc_khz,
                    memory=ram.path,
                    incoming=isinstance(origin, Template),
                )
                # Debian's kernels make huge pages of any memory: 18 MB more for QEMU's own. The guest's is a file,
                # where they make none; an emulator's translated code gains by them.
                fds = [theirs.fileno(), *ram.fds]
                child = spawn("qemu", words, place, fds, huge_pages=spec.accel == "tcg")
            undo.callback(child.end)
            vsock = open_vsock(self.vsock_program, place) if Vsock in devices else None
            if vsock:
                undo.callback(vsock.close)
            spawned = SpawnedQemu(child, ours, vsock, ram.fill(), origin)
            undo.pop_all()
            return spawned

    def take_over(self, spawned: SpawnedQemu) -> AbstractAsyncContextManager[Vm]:
        """Yield the VM, paused. Raises SandboxDied, StepTimeout."""
        from pymicro.shim.hypervisor.qemu.vm import running

        return running(spawned, self.timeout)
