"""Our ttrpc against containerd's own, in both directions (the Go program beside this file)."""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue, Int32Value, StringValue
from pymicro.ttrpc import (
    Client,
    Code,
    Disconnected,
    Method,
    Server,
    ServerStream,
    StatusError,
    StreamMethod,
    current_call,
)
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.messages_pb2 import Request

Scenario: TypeAlias = Callable[[Client], Awaitable[None]]

SERVICE = "interop.Service"
SOURCE = Path(__file__).parent / "ttrpc_interop"
DOWNLOAD_SECONDS, BUILD_SECONDS = 120, 300


@pytest.fixture(scope="session")
def interop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Go program, built."""
    if shutil.which("go") is None:
        pytest.skip("containerd's ttrpc is built from source, and there is no `go` on PATH")
    environment = os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0"}
    download = ["go", "mod", "download"]
    try:
        subprocess.run(
            download, cwd=SOURCE, env=environment, check=True, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip("containerd's ttrpc is not to be had: the Go proxy does not answer")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"containerd's ttrpc is not to be had: {error.stderr.strip()[-300:]}")
    program = tmp_path_factory.mktemp("interop") / "ttrpc_interop"
    build = ["nice", "go", "build", "-o", str(program), "."]
    subprocess.run(build, cwd=SOURCE, env=environment, check=True, timeout=BUILD_SECONDS)
    return program


# Go's client, our server


class Service:
    """What the Go program's server does, in Python."""

    def __init__(self) -> None:
        self.waiting = 0
        self.ended_waits = 0

    async def echo(self, request: StringValue) -> StringValue:
        return request

    async def bytes(self, request: BytesValue) -> BytesValue:
        return request

    async def double(self, request: BytesValue) -> BytesValue:
        return BytesValue(value=request.value * 2)

    async def fail(self, request: Int32Value) -> Empty:
        if request.value < 0:
            raise ArithmeticError("an error without a code")
        raise StatusError(request.value, f"asked for {request.value}")

    async def wait(self, _: Empty) -> Empty:
        self.waiting += 1
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.ended_waits += 1
        return Empty()

    async def metadata(self, request: StringValue) -> StringValue:
        return StringValue(value=",".join(current_call.get().metadata[request.value]))

    async def repeat(self, stream: ServerStream[StringValue, StringValue]) -> None:
        async for message in stream:
            await stream.send(message)

    async def count(self, stream: ServerStream[Int32Value, Int32Value]) -> None:
        request = await stream.receive()
        assert request is not None
        for i in range(1, abs(request.value) + 1):
            await stream.send(Int32Value(value=i))
        if request.value < 0:
            raise StatusError(Code.FAILED_PRECONDITION, "below zero")

    async def join(self, stream: ServerStream[StringValue, StringValue]) -> StringValue:
        return StringValue(value=",".join([message.value async for message in stream]))

    def server(self) -> Server:
        return Server(
            {
                SERVICE: {
                    "Echo": Method(self.echo, StringValue),
                    "Bytes": Method(self.bytes, BytesValue),
                    "Double": Method(self.double, BytesValue),
                    "Fail": Method(self.fail, Int32Value),
                    "Wait": Method(self.wait, Empty),
                    "Metadata": Method(self.metadata, StringValue),
                    "Repeat": StreamMethod(self.repeat, StringValue),
                    "Count": StreamMethod(self.count, Int32Value),
                    "Join": StreamMethod(self.join, StringValue, server_streams=False),
                }
            }
        )


@contextmanager
def unix_listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


async def go_client(interop: Path, socket_path: Path, check: str) -> None:
    """Serve, let Go's client run one check, and see that no handler is left behind."""
    service = Service()
    server = service.server()
    with unix_listener(socket_path) as listener:
        serving = asyncio.create_task(server.serve(listener))
        process = await asyncio.create_subprocess_exec(
            interop, "client", str(socket_path), check, stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()
        async with asyncio.timeout(5):
            while service.ended_waits < service.waiting:
                await asyncio.sleep(0.01)
        await server.close()
        await serving
    assert process.returncode == 0, errors.decode()
    assert service.waiting == (1 if check in {"timeout", "leave-with-wait"} else 0)


@pytest.mark.parametrize(
    "check",
    [
        "unary",
        "empty",
        "largest",
        "oversize",
        "codes",
        "unknown",
        "timeout",
        "metadata",
        "concurrent",
        "stream-both",
        "stream-many",
        "stream-server",
        "stream-error",
        "stream-client",
        "leave-with-wait",
    ],
)
def test_containerds_client_is_served(interop: Path, tmp_path: Path, check: str) -> None:
    asyncio.run(go_client(interop, tmp_path / "s.sock", check))


# Our client, Go's server


@pytest.fixture
def go_server(interop: Path, tmp_path: Path) -> Iterator[Path]:
    """Return the socket of a running Go server."""
    path = tmp_path / "s.sock"
    command = [str(interop), "server", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        yield path
        process.stdin.close()
        assert process.wait(10) == 0


@asynccontextmanager
async def go_server_process(interop: Path, path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a Go server that the test may kill."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(interop, "server", str(path), stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    assert await process.stdout.readline() == b"listening\n"
    try:
        yield process
    finally:
        process.stdin.close()
        await process.wait()


def with_client(path: Path, scenario: Scenario) -> None:
    async def everything() -> None:
        async with asyncio.timeout(60), await Client.connect(path) as client:
            await scenario(client)
            assert await echo(client, "still there") == "still there"

    asyncio.run(everything())


async def echo(client: Client, text: str) -> str:
    return (await client.call(SERVICE, "Echo", StringValue(value=text), StringValue)).value


def test_unary_calls_on_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        for text in ("hello", "", "ü"):
            assert await echo(client, text) == text

    with_client(go_server, scenario)


def test_the_largest_payload_on_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        envelope = Request(service=SERVICE, method="Bytes").ByteSize() + 2 * (1 + 4)
        value = os.urandom(frames.MAX_PAYLOAD - envelope)
        answer = await client.call(SERVICE, "Bytes", BytesValue(value=value), BytesValue)
        assert answer.value == value

    with_client(go_server, scenario)


def test_every_code_of_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        for code in [*Code][1:]:
            with pytest.raises(StatusError, match=f"asked for {code.value}$") as caught:
                await client.call(SERVICE, "Fail", Int32Value(value=code), Empty)
            assert caught.value.code == code
        with pytest.raises(StatusError) as caught:
            await client.call(SERVICE, "Fail", Int32Value(value=-1), Empty)
        assert caught.value.code == Code.UNKNOWN
        with pytest.raises(StatusError) as caught:
            await client.call(SERVICE, "Missing", Empty(), Empty)
        assert caught.value.code == Code.UNIMPLEMENTED

    with_client(go_server, scenario)


def test_a_timeout_on_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        with pytest.raises(StatusError) as caught:
            await client.call(SERVICE, "Wait", Empty(), Empty, timeout=0.1)
        assert caught.value.code == Code.DEADLINE_EXCEEDED

    with_client(go_server, scenario)


def test_containerds_server_reads_the_timeout(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        envelope = Request(service=SERVICE, method="Wait", timeout_nano=50_000_000).SerializeToString()
        with pytest.raises(StatusError) as caught:
            await client._connection.unary(envelope)  # without a timer of our own
        assert caught.value.code == Code.DEADLINE_EXCEEDED

    with_client(go_server, scenario)


def test_metadata_on_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        request = StringValue(value="key")
        answer = await client.call(SERVICE, "Metadata", request, StringValue, metadata={"key": ["a", "b"]})
        assert answer.value == "a,b"

    with_client(go_server, scenario)


def test_a_hundred_calls_at_once_on_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        texts = [f"{i} " + "x" * 10_000 for i in range(100)]
        assert await asyncio.gather(*(echo(client, text) for text in texts)) == texts

    with_client(go_server, scenario)


def test_streams_both_ways_on_containerds_server(go_server: Path) -> None:
    async def ping_pong(client: Client) -> None:
        async with await client.stream(SERVICE, "Repeat", StringValue) as stream:
            for i in range(200):
                message = StringValue(value=str(i) if i else "")
                await stream.send(message)
                assert await stream.receive() == message
            await stream.close_send()
            assert await stream.receive() is None

    async def scenario(client: Client) -> None:
        await asyncio.gather(*(ping_pong(client) for _ in range(10)))

    with_client(go_server, scenario)


def test_a_stream_from_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        for count in (1000, 1, 0):
            stream = await client.stream(SERVICE, "Count", Int32Value, request=Int32Value(value=count))
            assert [message.value async for message in stream] == list(range(1, count + 1))

    with_client(go_server, scenario)


def test_an_error_after_messages_from_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        stream = await client.stream(SERVICE, "Count", Int32Value, request=Int32Value(value=-3))
        assert [(await anext(stream)).value for _ in range(3)] == [1, 2, 3]
        with pytest.raises(StatusError, match="below zero"):
            await stream.receive()

    with_client(go_server, scenario)


def test_a_stream_to_containerds_server(go_server: Path) -> None:
    async def scenario(client: Client) -> None:
        async with await client.stream(SERVICE, "Join", StringValue, server_streams=False) as stream:
            for text in ("a", "", "c"):
                await stream.send(StringValue(value=text))
            await stream.close_send()
            assert [message.value async for message in stream] == ["a,,c"]

    with_client(go_server, scenario)


def test_containerds_server_going_away_frees_every_waiter(interop: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"

    async def scenario() -> None:
        async with go_server_process(interop, path) as process, await Client.connect(path) as client:
            waits = [asyncio.create_task(client.call(SERVICE, "Wait", Empty(), Empty)) for _ in range(10)]
            assert await echo(client, "x") == "x"
            process.kill()
            results = await asyncio.gather(*waits, return_exceptions=True)
            assert {type(result) for result in results} == {Disconnected}

    asyncio.run(scenario())
