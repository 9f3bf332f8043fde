"""Publishing task events to containerd: one queue, in order, nothing skipped while containerd restarts."""

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from pymicro.protos import events_pb2, forward_pb2, types_pb2
from pymicro.shim.requests import CreateContainer, Exit
from pymicro.ttrpc import Client, Code, Error, StatusError

logger = logging.getLogger(__name__)

SERVICE = "containerd.services.events.ttrpc.v1.Events"
TOPICS: dict[type[Message], str] = {
    events_pb2.TaskCreate: "/tasks/create",
    events_pb2.TaskStart: "/tasks/start",
    events_pb2.TaskExit: "/tasks/exit",
    events_pb2.TaskDelete: "/tasks/delete",
    events_pb2.TaskOOM: "/tasks/oom",
    events_pb2.TaskExecAdded: "/tasks/exec-added",
    events_pb2.TaskExecStarted: "/tasks/exec-started",
    events_pb2.TaskPaused: "/tasks/paused",
    events_pb2.TaskResumed: "/tasks/resumed",
}
REFUSED = frozenset({Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED})
_FORWARD_TIMEOUT = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


def timestamp(moment: datetime) -> Timestamp:
    """Return `moment` as protobuf."""
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def pack(message: Message) -> AnyMessage:
    """Return `message` in an Any as containerd's typeurl reads it: the bare name, without Python's host prefix."""
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


class Publisher:
    """Forwards events over containerd's ttrpc socket; retries the head of the queue until it is taken."""

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address
        self._namespace = namespace
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._client: Client | None = None
        self._task = asyncio.create_task(self._run(), name="event-publisher")

    def __repr__(self) -> str:
        return f"<Publisher {self._address} queued={self._queue.qsize()}>"

    def created(self, request: CreateContainer, pid: int) -> None:
        io = request.stdio
        self._publish(
            events_pb2.TaskCreate(
                container_id=request.id,
                bundle=request.bundle,
                rootfs=[
                    types_pb2.Mount(type=m.type, source=m.source, target=m.target, options=m.options)
                    for m in request.rootfs
                ],
                io=events_pb2.TaskIO(stdin=io.stdin, stdout=io.stdout, stderr=io.stderr, terminal=io.terminal),
                pid=pid,
            )
        )

    def started(self, container_id: str, pid: int) -> None:
        self._publish(events_pb2.TaskStart(container_id=container_id, pid=pid))

    def exec_added(self, container_id: str, exec_id: str) -> None:
        self._publish(events_pb2.TaskExecAdded(container_id=container_id, exec_id=exec_id))

    def exec_started(self, container_id: str, exec_id: str, pid: int) -> None:
        self._publish(events_pb2.TaskExecStarted(container_id=container_id, exec_id=exec_id, pid=pid))

    def exited(self, container_id: str, exec_id: str, pid: int, exit_: Exit) -> None:
        self._publish(
            events_pb2.TaskExit(
                container_id=container_id,
                id=exec_id or container_id,
                pid=pid,
                exit_status=exit_.status,
                exited_at=timestamp(exit_.at),
            )
        )

    def deleted(self, container_id: str, pid: int, exit_: Exit | None) -> None:
        event = events_pb2.TaskDelete(container_id=container_id, id=container_id, pid=pid)
        if exit_ is not None:
            event.exit_status = exit_.status
            event.exited_at.CopyFrom(timestamp(exit_.at))
        self._publish(event)

    def out_of_memory(self, container_id: str) -> None:
        self._publish(events_pb2.TaskOOM(container_id=container_id))

    def paused(self, container_id: str) -> None:
        self._publish(events_pb2.TaskPaused(container_id=container_id))

    def resumed(self, container_id: str) -> None:
        self._publish(events_pb2.TaskResumed(container_id=container_id))

    def _publish(self, event: Message) -> None:
        envelope = types_pb2.Envelope(
            timestamp=timestamp(datetime.now(UTC)),
            namespace=self._namespace,
            topic=TOPICS[type(event)],
            event=pack(event),
        )
        self._queue.put_nowait(forward_pb2.ForwardRequest(envelope=envelope))

    async def flush(self, limit: float) -> None:
        """Wait until everything queued has been taken, at most `limit` seconds, then stop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._queue.join()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._disconnect()

    async def _run(self) -> None:
        while True:
            request = await self._queue.get()
            await self._forward(request)
            self._queue.task_done()

    async def _forward(self, request: Message) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                if self._client is None:
                    self._client = await Client.connect(self._address)
                await self._client.call(SERVICE, "Forward", request, Empty, timeout=_FORWARD_TIMEOUT)
            except StatusError as error:
                if error.code in REFUSED:  # it would say the same for ever, and every later event would wait
                    logger.error("containerd refused an event, which is lost: %s", error)  # noqa: TRY400
                    return
                logger.warning("containerd did not take an event: %s; trying again in %.2g s", error, pause)
            except (Error, OSError) as error:
                logger.warning("containerd cannot be reached for an event: %s; trying again in %.2g s", error, pause)
                await self._disconnect()
            else:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
