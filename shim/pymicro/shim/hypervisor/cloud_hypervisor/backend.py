"""The Cloud Hypervisor backend. This half starts the VMM and lets the guest run; `vm` drives it, once asyncio is there.

The first request, to create a VM or to restore one, lies in the socket before the VMM is there: it is at work as soon
as it can be.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, closing, suppress
from pathlib import Path

from msgspec import Struct
from pymicro.shim.channel.hybrid import GUEST_CID, HybridListener
from pymicro.shim.hypervisor.base import Origin, Template, Vm, VmSpec
from pymicro.shim.hypervisor.cloud_hypervisor import requests, snapshot
from pymicro.shim.hypervisor.cloud_hypervisor.api import Api
from pymicro.shim.hypervisor.cloud_hypervisor.wake import Waking
from pymicro.shim.spawn import Child, Place, spawn

NAME = "cloud-hypervisor"


class Vsock(Struct, frozen=True):
    """Where the guest's connections arrive, and the socket that the VMM binds for connections to the guest."""

    listener: HybridListener
    uds: Path

    def close(self) -> None:
        """Free both. Idempotent."""
        self.listener.close()
        self.uds.unlink(missing_ok=True)


class SpawnedCloudHypervisor:
    """Cloud Hypervisor, just started. `api` is our end of its API, `events` the pipe that it reports to.

    `memory` is where the RAM of a VM goes that is to be saved, `files` holds what one is restored from.
    """

    def __init__(
        self,
        child: Child,
        api: Api,
        events: int,
        vsock: Vsock | None,
        waking: Waking,
        files: Path,
        memory: Path | None,
    ) -> None:
        self.child = child
        self.api = api
        self.vsock = vsock
        self.memory = memory
        self._events = events
        self._waking = waking
        self._files = files

    def __repr__(self) -> str:
        return f"<SpawnedCloudHypervisor {self.child!r}>"

    def wake(self) -> None:
        """Let the guest run, with its vsock. Raises HostMissing, SandboxDied, StepTimeout."""
        self._waking.run(self.vsock.uds if self.vsock else None)
        snapshot.remove(self._files)

    def take_events(self) -> int:
        """Return the read end of the pipe, which is the caller's from now on."""
        taken, self._events = self._events, -1
        return taken

    def end(self) -> None:
        """End what nobody has taken over and free the rest. Idempotent."""
        self.child.end()
        self.api.close()
        if self.vsock:
            self.vsock.close()
        if (events := self.take_events()) >= 0:
            os.close(events)
        with suppress(OSError):  # it goes with the run directory
            snapshot.remove(self._files)


class CloudHypervisor(Struct, frozen=True):
    """Launches Cloud Hypervisor VMs. `landlock` tells whether the host's kernel has it; `timeout` (seconds) bounds each
    step.
    """

    landlock: bool
    timeout: float

    def identity(self, spec: VmSpec) -> str:
        """Return the VM's description, without what differs from start to start."""
        return repr(requests.create(spec, None))

    def spawn(self, spec: VmSpec, origin: Origin, place: Place, *, vsock: bool) -> SpawnedCloudHypervisor:
        """Start Cloud Hypervisor, and have it make the VM; nothing is waited for. Raises OSError, SandboxDied."""
        with ExitStack() as undo:
            sockets, files = place.directory / "vmm", place.directory / "restore"
            device = _open_vsock(sockets) if vsock else None
            if device:
                undo.callback(device.close)
            listener, connected = _connected(place.directory)
            api = undo.enter_context(closing(Api(connected, self.timeout)))
            events, events_end = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, events)
            with listener, open(events_end, "wb", buffering=0):
                first = self._first(spec, origin, sockets if vsock else None, files)
                api.send(first)
                words = requests.command(spec.binary, api_fd=listener.fileno(), events_fd=events_end)
                # Debian's kernels make huge pages of any memory
                child = spawn(NAME, words, place, (listener.fileno(), events_end), huge_pages=False)
            undo.callback(child.end)
            waking = Waking(child, api, spec.binary, first, self.timeout)
            saved = None if isinstance(origin, Template) else origin.memory
            spawned = SpawnedCloudHypervisor(child, api, events, device, waking, files, saved)
            undo.pop_all()
            return spawned

    def _first(self, spec: VmSpec, origin: Origin, sockets: Path | None, files: Path) -> requests.Request:
        """Return the first request. A VM that is restored finds what it needs for that in `files`."""
        writable: Sequence[Path] | None = None
        if isinstance(origin, Template):
            if self.landlock:
                writable = [sockets] if sockets else []
            snapshot.lay_out(origin, files, writable)
            return requests.restore(files)
        if self.landlock:
            saved = origin.memory.parent if origin.memory else None
            writable = [path for path in (sockets, saved) if path]
        return requests.create(spec, writable)

    def take_over(self, spawned: SpawnedCloudHypervisor) -> AbstractAsyncContextManager[Vm]:
        """Yield the VM, which has been woken. Raises SandboxDied, StepTimeout."""
        from pymicro.shim.hypervisor.cloud_hypervisor.vm import running

        return running(spawned, self.timeout)


def _open_vsock(directory: Path) -> Vsock:
    """Listen for the guest in a directory of its own: there, and nowhere else, may the VMM make files."""
    directory.mkdir(exist_ok=True)
    uds = directory / "vsock"
    uds.unlink(missing_ok=True)
    return Vsock(HybridListener(uds, GUEST_CID), uds)


def _connected(directory: Path) -> tuple[socket.socket, socket.socket]:
    """Return a listening socket, for the VMM, and our connection to it; nobody else can make one."""
    path = directory / f"api.{os.getpid()}"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen(1)
        connected.connect(str(path))
    except BaseException:
        listener.close()
        connected.close()
        raise
    finally:
        path.unlink(missing_ok=True)
    return listener, connected
