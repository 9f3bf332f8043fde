"""Task events: what happened, as frozen data, in one queue for containerd.

Nothing of protobuf or ttrpc is needed to report an event, so none is imported here: a start has better things to do.
"""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime

from msgspec import Struct
from pymicro.shim.requests import CreateContainer, Exit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.forward import Forwarder


class Event(Struct, frozen=True):
    """Base of all: which container, and when it happened by the host's clock."""

    container_id: str
    at: datetime


class Created(Event, frozen=True):
    request: CreateContainer
    pid: int


class Started(Event, frozen=True):
    pid: int


class ExecAdded(Event, frozen=True):
    exec_id: str


class ExecStarted(Event, frozen=True):
    exec_id: str
    pid: int


class Exited(Event, frozen=True):
    exec_id: str
    """"" for the init."""
    pid: int
    exit: Exit


class Deleted(Event, frozen=True):
    pid: int
    exit: Exit | None
    """None for a container that was never started."""


class OutOfMemory(Event, frozen=True):
    pass


class Paused(Event, frozen=True):
    pass


class Resumed(Event, frozen=True):
    pass


class Publisher:
    """Forwards events to containerd's ttrpc socket, one after the other, each until it is taken."""

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address
        self._namespace = namespace
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._oom_queued: set[str] = set()
        self._forwarder: Forwarder | None = None
        self._task = asyncio.create_task(self._run(), name="event-publisher")

    def __repr__(self) -> str:
        return f"<Publisher {self._address} queued={self._queue.qsize()}>"

    def created(self, request: CreateContainer, pid: int) -> None:
        self._publish(Created(request.id, datetime.now(UTC), request, pid))

    def started(self, container_id: str, pid: int) -> None:
        self._publish(Started(container_id, datetime.now(UTC), pid))

    def exec_added(self, container_id: str, exec_id: str) -> None:
        self._publish(ExecAdded(container_id, datetime.now(UTC), exec_id))

    def exec_started(self, container_id: str, exec_id: str, pid: int) -> None:
        self._publish(ExecStarted(container_id, datetime.now(UTC), exec_id, pid))

    def exited(self, container_id: str, exec_id: str, pid: int, exit_: Exit) -> None:
        self._publish(Exited(container_id, datetime.now(UTC), exec_id, pid, exit_))

    def deleted(self, container_id: str, pid: int, exit_: Exit | None) -> None:
        self._publish(Deleted(container_id, datetime.now(UTC), pid, exit_))

    def out_of_memory(self, container_id: str) -> None:
        self._publish(OutOfMemory(container_id, datetime.now(UTC)))

    def paused(self, container_id: str) -> None:
        self._publish(Paused(container_id, datetime.now(UTC)))

    def resumed(self, container_id: str) -> None:
        self._publish(Resumed(container_id, datetime.now(UTC)))

    def _publish(self, event: Event) -> None:
        if isinstance(event, OutOfMemory):
            if event.container_id in self._oom_queued:  # a guest may say so as often as it likes
                return
            self._oom_queued.add(event.container_id)
        self._queue.put_nowait(event)

    async def taken(self, limit: float) -> None:
        """Return when everything queued has been taken, or after `limit` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._queue.join()

    async def flush(self, limit: float) -> None:
        """Wait until everything queued has been taken, at most `limit` seconds, then stop."""
        await self.taken(limit)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self._forwarder is not None:
            await self._forwarder.close()

    async def _run(self) -> None:
        while True:
            event = await self._queue.get()
            if self._forwarder is None:
                from pymicro.shim.forward import Forwarder

                self._forwarder = Forwarder(self._address, self._namespace)
            if isinstance(event, OutOfMemory):
                self._oom_queued.discard(event.container_id)
            await self._forwarder.forward(event)
            self._queue.task_done()
