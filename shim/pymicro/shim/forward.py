"""Handing events to containerd: each as the message of its kind, in an envelope, over ttrpc."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from pymicro.protos import events_pb2, forward_pb2, types_pb2
from pymicro.shim import events
from pymicro.shim.translate import pack, timestamp
from pymicro.ttrpc import Client, Code, Error, StatusError

logger = logging.getLogger(__name__)

SERVICE = "containerd.services.events.ttrpc.v1.Events"
REFUSED = frozenset({Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


def message(event: events.Event) -> Message:
    """Return containerd's message for `event`."""
    return MESSAGES[type(event)](event)


def _task_create(event: events.Created) -> Message:
    request, io = event.request, event.request.stdio
    return events_pb2.TaskCreate(
        container_id=request.id,
        bundle=request.bundle,
        rootfs=[
            types_pb2.Mount(type=m.type, source=m.source, target=m.target, options=m.options) for m in request.rootfs
        ],
        io=events_pb2.TaskIO(stdin=io.stdin, stdout=io.stdout, stderr=io.stderr, terminal=io.terminal),
        pid=event.pid,
    )


def _task_exit(event: events.Exited) -> Message:
    return events_pb2.TaskExit(
        container_id=event.container_id,
        id=event.exec_id or event.container_id,
        pid=event.pid,
        exit_status=event.exit.status,
        exited_at=timestamp(event.exit.at),
    )


def _task_delete(event: events.Deleted) -> Message:
    deleted = events_pb2.TaskDelete(container_id=event.container_id, id=event.container_id, pid=event.pid)
    if event.exit is not None:
        deleted.exit_status = event.exit.status
        deleted.exited_at.CopyFrom(timestamp(event.exit.at))
    return deleted


MESSAGES: dict[type[events.Event], Callable[[Any], Message]] = {  # each takes the kind of event that it stands beside
    events.Created: _task_create,
    events.Started: lambda e: events_pb2.TaskStart(container_id=e.container_id, pid=e.pid),
    events.Exited: _task_exit,
    events.Deleted: _task_delete,
    events.OutOfMemory: lambda e: events_pb2.TaskOOM(container_id=e.container_id),
    events.ExecAdded: lambda e: events_pb2.TaskExecAdded(container_id=e.container_id, exec_id=e.exec_id),
    events.ExecStarted: lambda e: events_pb2.TaskExecStarted(container_id=e.container_id, exec_id=e.exec_id, pid=e.pid),
    events.Paused: lambda e: events_pb2.TaskPaused(container_id=e.container_id),
    events.Resumed: lambda e: events_pb2.TaskResumed(container_id=e.container_id),
}
TOPICS: dict[type[events.Event], str] = {
    events.Created: "/tasks/create",
    events.Started: "/tasks/start",
    events.Exited: "/tasks/exit",
    events.Deleted: "/tasks/delete",
    events.OutOfMemory: "/tasks/oom",
    events.ExecAdded: "/tasks/exec-added",
    events.ExecStarted: "/tasks/exec-started",
    events.Paused: "/tasks/paused",
    events.Resumed: "/tasks/resumed",
}


class Forwarder:
    """One connection to containerd's events service, made anew whenever it breaks."""

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address
        self._namespace = namespace
        self._client: Client | None = None

    def __repr__(self) -> str:
        return f"<Forwarder {self._address} {'connected' if self._client else 'not connected'}>"

    async def forward(self, event: events.Event) -> None:
        """Return when containerd has taken `event`, or has refused it for good.

        A containerd that says nothing is waited for as long as the connection lives: it may still take what has been
        sent, and would take an event that is sent again for another one.
        """
        envelope = types_pb2.Envelope(
            timestamp=timestamp(event.at),
            namespace=self._namespace,
            topic=TOPICS[type(event)],
            event=pack(message(event)),
        )
        request = forward_pb2.ForwardRequest(envelope=envelope)
        pause = _FIRST_PAUSE
        while True:
            try:
                if self._client is None:
                    self._client = await Client.connect(self._address)
                await self._client.call(SERVICE, "Forward", request, Empty)
            except StatusError as error:
                if error.code in REFUSED:  # it would say the same for ever, and every later event would wait
                    logger.error("containerd refused an event, which is lost: %s", error)  # noqa: TRY400
                    return
                logger.warning("containerd did not take an event: %s; trying again in %.2g s", error, pause)
            except (Error, OSError) as error:
                logger.warning("containerd cannot be reached for an event: %s; trying again in %.2g s", error, pause)
                await self.close()
            else:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def close(self) -> None:
        """Let the connection go. Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()
