"""The QEMU backend: a `microvm` machine. `wake` brings it up in plain code, `vm` drives it once asyncio is there."""

import socket
from contextlib import AbstractAsyncContextManager, ExitStack, closing

from msgspec import Struct
from pymicro.shim.hypervisor.base import Origin, Template, Vm, VmSpec
from pymicro.shim.hypervisor.qemu import cmdline
from pymicro.shim.hypervisor.qemu.memory import Filling, Ram
from pymicro.shim.hypervisor.qemu.monitor import Monitor
from pymicro.shim.hypervisor.qemu.vsock import VsockBackend, open_vsock
from pymicro.shim.hypervisor.qemu.wake import Waking
from pymicro.shim.spawn import Child, Place, spawn


class SpawnedQemu:
    """QEMU and the helper of its vsock, just started. `early` and `monitor` are our ends of its two monitors."""

    def __init__(
        self,
        child: Child,
        early: Monitor,
        monitor: socket.socket,
        vsock: VsockBackend | None,
        filling: Filling,
        origin: Origin,
        timeout: float,
    ) -> None:
        self.child = child
        self.monitor = monitor
        self.vsock = vsock
        self._early = early
        self._filling = filling
        self._origin = origin
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<SpawnedQemu {self.child!r}>"

    def wake(self) -> None:
        """Let the guest run, with its vsock. Raises HostMissing, SandboxDied, StepTimeout, OSError."""
        with closing(self._early) as monitor:
            Waking(self.child, monitor, self.vsock, self._timeout).run(self._origin, self._filling)

    def end(self) -> None:
        """End what nobody has taken over and free the rest. Idempotent."""
        self.child.end()
        self._early.close()
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
        return "\0".join(cmdline.command(spec, monitor_fds=(0, 0), tsc_khz=0))

    def spawn(self, spec: VmSpec, origin: Origin, place: Place, *, vsock: bool) -> SpawnedQemu:
        """Start QEMU for `spec`, paused, and what serves its vsock if it gets one. Raises HostMissing, OSError."""
        with ExitStack() as undo:
            early, early_end = socket.socketpair()
            late, late_end = socket.socketpair()
            undo.callback(early.close)
            undo.callback(late.close)
            ram = undo.enter_context(closing(Ram(spec, origin)))
            with early_end, late_end:
                monitor_fds = (early_end.fileno(), late_end.fileno())
                words = cmdline.command(
                    spec,
                    monitor_fds=monitor_fds,
                    tsc_khz=self.tsc_khz,
                    memory=ram.path,
                    incoming=isinstance(origin, Template),
                )
                # Debian's kernels make huge pages of any memory: 18 MB more for QEMU's own. The guest's is a file,
                # where they make none; an emulator's translated code gains by them.
                child = spawn("qemu", words, place, (*monitor_fds, *ram.fds), huge_pages=spec.accel == "tcg")
            undo.callback(child.end)
            backend = open_vsock(self.vsock_program, place) if vsock else None
            if backend:
                undo.callback(backend.close)
            monitor = Monitor(early, self.timeout)
            spawned = SpawnedQemu(child, monitor, late, backend, ram.fill(), origin, self.timeout)
            undo.pop_all()
            return spawned

    def take_over(self, spawned: SpawnedQemu) -> AbstractAsyncContextManager[Vm]:
        """Yield the VM, which has been woken. Raises SandboxDied, StepTimeout."""
        from pymicro.shim.hypervisor.qemu.vm import running

        return running(spawned, self.timeout)
