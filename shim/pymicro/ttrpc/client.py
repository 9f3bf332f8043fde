"""The client: one connection, any number of concurrent calls and streams."""

import asyncio
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from google.protobuf.message import DecodeError, Message
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.connection import Connection
from pymicro.ttrpc.frame import Frame, Oversize
from pymicro.ttrpc.messages_pb2 import KeyValue, Request, Response
from pymicro.ttrpc.status import Code, Disconnected, ProtocolError, StatusError
from pymicro.ttrpc.streaming import STALL_SECONDS, ClientStream, too_large

ResponseT = TypeVar("ResponseT", bound=Message)
Metadata = Mapping[str, Iterable[str]]

LAST_STREAM = 2**32 - 1


class Client:
    """Calls methods of the server at the other end of one connection. Use it as `async with`.

    When the connection ends, every call and stream that is under way raises Disconnected, and so do later ones:
    connect anew. Cancelling the task that awaits a call drops its answer; ttrpc cannot tell the server.
    """

    def __init__(self, connection: "ClientConnection") -> None:
        self._connection = connection

    def __repr__(self) -> str:
        return f"<Client {self._connection!r}>"

    @classmethod
    async def connect(cls, address: str | Path | socket.socket, *, stall: float | None = STALL_SECONDS) -> Self:
        """Connect to a unix socket's path (also as `unix://...`), or take over a connected stream socket.

        `stall` is the time in seconds that an unread stream may hold up the connection before it is ended. Raises
        OSError when nothing listens there.
        """
        loop = asyncio.get_running_loop()
        if isinstance(address, socket.socket):
            address.setblocking(False)
            _, connection = await loop.create_connection(lambda: ClientConnection(stall), sock=address)
        else:
            path = os.fspath(address).removeprefix("unix://")
            _, connection = await loop.create_unix_connection(lambda: ClientConnection(stall), path)
        return cls(connection)

    @property
    def connected(self) -> bool:
        """Whether a call may still succeed."""
        return not self._connection.closing

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        response_type: type[ResponseT],
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> ResponseT:
        """Call a unary method and return its response.

        `service` is the full name, such as `containerd.task.v2.Task`. `timeout` is in seconds; the server learns
        it too. Raises StatusError, with code DEADLINE_EXCEEDED after the timeout, and Disconnected.
        """
        envelope = _envelope(service, method, request.SerializeToString(), timeout, metadata)
        try:
            async with asyncio.timeout(timeout):
                payload = await self._connection.unary(envelope)
        except TimeoutError:
            message = f"{service}/{method} did not answer in {timeout} s"
            raise StatusError(Code.DEADLINE_EXCEEDED, message) from None
        try:
            return response_type.FromString(payload)
        except DecodeError as error:
            raise StatusError(
                Code.INTERNAL, f"{service}/{method} answered no {response_type.__name__}: {error}"
            ) from error

    async def stream(
        self,
        service: str,
        method: str,
        response_type: type[ResponseT],
        *,
        request: Message | None = None,
        server_streams: bool = True,
        metadata: Metadata | None = None,
    ) -> ClientStream[ResponseT, Any]:
        """Open a stream and return this side's end of it. Raises StatusError and Disconnected.

        With `request` the client does not stream: that is its only message. Without, it sends its messages on the
        stream and calls `close_send`. A server that does not stream answers with exactly one message.
        """
        payload = b"" if request is None else request.SerializeToString()
        envelope = _envelope(service, method, payload, None, metadata)
        return await self._connection.open_stream(
            envelope, response_type, client_streams=request is None, server_streams=server_streams
        )

    async def close(self) -> None:
        """Close the connection; calls that are under way raise Disconnected."""
        self._connection.close()
        await self._connection.wait_lost()

    async def wait_closed(self) -> None:
        """Wait until the connection has ended, for whatever reason."""
        await self._connection.wait_lost()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class ClientConnection(Connection):
    """The client's side of the wire: gives out stream numbers and hands each frame to who waits for it."""

    def __init__(self, stall: float | None) -> None:
        super().__init__()
        self._stall = stall
        self._next_stream = 1
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._streams: dict[int, ClientStream[Any, Any]] = {}

    async def unary(self, envelope: bytes) -> bytes:
        """Send a request and return the payload of the response."""
        await self.writable()
        number = self._take_number()
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._calls[number] = answer
        try:
            self.send(number, frames.REQUEST, 0, envelope)
            return await answer
        finally:
            del self._calls[number]

    async def open_stream(
        self, envelope: bytes, response_type: type[ResponseT], *, client_streams: bool, server_streams: bool
    ) -> ClientStream[ResponseT, Any]:
        """Send a request that opens a stream."""
        await self.writable()
        number = self._take_number()
        stream: ClientStream[ResponseT, Any] = ClientStream(
            self,
            number,
            response_type,
            client_streams=client_streams,
            server_streams=server_streams,
            stall=self._stall,
            forget=self._forget,
        )
        self._streams[number] = stream
        self.send(number, frames.REQUEST, frames.REMOTE_OPEN if client_streams else frames.REMOTE_CLOSED, envelope)
        return stream

    def _take_number(self) -> int:
        number = self._next_stream
        if number > LAST_STREAM:
            raise Disconnected("the stream numbers of this connection are used up")
        self._next_stream += 2
        return number

    def _forget(self, number: int) -> None:
        self._streams.pop(number, None)

    def ended(self) -> None:
        for answer in tuple(self._calls.values()):
            _fail(answer, self.disconnected())
        for stream in tuple(self._streams.values()):
            stream.close_with(self.disconnected())

    def frame_received(self, frame: Frame | Oversize) -> None:
        """Hand the frame over. A frame for a call that was given up is dropped."""
        answer = self._calls.get(frame.stream)
        if answer is not None:
            try:
                payload = _unary_payload(frame)
            except (StatusError, ProtocolError) as error:
                _fail(answer, error)
            else:
                if not answer.done():
                    answer.set_result(payload)
            return
        stream = self._streams.get(frame.stream)
        if stream is not None:
            try:
                _deliver(stream, frame)
            except (StatusError, ProtocolError) as error:
                stream.close_with(error)


def _deliver(stream: ClientStream[Any, Any], frame: Frame | Oversize) -> None:
    if isinstance(frame, Oversize):
        raise too_large(frame.size)
    if frame.kind == frames.RESPONSE:
        payload = _unary_payload(frame)
        if payload or not stream.server_streams:
            stream.inbox.put(payload)
        stream.close_with(None)
    elif frame.kind == frames.DATA:
        if not stream.server_streams:
            raise ProtocolError("the server streams where a single response was expected")
        if not frame.flags & frames.NO_DATA:
            stream.inbox.put(frame.payload)
        if frame.flags & frames.REMOTE_CLOSED:
            stream.close_with(None)


def _unary_payload(frame: Frame | Oversize) -> bytes:
    """Return the payload of a response. Raises StatusError and ProtocolError."""
    if isinstance(frame, Oversize):
        raise too_large(frame.size)
    if frame.kind != frames.RESPONSE:
        raise ProtocolError(f"a frame of kind {frame.kind} instead of a response")
    try:
        response = Response.FromString(frame.payload)
    except DecodeError as error:
        raise ProtocolError(f"the response cannot be decoded: {error}") from error
    if response.status.code != Code.OK:
        raise StatusError(response.status.code, response.status.message, tuple(response.status.details))
    return response.payload


def _envelope(service: str, method: str, payload: bytes, timeout: float | None, metadata: Metadata | None) -> bytes:
    request = Request(
        service=service,
        method=method,
        payload=payload,
        # 0 means no timeout, so one that has passed already is sent as the shortest there is.
        timeout_nano=0 if timeout is None else max(1, int(timeout * 1e9)),
        metadata=[KeyValue(key=key, value=value) for key, values in (metadata or {}).items() for value in values],
    )
    envelope = request.SerializeToString()
    if len(envelope) > frames.MAX_PAYLOAD:
        raise too_large(len(envelope))
    return envelope


def _fail(answer: asyncio.Future[bytes], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
