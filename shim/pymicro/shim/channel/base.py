"""A connection that the guest opened to the host: a connected stream socket, non-blocking, on the running loop.

Whatever the transport (AF_VSOCK, the hybrid unix socket, a socket pair in tests), a Channel is the same: stdio
splices its file descriptor, the agent client reads frames from it.
"""

import asyncio
import socket
from typing import Protocol

from pymicro.wire import frames


class ChannelClosed(ConnectionError):
    """The peer closed the connection in the middle of what we expected."""


class Channel:
    """One connection. Not for concurrent readers."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected

    def __repr__(self) -> str:
        return f"<Channel fd={self.socket.fileno()}>"

    def fileno(self) -> int:
        return self.socket.fileno()

    async def read_exactly(self, size: int) -> bytes:
        """Return `size` bytes, never reading one more. Raises ChannelClosed when the peer closes before, OSError."""
        loop = asyncio.get_running_loop()
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = await loop.sock_recv_into(self.socket, view[filled:])
            if count == 0:
                raise ChannelClosed(f"the peer closed the connection after {filled} of {size} bytes")
            filled += count
        return bytes(data)

    async def read_message(self, most: int = frames.MAX_FROM_GUEST) -> dict[str, object]:
        """Return the next frame's message, of `most` bytes at most. Raises ChannelClosed, frames.FrameError, OSError.

        Others have their turn first: a peer that writes without a pause is not to keep the loop for itself.
        """
        await asyncio.sleep(0)
        prefix = await self.read_exactly(frames.PREFIX_SIZE)
        return frames.decode(await self.read_exactly(frames.payload_size(prefix, most)))

    async def write(self, data: bytes) -> None:
        """Send all of `data`. Raises OSError."""
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    def close(self) -> None:
        self.socket.close()


class Listener(Protocol):
    """Takes the connections that one VM's guest opens."""

    async def accept(self) -> Channel:
        """Return the next connection. Raises OSError when the listener is closed."""

    def close(self) -> None:
        """Stop listening and free the address. Idempotent."""
