"""Serving one sandbox, over ttrpc or gRPC, until containerd shuts it down."""

import asyncio
import logging
import os
import signal
import socket
from contextlib import suppress

from pymicro.shim import answer, freeing, rootfs
from pymicro.shim.config import Timeouts
from pymicro.shim.daemon import Start
from pymicro.shim.errors import ShimError, status_code
from pymicro.shim.events import Publisher
from pymicro.shim.ignition import Ignition
from pymicro.shim.protocol import GRPC
from pymicro.shim.sandbox import Sandbox
from pymicro.shim.sockets import same_user
from pymicro.shim.state import Record
from pymicro.shim.timeline import Timeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.grpc_server import GrpcServer
    from pymicro.shim.service import TaskService
    from pymicro.ttrpc import Server

logger = logging.getLogger(__name__)

EVENTS_LIMIT = 5.0
"""Seconds that the last events may take at the end; containerd may be gone for good."""
_PATIENCE = 0.3
"""Seconds that containerd's first request waits at most for the VM to be on its way: a template may have to be made."""


async def serve(
    start: Start, pod: Ignition | ShimError, record: Record, timeline: Timeline, listener: socket.socket
) -> bool:
    """Serve the pod, or the reason why there is none, until Shutdown or nobody needs it; then leave nothing behind.

    Return whether that is so: what processes that not even SIGKILL ends leave, others are to free.
    """
    if "SCHED_CORE" in os.environ:
        logger.debug("containerd asks for core scheduling (SCHED_CORE); pymicro leaves that out")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # containerd ends a shim by Shutdown or SIGKILL; a stray signal to its process group must not take pods down
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    events = Publisher(start.ttrpc_address, start.namespace)
    sandbox = pod if isinstance(pod, ShimError) else Sandbox(start.sandbox_id, pod, record, events, timeline)
    if isinstance(sandbox, Sandbox):
        await sandbox.guest.runs(_PATIENCE)  # what follows is imported while the guest finds its devices
    service, server = _task_service(sandbox, start)
    serving = asyncio.create_task(server.serve(listener), name="server")
    shutdown = asyncio.create_task(service.shutdown_requested.wait())
    limit = (Timeouts() if isinstance(sandbox, ShimError) else sandbox.settings.timeouts).unused
    unused = asyncio.create_task(service.unused(limit))
    await asyncio.wait((shutdown, serving, unused), return_when=asyncio.FIRST_COMPLETED)
    if unused.done():
        logger.warning("sandbox %s ends: it has had no container for %g s", start.sandbox_id, limit)
    shutdown.cancel()
    unused.cancel()
    if isinstance(sandbox, Sandbox):
        await asyncio.gather(sandbox.stop(), events.taken(EVENTS_LIMIT))  # which is not to wait for a large VM's end
    await events.flush(EVENTS_LIMIT)
    with suppress(FileNotFoundError):
        os.unlink(start.socket_path)
    nothing_left = not freeing.lives_on(record.facts)
    if nothing_left:
        rootfs.remove_tree(start.directory)
        answer.leave_freed(start.bundle)
    service.cleaned_up.set()
    await server.close(grace=1)
    with suppress(asyncio.CancelledError):
        await serving
    return nothing_left


def _task_service(sandbox: Sandbox | ShimError, start: Start) -> "tuple[TaskService, Server | GrpcServer]":
    """Return the Task service over `sandbox`, and the server that offers it under both its names."""
    from pymicro.shim.service import SERVICES, TaskService
    from pymicro.ttrpc import Method, Server

    service = TaskService(sandbox)
    methods = {name: Method(handler, request) for name, (request, handler) in service.methods().items()}
    services = dict.fromkeys(SERVICES, methods)
    if start.protocol == GRPC:
        from pymicro.shim.grpc_server import GrpcServer

        return service, GrpcServer(services, start.directory, status_of=_status_of, authorize=same_user)
    return service, Server(services, status_of=_status_of, authorize=same_user)


def _status_of(error: BaseException) -> tuple[int, str] | None:
    return (status_code(error), str(error)) if isinstance(error, ShimError) else None
