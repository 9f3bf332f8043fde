"""stdin of a process: the client's FIFO on one side, the guest's stream on the other. Spliced, like output."""

import asyncio
import os
from collections.abc import Callable

from pymicro.shim.channel.base import Channel
from pymicro.shim.errors import InvalidRequest
from pymicro.shim.splicing import CHUNK, ready


class Input:
    """stdin: reads the client's FIFO and writes it to the guest's stream.

    The FIFO is opened when the process is about to run, not before: `ctr` drops an end of file that it reads before its
    task exists, and until somebody reads the FIFO its writer waits, so it cannot come to the end too early.
    """

    def __init__(self, path: str) -> None:
        """Take a FIFO's path. Raises InvalidRequest when there is none."""
        if not os.path.exists(path):
            raise InvalidRequest(f"there is no FIFO {path!r} to read stdin from; no other kind of stdin is supported")
        self._path = path
        self._fd = -1
        self._keepalive = -1
        self._wants_end = False
        self._closed = False
        self._channel: Channel | None = None
        self._ended: Callable[[int], None] | None = None
        self._task: asyncio.Task[None] | None = None

    def connect(self, channel: Channel, ended: Callable[[int], None]) -> None:
        """Take the guest's stream; `ended` is called with the number of bytes at the end of file."""
        self._channel, self._ended = channel, ended
        self._begin()

    def open(self) -> None:
        """Open the client's FIFO, with a writer of our own so that it outlives a client. Raises InvalidRequest."""
        if self._fd >= 0 or self._task is not None:
            return  # a second attempt to start the process
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            # also for an end that is wanted already: a FIFO that never had a writer has no end
            self._keepalive = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._close_fds()
            raise InvalidRequest(f"cannot open the input {self._path!r}: {error.strerror}") from error
        if self._wants_end:
            self.close_writer()
        self._begin()

    def _begin(self) -> None:
        if self._closed:
            self._close_channel()
        elif self._channel is not None and self._fd >= 0 and self._task is None:
            self._task = asyncio.create_task(self._relay(self._channel), name="stdio-input")
            # not in a `finally` of the task: one that is cancelled before its first step never enters it
            self._task.add_done_callback(lambda _: self._relayed())

    def _relayed(self) -> None:
        self._close_fds()
        if self._closed:
            self._close_channel()
        elif self._channel is not None:
            # the guest closes its side after it has taken the last byte; ours stays open until then (wire.messages)
            asyncio.get_running_loop().add_reader(self._channel.fileno(), self._close_channel)

    def _close_channel(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None

    def close_writer(self) -> None:
        """Close our own writer of the FIFO: once the client's is closed too, the process sees end of file.
        Idempotent.
        """
        self._wants_end = True
        if self._keepalive >= 0:
            os.close(self._keepalive)
            self._keepalive = -1

    def close(self) -> None:
        """Stop relaying and close, also the guest's stream: its process is gone. Idempotent."""
        self._closed = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
        else:
            self._relayed()

    def _close_fds(self) -> None:
        self.close_writer()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def _relay(self, channel: Channel) -> None:
        total, sink = 0, channel.fileno()
        while True:
            await ready(self._fd, write=False)
            try:
                moved = os.splice(self._fd, sink, CHUNK, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
            except BlockingIOError:
                await ready(sink, write=True)
                continue
            except ConnectionError:  # the guest took no more: the process is gone
                moved = 0
            if moved == 0:
                break
            total += moved
        if self._ended is not None:
            self._ended(total)
