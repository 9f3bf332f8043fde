"""The Task service: each method translates, calls the sandbox, translates back.

The same object serves containerd.task.v2 and v3, over ttrpc and over gRPC: it knows neither transport.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from pymicro.protos import task_pb2
from pymicro.shim import metrics, translate
from pymicro.shim.errors import InvalidRequest, NotFound, ShimError, Unsupported
from pymicro.shim.sandbox import Sandbox
from pymicro.shim.unbroken import unbroken

logger = logging.getLogger(__name__)

SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")

SHUTDOWN_LIMIT = 2.0
"""Seconds in which Shutdown answers."""

Handler = Callable[[Any], Coroutine[Any, Any, Message]]  # takes the message type beside it in TaskService.methods()


def _finished(handler: Handler) -> Handler:
    """Return `handler` so that it runs to its end even if the client that called it goes away half way."""

    async def run(request: Any) -> Message:  # as Handler
        return await unbroken(handler(request))

    return run


class TaskService:
    """containerd's Task over one sandbox. A sandbox that cannot exist is given as the error that Create answers."""

    def __init__(self, sandbox: Sandbox | ShimError) -> None:
        self._sandbox_or_error = sandbox
        self.shutdown_requested = asyncio.Event()
        self.cleaned_up = asyncio.Event()
        """Set by the daemon when nothing of the sandbox is left; Shutdown answers then."""
        self._creates = 0

    def methods(self) -> dict[str, tuple[type[Message], Handler]]:
        """Return the request type and handler of each RPC, by its name."""
        changing: dict[str, tuple[type[Message], Handler]] = {
            "Create": (task_pb2.CreateTaskRequest, self.create),
            "Start": (task_pb2.StartRequest, self.start),
            "Delete": (task_pb2.DeleteRequest, self.delete),
            "Exec": (task_pb2.ExecProcessRequest, self.exec),
            "Kill": (task_pb2.KillRequest, self.kill),
            "CloseIO": (task_pb2.CloseIORequest, self.close_io),
            "ResizePty": (task_pb2.ResizePtyRequest, self.resize_pty),
        }
        return {
            **{name: (request, _finished(handler)) for name, (request, handler) in changing.items()},
            "Pause": (task_pb2.PauseRequest, self.pause),  # these three wait for their turn, and are finished then
            "Resume": (task_pb2.ResumeRequest, self.resume),
            "Update": (task_pb2.UpdateTaskRequest, self.update),
            "State": (task_pb2.StateRequest, self.state),
            "Pids": (task_pb2.PidsRequest, self.pids),
            "Wait": (task_pb2.WaitRequest, self.wait),
            "Stats": (task_pb2.StatsRequest, self.stats),
            "Connect": (task_pb2.ConnectRequest, self.connect),
            "Checkpoint": (task_pb2.CheckpointTaskRequest, self.checkpoint),
            "Shutdown": (task_pb2.ShutdownRequest, self.shutdown),
        }

    @property
    def _sandbox(self) -> Sandbox:
        if isinstance(self._sandbox_or_error, ShimError):
            raise NotFound(f"no container: {self._sandbox_or_error}")
        return self._sandbox_or_error

    @property
    def _idle(self) -> bool:
        return isinstance(self._sandbox_or_error, ShimError) or self._sandbox_or_error.idle

    async def unused(self, limit: float) -> None:
        """Return when there has been no container, nor a wish for one, for `limit` seconds, or half as long again.

        containerd has died before Create or before Shutdown then. One older than 1.7 connects to such a shim when it is
        back, and leaves it alone for ever.
        """
        quiet, creates = 0, self._creates
        while quiet < 3:
            await asyncio.sleep(limit / 2)
            quiet = quiet + 1 if self._idle and self._creates == creates else 0
            creates = self._creates

    async def create(self, request: task_pb2.CreateTaskRequest) -> task_pb2.CreateTaskResponse:
        self._creates += 1
        try:
            if isinstance(self._sandbox_or_error, ShimError):
                raise self._sandbox_or_error
            container = await self._sandbox.create_container(translate.create_request(request))
        except ShimError as error:
            logger.error("cannot create %s: %s", request.id, error)  # noqa: TRY400  # it says all, to a client as well
            if isinstance(error, Unsupported):  # containerd 2.x takes that for an older API, and asks once more
                raise InvalidRequest(str(error)) from error
            raise
        return task_pb2.CreateTaskResponse(pid=container.anchor.pid)

    async def start(self, request: task_pb2.StartRequest) -> task_pb2.StartResponse:
        try:
            return task_pb2.StartResponse(pid=await self._sandbox.start(request.id, request.exec_id))
        except ShimError as error:
            logger.error("cannot start %s %s: %s", request.id, request.exec_id, error)  # noqa: TRY400  # as above
            raise

    async def state(self, request: task_pb2.StateRequest) -> task_pb2.StateResponse:
        container = self._sandbox.container(request.id)
        return translate.state_response(container, container.process(request.exec_id))

    async def wait(self, request: task_pb2.WaitRequest) -> task_pb2.WaitResponse:
        process = self._sandbox.container(request.id).process(request.exec_id)
        return translate.wait_response(await process.wait())

    async def delete(self, request: task_pb2.DeleteRequest) -> task_pb2.DeleteResponse:
        if request.exec_id:
            deleted = await self._sandbox.container(request.id).delete_exec(request.exec_id)
        else:
            deleted = await self._sandbox.delete_container(request.id)
        return translate.delete_response(deleted)

    async def exec(self, request: task_pb2.ExecProcessRequest) -> Empty:
        self._sandbox.container(request.id).add_exec(translate.exec_request(request))
        return Empty()

    async def kill(self, request: task_pb2.KillRequest) -> Empty:
        await self._sandbox.container(request.id).kill(request.exec_id, request.signal, everything=request.all)
        return Empty()

    async def pids(self, request: task_pb2.PidsRequest) -> task_pb2.PidsResponse:
        return translate.pids_response(await self._sandbox.container(request.id).pids())

    async def pause(self, request: task_pb2.PauseRequest) -> Empty:
        await self._sandbox.container(request.id).pause()
        return Empty()

    async def resume(self, request: task_pb2.ResumeRequest) -> Empty:
        await self._sandbox.container(request.id).resume()
        return Empty()

    async def resize_pty(self, request: task_pb2.ResizePtyRequest) -> Empty:
        await self._sandbox.container(request.id).resize(request.exec_id, request.width, request.height)
        return Empty()

    async def close_io(self, request: task_pb2.CloseIORequest) -> Empty:
        if request.stdin:
            self._sandbox.container(request.id).process(request.exec_id).close_stdin_writer()
        return Empty()

    async def update(self, request: task_pb2.UpdateTaskRequest) -> Empty:
        await self._sandbox.container(request.id).update(translate.json_value(request.resources, "the resources"))
        return Empty()

    async def stats(self, request: task_pb2.StatsRequest) -> task_pb2.StatsResponse:
        files = await self._sandbox.container(request.id).stats()
        return task_pb2.StatsResponse(stats=translate.pack(metrics.for_this_host(files, self._sandbox.vm.vcpus)))

    async def checkpoint(self, request: task_pb2.CheckpointTaskRequest) -> Empty:
        raise Unsupported(f"checkpoint of {request.id!r}: a microVM's container cannot be checkpointed")

    async def connect(self, request: task_pb2.ConnectRequest) -> task_pb2.ConnectResponse:
        response = task_pb2.ConnectResponse(shim_pid=os.getpid())
        with suppress(NotFound):  # Connect never fails: containerd asks it of a shim that has no task yet
            response.task_pid = self._sandbox.container(request.id).anchor.pid
        return response

    async def shutdown(self, _request: task_pb2.ShutdownRequest) -> Empty:
        """End the shim, unless containers remain: containerd asks for each container of a pod.

        The answer comes when everything is freed: containerd runs `delete` next, which must not find us half way. What
        takes longer than containerd waits (three seconds; core/runtime/v2/shim.go) is left to that `delete`.
        """
        if self._idle:
            self.shutdown_requested.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(SHUTDOWN_LIMIT):
                    await self.cleaned_up.wait()
        return Empty()
