"""stdout or stderr of a process: the guest's stream on one side, the client's FIFO, file or pipe on the other.

Bytes are spliced, so they never pass through Python, and nothing is buffered here: a slow reader slows the process
down.
"""

import array
import asyncio
import errno
import fcntl
import logging
import os
import select
import termios

from pymicro.shim.channel.base import Channel
from pymicro.shim.splicing import CHUNK, ready

logger = logging.getLogger(__name__)

_POLL = 0.005


def _unread(fd: int) -> int:
    """Return how many bytes are in a FIFO."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


class Output:
    """stdout or stderr: takes the guest's stream and writes it to the client's FIFO or file."""

    def __init__(self, sink: int, keepalive: int = -1, *, spliceable: bool) -> None:
        """`sink` is written to; `keepalive` is a FIFO's other end, which also tells how much the client has left."""
        self._sink = sink
        self._keepalive = keepalive
        self._spliceable = spliceable
        self.relayed = 0
        self._total: int | None = None
        self._progress = asyncio.Event()
        self._ended = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Output relayed={self.relayed} of {self._total}>"

    @property
    def ended(self) -> bool:
        """Whether nothing more will be written."""
        return self._ended.is_set()

    def start(self, channel: Channel) -> None:
        """Begin to relay `channel`, which is closed at the end."""
        if self._ended.is_set():
            channel.close()
            return
        self._task = asyncio.create_task(self._relay(channel), name="stdio-output")
        # not in a `finally` of the task: one that is cancelled before its first step never enters it
        self._task.add_done_callback(lambda _: self._finish(channel))

    def _finish(self, channel: Channel) -> None:
        channel.close()
        self._end()

    def end_at(self, total: int) -> None:
        """The stream ends after `total` bytes."""
        self._total = total
        if self.relayed >= total:
            self._stop()

    async def reached(self, count: int) -> None:
        """Return when `count` bytes have been relayed or the stream has ended."""
        while self.relayed < count and not self._ended.is_set():
            self._progress.clear()
            await self._progress.wait()

    async def taken(self) -> None:
        """Return when the client has read what is in its FIFO, at once where nobody reads.

        Clients close their FIFOs when they hear of the exit: what they have not read by then is lost.
        """
        while self._keepalive >= 0 and _unread(self._keepalive) and self._has_reader():
            await asyncio.sleep(_POLL)

    def _has_reader(self) -> bool:
        """Tell whether somebody else has the FIFO open for reading: without our own end a writer gets POLLERR."""
        try:
            writer = os.open(f"/proc/self/fd/{self._keepalive}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            self._close_keepalive()
            poller = select.poll()
            poller.register(writer, 0)
            alone = bool(poller.poll(0))
            self._keepalive = os.open(f"/proc/self/fd/{writer}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(writer)
        return not alone

    async def closed(self) -> None:
        """Return when the stream has ended and the client sees its end."""
        await self._ended.wait()

    def close(self) -> None:
        """Stop relaying and close everything. Idempotent."""
        self._closed = True
        self._stop()
        if self._ended.is_set():
            self._close_keepalive()

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self._end()

    def expect_no_stream(self) -> None:
        """No stream comes any more: without one this is the end; one that is here ends by itself."""
        if self._task is None:
            self._end()

    def _end(self) -> None:
        """Let the client see the end of file."""
        if self._sink >= 0:
            os.close(self._sink)
            self._sink = -1
        self._ended.set()
        self._progress.set()
        if self._closed:
            self._close_keepalive()

    def _close_keepalive(self) -> None:
        if self._keepalive >= 0:
            os.close(self._keepalive)
            self._keepalive = -1

    async def _relay(self, channel: Channel) -> None:
        try:
            while self._total is None or self.relayed < self._total:
                moved = await (self._splice(channel) if self._spliceable else self._copy(channel))
                if moved == 0:
                    break
                self.relayed += moved
                self._progress.set()
                await asyncio.sleep(0)  # a guest that writes without a pause is not to keep the loop for itself
        except OSError as error:
            logger.warning("an output stream broke after %d bytes: %s", self.relayed, error)

    async def _splice(self, channel: Channel) -> int:
        while True:
            try:
                if (moved := await self._splice_once(channel.fileno(), self._sink)) is not None:
                    return moved
            except BrokenPipeError as error:
                self._lose_sink(error)
                return await self._copy(channel)
            except ConnectionError:
                return 0
            except OSError as error:
                if error.errno != errno.EINVAL:  # this socket family or kernel cannot splice
                    raise
                self._spliceable = False
                return await self._copy(channel)

    @staticmethod
    async def _splice_once(source: int, sink: int) -> int | None:
        """Move what is there, None if nothing was; then there may be something now."""
        try:
            return os.splice(source, sink, CHUNK, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        except BlockingIOError:
            # either side may be the one that blocks: first the source, and once it has data, the sink
            await ready(source, write=False)
        try:
            return os.splice(source, sink, CHUNK, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        except BlockingIOError:
            await ready(sink, write=True)
        return None

    async def _copy(self, channel: Channel) -> int:
        try:
            data = await asyncio.get_running_loop().sock_recv(channel.socket, CHUNK)
        except ConnectionError:
            return 0
        try:
            await self._write(data)
        except OSError as error:
            self._lose_sink(error)
        return len(data)

    async def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and self._sink >= 0:
            try:
                view = view[os.write(self._sink, view) :]
            except BlockingIOError:
                await ready(self._sink, write=True)

    def _lose_sink(self, error: OSError) -> None:
        """Nobody takes the output any more. It is read all the same, so that the process goes on, and dropped."""
        logger.warning("an output is lost after %d bytes, nobody takes it any more: %s", self.relayed, error.strerror)
        os.close(self._sink)
        self._sink = -1
        self._spliceable = False
