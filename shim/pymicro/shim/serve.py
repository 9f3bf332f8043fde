"""The daemon: one sandbox, served over ttrpc until containerd shuts it down."""

import asyncio
import os
import signal
import socket
import struct
from asyncio.trsock import TransportSocket
from contextlib import suppress
from dataclasses import dataclass

from pymicro.shim import guestspec, logs, rootfs
from pymicro.shim.bundle import Bundle
from pymicro.shim.config import Settings, load, with_annotations
from pymicro.shim.errors import ShimError, status_code
from pymicro.shim.events import Publisher
from pymicro.shim.sandbox import Identity, Sandbox
from pymicro.shim.timeline import Timeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.service import TaskService
    from pymicro.ttrpc import Server

EVENTS_LIMIT = 5.0
"""Seconds that the last events may take at the end; containerd may be gone for good."""


@dataclass(frozen=True, slots=True)
class Start:
    """What `start` hands to the daemon."""

    namespace: str
    sandbox_id: str
    containerd_address: str
    bundle: str
    directory: str
    socket_path: str
    options: bytes
    debug: bool
    begun_ns: int


def serve(start: Start, listener: socket.socket) -> None:
    """Serve until Shutdown, then leave nothing behind."""
    rootfs.private_namespace()
    os.chdir("/")  # the bundle vanishes before we do
    asyncio.run(_serve(start, listener))


async def _serve(start: Start, listener: socket.socket) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # containerd ends a shim by Shutdown or SIGKILL; a stray signal to its process group must not take pods down
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    timeline = Timeline(start.begun_ns)
    timeline.span("shim", start.begun_ns)
    events = Publisher(os.environ.get("TTRPC_ADDRESS") or f"{start.containerd_address}.ttrpc", start.namespace)
    sandbox = _sandbox(start, events, timeline)
    await asyncio.sleep(0)  # the VMM is started now; what follows is imported while it gets ready
    service, server = _task_service(sandbox)
    serving = asyncio.create_task(server.serve(listener), name="ttrpc")
    shutdown = asyncio.create_task(service.shutdown_requested.wait())
    await asyncio.wait((shutdown, serving), return_when=asyncio.FIRST_COMPLETED)
    shutdown.cancel()
    if isinstance(sandbox, Sandbox):
        await sandbox.stop()
    await events.flush(EVENTS_LIMIT)
    with suppress(FileNotFoundError):
        os.unlink(start.socket_path)
    rootfs.remove_tree(start.directory)
    service.cleaned_up.set()
    await server.close(grace=1)
    with suppress(asyncio.CancelledError):
        await serving


def _task_service(sandbox: Sandbox | ShimError) -> "tuple[TaskService, Server]":
    """Return the Task service over `sandbox`, and the server that offers it under both its names."""
    from pymicro.shim.service import SERVICES, TaskService
    from pymicro.ttrpc import Method, Server

    service = TaskService(sandbox)
    methods = {name: Method(handler, request) for name, (request, handler) in service.methods().items()}
    return service, Server(dict.fromkeys(SERVICES, methods), status_of=_status_of, authorize=_same_user)


def _config_path(options: bytes) -> str | None:
    if not options:
        return None
    from pymicro.shim.translate import config_path

    return config_path(options)


def _sandbox(start: Start, events: Publisher, timeline: Timeline) -> Sandbox | ShimError:
    """Return the sandbox, already booting, or why there is none: Create will say so."""
    try:
        settings = load(_config_path(start.options))
        _set_up_logs(start, settings)
        bundle = Bundle.load(start.bundle)
        settings = with_annotations(settings, bundle.annotations)
        guestspec.build(bundle.spec, start.sandbox_id)  # what no VM could run needs none to be refused
    except ShimError as error:
        _set_up_logs(start, Settings())
        return error
    identity = Identity(start.namespace, start.sandbox_id, start.bundle, start.directory, start.socket_path)
    return Sandbox(identity, bundle, settings, events, timeline)


def _set_up_logs(start: Start, settings: Settings) -> None:
    logs.set_up("debug" if start.debug else settings.log.level)


def _status_of(error: BaseException) -> tuple[int, str] | None:
    return (status_code(error), str(error)) if isinstance(error, ShimError) else None


def _same_user(client: TransportSocket) -> bool:
    """Only the user who runs this shim may command it: the socket's mode says so, and so do the peer's credentials."""
    size = struct.calcsize("3i")
    _pid, uid, _gid = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(uid == os.geteuid())
