"""Streams of messages inside a connection: a bounded inbox, and the two ends that a server and a client see."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from google.protobuf.message import DecodeError, Message
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.connection import Connection
from pymicro.ttrpc.status import Code, StatusError

InT = TypeVar("InT", bound=Message)
OutT = TypeVar("OutT", bound=Message)

INBOX_MESSAGES = 64
"""Unread messages of one stream above which the connection is no longer read (Go's streamRecvBufferSize)."""
INBOX_BYTES = frames.MAX_PAYLOAD
"""The same in bytes."""
STALL_SECONDS = 1.0
"""How long one full inbox may hold up its connection before its stream is ended, as in Go's stream.receive."""


class Inbox:
    """The messages of one stream that nobody has read yet. One reader at a time.

    A full inbox stops the reading of the whole connection. After `stall` seconds of that it calls `stalled`,
    which must end the stream, so that one reader who sleeps cannot block the others for ever; None: never.
    """

    def __init__(self, connection: Connection, stalled: Callable[[], None], stall: float | None) -> None:
        self._connection = connection
        self._stalled = stalled
        self._stall = stall
        self._timer: asyncio.TimerHandle | None = None
        self._holding = False
        self._items: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._error: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether no more messages will be put."""
        return self._ended

    def put(self, payload: bytes) -> None:
        self._items.append(payload)
        self._size += len(payload)
        self._wake()
        if not self._holding and self._full():
            self._holding = True
            self._connection.hold()
            if self._stall is not None:
                self._timer = asyncio.get_running_loop().call_later(self._stall, self._stalled)

    def end(self, error: BaseException | None = None) -> None:
        """Let the reader have what is there, then the end of the stream, or `error`."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        self._release()
        self._wake()

    def discard(self) -> None:
        """Forget what is unread: nobody will read it."""
        self._items.clear()
        self._size = 0
        self.end()

    async def get(self) -> bytes | None:
        """Return the next message, None at the end. Raises the error that the stream ended with, again and again."""
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            await self._wait()
        payload = self._items.popleft()
        self._size -= len(payload)
        if self._holding and not self._full():
            self._release()
        return payload

    def _full(self) -> bool:
        return len(self._items) >= INBOX_MESSAGES or self._size >= INBOX_BYTES

    def _release(self) -> None:
        if self._holding:
            self._holding = False
            if self._timer is not None:
                self._timer.cancel()
            self._connection.release()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _wait(self) -> None:
        if self._reader is not None:
            raise RuntimeError("a stream has one reader at a time")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None


class _Stream(Generic[InT, OutT]):
    """What the two ends have in common."""

    def __init__(self, connection: Connection, number: int, incoming: type[InT], stall: float | None) -> None:
        self._connection = connection
        self._number = number
        self._incoming = incoming
        self._may_send = True
        self.inbox = Inbox(connection, self._on_stall, stall)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._number} sending={self._may_send} ended={self.inbox.ended}>"

    async def receive(self) -> InT | None:
        """Return the peer's next message, None when it has sent its last.

        Raises StatusError when the stream ended with one or a message cannot be decoded, and Disconnected.
        """
        payload = await self.inbox.get()
        if payload is None:
            return None
        try:
            return self._incoming.FromString(payload)
        except DecodeError as error:
            raise StatusError(
                Code.INTERNAL, f"a message is no {self._incoming.DESCRIPTOR.full_name}: {error}"
            ) from error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> InT:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message

    async def send(self, message: OutT) -> None:
        """Send one message, when the peer has room. Raises StatusError when it is too large, and Disconnected."""
        await self._connection.writable()
        if not self._may_send:
            raise RuntimeError("this side of the stream is closed, or does not stream")
        payload = message.SerializeToString()
        if len(payload) > frames.MAX_PAYLOAD:
            raise too_large(len(payload))
        self._connection.send(self._number, frames.DATA, 0, payload)

    def _on_stall(self) -> None:
        raise NotImplementedError


class ServerStream(_Stream[InT, OutT]):
    """The server's end, which a StreamMethod's handler gets: InT are the client's messages."""

    def __init__(
        self,
        connection: Connection,
        number: int,
        incoming: type[InT],
        *,
        may_send: bool,
        stall: float | None,
        abort: Callable[[StatusError], None],
    ) -> None:
        super().__init__(connection, number, incoming, stall)
        self._may_send = may_send
        self._abort = abort

    def _on_stall(self) -> None:
        self._abort(stream_full())

    def finish(self) -> None:
        """Send nothing more: the handler is done."""
        self._may_send = False
        self.inbox.discard()


class ClientStream(_Stream[InT, OutT]):
    """The client's end: InT are the server's messages. Use it as `async with`, which gives the stream up at the end."""

    def __init__(
        self,
        connection: Connection,
        number: int,
        incoming: type[InT],
        *,
        client_streams: bool,
        server_streams: bool,
        stall: float | None,
        forget: Callable[[int], None],
    ) -> None:
        super().__init__(connection, number, incoming, stall)
        self._may_send = client_streams
        self.server_streams = server_streams
        self._forget = forget

    async def close_send(self) -> None:
        """Tell the server that nothing more will be sent. Raises Disconnected."""
        if self._may_send:
            await self._connection.writable()
            self._half_close()

    def close(self) -> None:
        """Give the stream up.

        ttrpc cannot cancel one: the server sees the end of our messages, and its own are dropped.
        """
        if self._may_send and not self.inbox.ended and not self._connection.closing:
            self._half_close()
        self._may_send = False
        self._forget(self._number)
        self.inbox.discard()

    def _half_close(self) -> None:
        self._may_send = False
        self._connection.send(self._number, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA, b"")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _on_stall(self) -> None:
        self.close_with(stream_full())

    def close_with(self, error: BaseException | None) -> None:
        """End the stream on this side: the reader gets what is there, then the end or `error`."""
        self._may_send = False
        self._forget(self._number)
        self.inbox.end(error)


def too_large(size: int) -> StatusError:
    """Return the error for a message of `size` bytes, which the peer would refuse."""
    return StatusError(
        Code.RESOURCE_EXHAUSTED, f"message length {size} exceeds maximum message size of {frames.MAX_PAYLOAD}"
    )


def stream_full() -> StatusError:
    """Return the error for a stream whose messages nobody read for too long."""
    return StatusError(Code.RESOURCE_EXHAUSTED, "stream buffer full: its messages were not read in time")
