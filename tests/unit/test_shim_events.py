"""Events reach containerd once each, in order, also over its restarts; those that it refuses hold up nobody."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from pymicro.protos import events_pb2, forward_pb2, types_pb2
from pymicro.shim import forward
from pymicro.shim.events import Publisher
from pymicro.shim.requests import CreateContainer, Exit, Mount, StdioPaths
from pymicro.ttrpc import Call, Code, Method, Server, StatusError, current_call

from tests.framework.fakes import asynchronous, no_descriptor_leaks, until

EXIT = Exit(7, datetime(2024, 5, 6, 7, 8, 9, 123456, UTC))


class Containerd:
    """The events service of a containerd that can be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "c.ttrpc")
        self.envelopes: list[types_pb2.Envelope] = []
        self.before: Callable[[], None] = lambda: None
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def topics(self) -> list[str]:
        return [envelope.topic for envelope in self.envelopes]

    async def forward(self, request: Message) -> Empty:
        self.before()
        self.envelopes.append(cast("forward_pb2.ForwardRequest", request).envelope)
        return Empty()

    async def start(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen()
        self._server = Server({forward.SERVICE: {"Forward": Method(self.forward, forward_pb2.ForwardRequest)}})
        self._serving = asyncio.create_task(self._server.serve(listener))
        await asyncio.sleep(0)

    async def stop(self) -> None:
        if self._server is not None and self._serving is not None:
            await self._server.close()
            await self._serving
            os.unlink(self.address)
            self._server = None


@asynccontextmanager
async def publishing(tmp_path: Path, *, running: bool = True) -> AsyncIterator[tuple[Containerd, Publisher]]:
    with no_descriptor_leaks():
        containerd = Containerd(tmp_path)
        if running:
            await containerd.start()
        publisher = Publisher(containerd.address, "k8s.io")
        try:
            yield containerd, publisher
        finally:
            await publisher.flush(0.1)
            await containerd.stop()


@asynchronous
async def test_whole_life_in_order(tmp_path: Path) -> None:
    async with publishing(tmp_path) as (containerd, publisher):
        request = CreateContainer(
            "c1", "/bundle", (Mount("overlay", "overlay", "", ("lowerdir=/a",)),), StdioPaths("in", "out", "err", True)
        )
        publisher.created(request, 42)
        publisher.started("c1", 42)
        publisher.exec_added("c1", "e1")
        publisher.exec_started("c1", "e1", 43)
        publisher.exited("c1", "e1", 43, EXIT)
        publisher.paused("c1")
        publisher.resumed("c1")
        publisher.out_of_memory("c1")
        publisher.exited("c1", "", 42, EXIT)
        publisher.deleted("c1", 42, EXIT)
        await publisher.flush(5)
        words = ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "oom", "exit", "delete"]
        assert containerd.topics == [f"/tasks/{word}" for word in words]
        created = events_pb2.TaskCreate.FromString(containerd.envelopes[0].event.value)
        assert (created.container_id, created.bundle, created.pid) == ("c1", "/bundle", 42)
        assert (created.io.stdin, created.io.stdout, created.io.stderr, created.io.terminal) == (
            "in",
            "out",
            "err",
            True,
        )
        assert created.rootfs[0].options == ["lowerdir=/a"]
        exec_exit = events_pb2.TaskExit.FromString(containerd.envelopes[4].event.value)
        assert (exec_exit.container_id, exec_exit.id, exec_exit.pid, exec_exit.exit_status) == ("c1", "e1", 43, 7)
        init_exit = events_pb2.TaskExit.FromString(containerd.envelopes[8].event.value)
        assert init_exit.id == "c1", "that is how containerd knows the init"
        assert init_exit.exited_at.ToDatetime(UTC) == EXIT.at
        deleted = events_pb2.TaskDelete.FromString(containerd.envelopes[9].event.value)
        assert (deleted.id, deleted.exit_status, deleted.pid) == ("c1", 7, 42)


@asynchronous
async def test_envelope_is_as_containerd_demands(tmp_path: Path) -> None:
    """It refuses a zero timestamp, an empty namespace, and type URLs with Python's host prefix."""
    async with publishing(tmp_path) as (containerd, publisher):
        publisher.started("c1", 42)
        await publisher.flush(5)
        envelope = containerd.envelopes[0]
        assert envelope.namespace == "k8s.io"
        assert abs(envelope.timestamp.ToDatetime(UTC).timestamp() - datetime.now(UTC).timestamp()) < 60
        assert envelope.event.type_url == "containerd.events.TaskStart"


@asynchronous
async def test_containerd_that_starts_later(tmp_path: Path) -> None:
    async with publishing(tmp_path, running=False) as (containerd, publisher):
        for n in range(5):
            publisher.started(f"c{n}", n)
        await asyncio.sleep(0.02)
        await containerd.start()
        await publisher.flush(5)
        assert len(containerd.envelopes) == 5


@asynchronous
async def test_restart_loses_nothing_and_keeps_the_order(tmp_path: Path) -> None:
    async with publishing(tmp_path) as (containerd, publisher):
        for n in range(10):
            publisher.started(f"c{n}", n)
            if n == 4:
                await until(lambda: len(containerd.envelopes) == 5)
                await containerd.stop()
                await asyncio.sleep(0.01)
        await containerd.start()
        await publisher.flush(5)
        ids = [events_pb2.TaskStart.FromString(envelope.event.value).container_id for envelope in containerd.envelopes]
        assert ids == [f"c{n}" for n in range(10)]


@asynchronous
async def test_busy_containerd_is_asked_again(tmp_path: Path) -> None:
    async with publishing(tmp_path) as (containerd, publisher):
        failures = iter([StatusError(Code.UNAVAILABLE, "busy"), RuntimeError("a defect"), None])

        def fail() -> None:
            if error := next(failures, None):
                raise error

        containerd.before = fail
        publisher.started("c1", 1)
        publisher.started("c2", 2)
        await publisher.flush(5)
        assert len(containerd.envelopes) == 2


@asynchronous
async def test_containerd_may_take_its_time(tmp_path: Path) -> None:
    """An event that is given up and sent again would come twice, once it goes on."""
    async with publishing(tmp_path) as (containerd, publisher):
        calls: list[Call | None] = []
        containerd.before = lambda: calls.append(current_call.get())
        publisher.started("c1", 1)
        await publisher.flush(5)
        assert [call and call.deadline for call in calls] == [None]


@asynchronous
async def test_a_guest_cannot_fill_the_queue(tmp_path: Path) -> None:
    async with publishing(tmp_path, running=False) as (containerd, publisher):
        for _ in range(1000):
            publisher.out_of_memory("c1")
        publisher.out_of_memory("c2")
        await containerd.start()
        await publisher.flush(5)
        assert containerd.topics == ["/tasks/oom"] * 2


@asynchronous
async def test_event_that_containerd_refuses_holds_up_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with publishing(tmp_path) as (containerd, publisher):
        failures = iter([StatusError(Code.INVALID_ARGUMENT, "no such namespace")])

        def fail() -> None:
            if error := next(failures, None):
                raise error

        containerd.before = fail
        publisher.started("c1", 1)
        publisher.started("c2", 2)
        await publisher.flush(5)
        assert len(containerd.envelopes) == 1
        assert "no such namespace" in caplog.text


@asynchronous
async def test_flush_gives_up_when_containerd_is_gone_for_good(tmp_path: Path) -> None:
    async with publishing(tmp_path, running=False) as (_, publisher):
        publisher.started("c1", 1)
        assert "queued=1" in repr(publisher) or "queued=0" in repr(publisher)
        await asyncio.wait_for(publisher.flush(0.05), 1)


def test_every_event_has_its_topic() -> None:
    assert set(forward.TOPICS) == set(forward.MESSAGES)
    assert set(forward.TOPICS.values()) == {
        f"/tasks/{word}"
        for word in ("create", "start", "exit", "delete", "oom", "exec-added", "exec-started", "paused", "resumed")
    }
