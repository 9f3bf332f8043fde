"""One connection, either side: bytes to frames, frames to bytes, and back-pressure in both directions."""

import asyncio
import contextvars
from abc import abstractmethod
from asyncio.trsock import TransportSocket

from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.frame import Decoder, Frame, Oversize
from pymicro.ttrpc.status import Disconnected

WRITE_HIGH_WATER = 256 * 1024
"""Unsent bytes above which writers wait (64 KiB, asyncio's default, would hold back every larger message)."""
FLUSH_SECONDS = 1.0
"""How long a closing connection may take to send what it still has."""


class Connection(asyncio.Protocol):
    """The part of a client's and a server's connection that is alike."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Frames that were held back are handled in the connection's own context, not in that of whoever made room.
        self._context = contextvars.copy_context()
        self._decoder = Decoder()
        self._holds = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._closing = False
        self._failure: BaseException | None = None
        self._lost = asyncio.Event()
        self._abort_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        state = "lost" if self._lost.is_set() else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state}>"

    @abstractmethod
    def frame_received(self, frame: Frame | Oversize) -> None:
        """Handle one frame."""

    @abstractmethod
    def ended(self) -> None:
        """No more frames will come: end everything that waits for one. Called once."""

    @property
    def socket(self) -> TransportSocket:
        """The socket below, to ask about its options and addresses only."""
        sock = self.transport.get_extra_info("socket")
        assert isinstance(sock, TransportSocket)
        return sock

    # From the peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        self._decoder.feed(data)
        self._pump()

    def _pump(self) -> None:
        while not self._holds and not self._closing and (frame := self._decoder.next()) is not None:
            self.frame_received(frame)

    def hold(self) -> None:
        """Take no more frames until `release` was called as often as this."""
        self._holds += 1
        if self._holds == 1:
            self.transport.pause_reading()

    def release(self) -> None:
        self._holds -= 1
        if self._holds == 0 and not self._closing:
            self._loop.call_soon(self._resume, context=self._context)

    def _resume(self) -> None:
        if self._holds or self._closing:
            return
        self._pump()
        if not self._holds and not self._closing:
            self.transport.resume_reading()

    def eof_received(self) -> None:
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._failure = self._failure or exc
        self._end()
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        self._lost.set()

    # To the peer

    @property
    def closing(self) -> bool:
        """Whether the connection is closed or about to be."""
        return self._closing

    def send(self, stream: int, kind: int, flags: int, payload: bytes) -> None:
        """Send a frame; buffer what the socket does not take. Raises Disconnected, and ValueError when too large."""
        if self._closing:
            raise self.disconnected()
        self.transport.write(frames.encode(stream, kind, flags, payload))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def writable(self) -> None:
        """Wait until the peer has taken most of what was sent. Raises Disconnected."""
        await self._writable.wait()
        if self._closing:
            raise self.disconnected()

    # The end

    def disconnected(self) -> Disconnected:
        """Return the error for a call that this connection can no longer serve."""
        error = Disconnected(f"the connection is closed: {self._failure or 'end of file'}")
        error.__cause__ = self._failure
        return error

    def fail(self, error: BaseException) -> None:
        """Close the connection because of `error`, which its calls then report."""
        self._failure = self._failure or error
        self.close()

    def close(self) -> None:
        """Take and send nothing more; what was sent before still goes out, for up to FLUSH_SECONDS."""
        if self._closing:
            return
        self._end()
        self.transport.close()
        if not self._lost.is_set():
            self._abort_timer = self._loop.call_later(FLUSH_SECONDS, self.transport.abort)

    def _end(self) -> None:
        if not self._closing:
            self._closing = True
            self._writable.set()  # whoever waits there learns of the end
            self.ended()

    async def wait_lost(self) -> None:
        """Wait until the socket is closed."""
        await self._lost.wait()
