"""The Task service over gRPC, from Create to Shutdown, as containerd 1.7 uses it; errors are the same as over ttrpc."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]  # it ships no types
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from pymicro.protos import task_pb2, types_pb2
from pymicro.shim import errors, sockets
from pymicro.shim.grpc_server import SOCKET, GrpcServer
from pymicro.shim.protocol import GRPC
from pymicro.shim.serve import _status_of
from pymicro.ttrpc import Method

from tests.framework.fakes import asynchronous, no_descriptor_leaks
from tests.unit.test_shim_serve import Daemon, daemon, directory, logging_as_before

__all__ = ["directory", "logging_as_before"]

TASK = "containerd.task.v3.Task"


class Client:
    """A client at a shim's socket, as containerd's."""

    def __init__(self, path: str) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix:{path}")

    async def call(self, method: str, request: Message, reply: type[Message] = Empty, service: str = TASK) -> Any:
        """Call and return the reply, of the type that is given."""
        call = self._channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        return await call(request, timeout=5)

    async def close(self) -> None:
        await self._channel.close()


@asynccontextmanager
async def client(path: str) -> AsyncIterator[Client]:
    client = Client(path)
    try:
        yield client
    finally:
        await client.close()


async def create(d: Daemon, client: Client) -> int:
    mount = types_pb2.Mount(type="bind", source="/somewhere", options=["rbind"])
    request = task_pb2.CreateTaskRequest(id="c1", bundle=d.begun.bundle, rootfs=[mount])
    return int((await client.call("Create", request, task_pb2.CreateTaskResponse)).pid)


@asynchronous
async def test_from_create_to_shutdown(directory: Path) -> None:
    async with daemon(directory, spoken=GRPC) as d, client(d.begun.socket_path) as task:
        pid = await create(d, task)
        started = await task.call("Start", task_pb2.StartRequest(id="c1"), task_pb2.StartResponse)
        assert started.pid == pid
        waiting = asyncio.create_task(task.call("Wait", task_pb2.WaitRequest(id="c1"), task_pb2.WaitResponse))
        state = await task.call("State", task_pb2.StateRequest(id="c1"), task_pb2.StateResponse)
        assert state.pid == pid
        await d.pod.guest.exit(5, "c1")
        assert (await waiting).exit_status == 5
        await task.call("Delete", task_pb2.DeleteRequest(id="c1"), task_pb2.DeleteResponse)
        await task.call("Shutdown", task_pb2.ShutdownRequest(id="c1"))
        assert d.containerd.topics == [f"/tasks/{word}" for word in ("create", "start", "exit", "delete")]
        assert d.nothing_left, "`delete` comes next"
        await asyncio.wait_for(d.running, 5)


@asynchronous
async def test_both_names_of_the_service(directory: Path) -> None:
    async with daemon(directory, spoken=GRPC) as d, client(d.begun.socket_path) as task:
        for service in ("containerd.task.v2.Task", TASK):
            request = task_pb2.ConnectRequest(id="c1")
            assert (await task.call("Connect", request, task_pb2.ConnectResponse, service)).shim_pid == os.getpid()


@asynchronous
async def test_many_connections(directory: Path) -> None:
    async with daemon(directory, spoken=GRPC) as d:
        for _ in range(3):
            async with client(d.begun.socket_path) as task:
                await task.call("Connect", task_pb2.ConnectRequest(id="c1"), task_pb2.ConnectResponse)


@asynchronous
async def test_unknown_container(directory: Path) -> None:
    async with daemon(directory, spoken=GRPC) as d, client(d.begun.socket_path) as task:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await task.call("State", task_pb2.StateRequest(id="c9"), task_pb2.StateResponse)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "'c9'" in caught.value.details()


@asynchronous
async def test_other_users_are_turned_away(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon(directory, spoken=GRPC) as d:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        reader, writer = await asyncio.open_unix_connection(d.begun.socket_path)
        assert await asyncio.wait_for(reader.read(), 5) == b"", "not one byte of gRPC's greeting"
        writer.close()


# --- the server alone


@asynccontextmanager
async def serving(directory: Path, handler: Any) -> AsyncIterator[tuple[GrpcServer, Client]]:  # of any method
    listener = sockets.bind(str(directory / "s"))
    assert listener
    services = {TASK: {"State": Method(handler, task_pb2.StateRequest)}}
    server = GrpcServer(services, str(directory), status_of=_status_of, authorize=lambda _: True)
    running = asyncio.create_task(server.serve(listener))
    async with client(str(directory / "s")) as task:
        yield server, task
    await server.close()
    await asyncio.wait_for(running, 5)
    assert not (directory / SOCKET).exists()


async def state_of(task: Client) -> Any:
    return await task.call("State", task_pb2.StateRequest(id="c1"), task_pb2.StateResponse)


@pytest.mark.parametrize("kind", [kind for kind, _ in errors.STATUS if issubclass(kind, errors.ShimError)])
@asynchronous
async def test_status_codes_are_those_of_ttrpc(directory: Path, kind: type[errors.ShimError]) -> None:
    async def fail(_: Message) -> Message:
        raise kind("what went wrong: \udcff \u2713\nand what to do")

    async with serving(directory, fail) as (_, task):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await state_of(task)
        assert caught.value.code().value[0] == errors.status_code(kind())
        assert caught.value.details() == "what went wrong: ? \u2713\nand what to do"


@asynchronous
async def test_an_error_that_nobody_knows_is_logged_and_answered(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: Message) -> Message:
        raise KeyError

    async with serving(directory, fail) as (_, task):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await state_of(task)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNKNOWN, "KeyError")
    assert f"{TASK}/State failed" in caplog.text


@asynchronous
async def test_an_answer_that_is_due_when_all_ends_still_arrives(directory: Path) -> None:
    go = asyncio.Event()

    async def slow(_: Message) -> Message:
        await go.wait()
        return task_pb2.StateResponse(id="c1")

    async with serving(directory, slow) as (server, task):
        waiting = asyncio.create_task(state_of(task))
        await asyncio.sleep(0.2)
        go.set()
        await server.close(grace=1)
        assert (await waiting).id == "c1"


@asynchronous
async def test_a_caller_that_goes_away_ends_its_handler(directory: Path) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def wait(_: Message) -> Message:
        began.set()
        try:
            return await asyncio.Future()
        finally:
            ended.set()

    async with serving(directory, wait) as (_, task):
        waiting = asyncio.create_task(state_of(task))
        await began.wait()
        await task.close()
        await ended.wait()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError, grpc.aio.UsageError)):
            await waiting


@asynchronous
async def test_large_messages(directory: Path) -> None:
    async def echo(request: task_pb2.StateRequest) -> Message:
        return task_pb2.StateResponse(id=request.id)

    async with serving(directory, echo) as (_, task):
        request = task_pb2.StateRequest(id="x" * 3_000_000)
        assert (await task.call("State", request, task_pb2.StateResponse)).id == request.id


@asynchronous
async def test_clients_that_say_nothing_or_nonsense_hold_nobody_up(directory: Path) -> None:
    async def answer(_: Message) -> Message:
        return task_pb2.StateResponse(id="c1")

    with no_descriptor_leaks():
        async with serving(directory, answer) as (_, task):
            silent = socket.socket(socket.AF_UNIX)
            silent.connect(str(directory / "s"))
            reader, writer = await asyncio.open_unix_connection(str(directory / "s"))
            writer.write(b"GET / HTTP/1.0\r\n\r\n" * 100)
            assert (await state_of(task)).id == "c1"
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
            silent.close()
            await writer.wait_closed()


@asynchronous
async def test_a_directory_that_is_too_long_for_a_socket(tmp_path: Path, directory: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    listener = sockets.bind(str(directory / "s"))
    assert listener
    server = GrpcServer({}, str(long), status_of=_status_of, authorize=lambda _: True)
    with pytest.raises(OSError, match=r"gRPC cannot listen at"):
        await server.serve(listener)


def test_grpc_is_not_imported_where_ttrpc_is_spoken() -> None:
    code = "import sys; from pymicro.shim import service, serve, forward, boot; print('grpc' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
