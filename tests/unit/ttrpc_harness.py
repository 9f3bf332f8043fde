"""What the ttrpc tests share: a loop that notices leaks, a server to talk to, and a peer that sends raw frames."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from pymicro.ttrpc import Client, Method, Server, ServerStream, StreamMethod
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.frame import Decoder, Frame
from pymicro.ttrpc.messages_pb2 import Request, Response

SERVICE = "test.Service"
LIMIT = 20.0


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run `scenario`; fail when it leaves a task or a file descriptor, or when a callback raised."""
    before = open_descriptors()
    problems: list[dict[str, Any]] = []  # asyncio's own shape of a context

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        async with asyncio.timeout(LIMIT):
            await scenario
        await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"tasks are left: {others}"

    asyncio.run(watched())
    assert not problems
    assert open_descriptors() == before


def open_descriptors() -> set[str]:
    """Return what this process has open, without the directory that is read for it."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return found


class Probe:
    """Handlers that tell what happened to them."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.running = asyncio.Event()
        self.release = asyncio.Event()
        self.cancellation = asyncio.Event()

    async def echo(self, request: StringValue) -> StringValue:
        self.started += 1
        return StringValue(value=request.value)

    async def wait(self, request: StringValue) -> StringValue:
        self.started += 1
        self.running.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            self.cancellation.set()
            raise
        return StringValue(value=f"waited {request.value}")

    async def repeat(self, stream: ServerStream[StringValue, StringValue]) -> None:
        async for message in stream:
            await stream.send(message)

    async def sleep(self, stream: ServerStream[StringValue, StringValue]) -> None:
        """Never read the stream."""
        await self.wait(StringValue())


def services(probe: Probe) -> dict[str, dict[str, Method[Any] | StreamMethod[Any]]]:
    return {
        SERVICE: {
            "Echo": Method(probe.echo, StringValue),
            "Wait": Method(probe.wait, StringValue),
            "Repeat": StreamMethod(probe.repeat, StringValue),
            "Sleep": StreamMethod(probe.sleep, StringValue),
        }
    }


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    """Serve on an abstract unix socket and give its address; close the server afterwards."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(b"\0ttrpc-test-" + os.urandom(8).hex().encode())
        listener.listen()
        address = listener.getsockname().decode()
        task = asyncio.create_task(server.serve(listener))
        try:
            yield address
        finally:
            await server.close()
            await task


class Peer:
    """One end of a connection that sends whatever it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._decoder = Decoder()

    @classmethod
    async def connect(cls, address: str) -> Self:
        return cls(*await asyncio.open_unix_connection(address))

    def send(self, stream: int, kind: int, flags: int = 0, payload: bytes = b"") -> None:
        self.writer.write(frames.encode(stream, kind, flags, payload))

    def request(self, stream: int, method: str, text: str = "", *, flags: int = 0, timeout_nano: int = 0) -> None:
        payload = StringValue(value=text).SerializeToString()
        envelope = Request(service=SERVICE, method=method, payload=payload, timeout_nano=timeout_nano)
        self.send(stream, frames.REQUEST, flags, envelope.SerializeToString())

    def data(self, stream: int, text: str) -> None:
        self.send(stream, frames.DATA, 0, StringValue(value=text).SerializeToString())

    def end(self, stream: int) -> None:
        self.send(stream, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA)

    def respond(self, stream: int, text: str) -> None:
        self.send(stream, frames.RESPONSE, 0, Response(payload=text_payload(text)).SerializeToString())

    async def frame(self) -> Frame | None:
        """Return the next frame, None at the end of the connection."""
        while True:
            frame = self._decoder.next()
            if isinstance(frame, Frame):
                return frame
            assert frame is None, frame
            data = await self.reader.read(65536)
            if not data:
                return None
            self._decoder.feed(data)

    async def response(self) -> tuple[int, Response]:
        frame = await self.frame()
        assert frame is not None, "the connection ended instead of a response"
        assert frame.kind == frames.RESPONSE
        assert frame.flags == 0
        return frame.stream, Response.FromString(frame.payload)

    async def status(self) -> tuple[int, int]:
        """Return the stream and the status code of the next response."""
        stream, response = await self.response()
        return stream, response.status.code

    async def text(self) -> tuple[int, str]:
        """Return the stream and the text of the next response, which must be OK."""
        stream, response = await self.response()
        assert not response.HasField("status"), response.status
        return stream, StringValue.FromString(response.payload).value

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@asynccontextmanager
async def client_and_peer(**options: Any) -> AsyncIterator[tuple[Client, Peer]]:
    """Give a client whose server is a Peer. `options` go to Client.connect."""
    ours, theirs = socket.socketpair()
    peer = Peer(*await asyncio.open_unix_connection(sock=theirs))
    async with peer, await Client.connect(ours, **options) as client:
        yield client, peer


def text_payload(text: str) -> bytes:
    return StringValue(value=text).SerializeToString()


async def echo(client: Client, text: str, **options: Any) -> str:
    return (await client.call(SERVICE, "Echo", StringValue(value=text), StringValue, **options)).value


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; `run` limits the time."""
    while not condition():
        await asyncio.sleep(0.001)


__all__ = ["BytesValue", "Empty", "StringValue"]
