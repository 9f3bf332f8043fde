"""A helper process as the event loop sees it: its last lines, its end.

Its output is read into a bounded buffer, so that a chatty guest can fill neither the host's memory nor its disk.
"""

import asyncio
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from pymicro.shim.spawn import LONGEST_LINE, Child, readable

logger = logging.getLogger(__name__)

KEPT_LINES = 80
DEATH_LIMIT = 5.0
"""Seconds that a killed helper is waited for: one that waits in the kernel, for a disk say, lives on."""
_READ_SIZE = 64 * 1024


class LogTail:
    """Reads a pipe as lines and keeps the last KEPT_LINES of them, each cut at LONGEST_LINE characters."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self._fd = fd
        self._partial = b""
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._news = asyncio.Event()
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._read)

    @property
    def lines(self) -> list[str]:
        """The last lines, oldest first, the unfinished one included."""
        return [*self._lines, *([readable(self._partial)] if self._partial.strip() else [])]

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        *whole, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-LONGEST_LINE:]
        for line in whole:
            if text := readable(line):
                self._lines.append(text)
                self._news.set()
                logger.debug("%s: %s", self.name, text)

    async def says(self, text: str) -> bool:
        """Wait until a line has `text` in it; False when the output ends without."""
        while not any(text in line for line in self._lines):
            if self._fd < 0:
                return False
            self._news.clear()
            await self._news.wait()
        return True

    def close(self) -> None:
        """Read what is still buffered and let the pipe go. Idempotent."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        asyncio.get_running_loop().remove_reader(fd)
        with suppress(OSError):
            while data := os.read(fd, _READ_SIZE):
                self._take(data)
        os.close(fd)
        self._news.set()


class Helper:
    """A running helper. `wait()` may be called by any number of tasks, also after the end."""

    def __init__(self, child: Child) -> None:
        """Watch `child` from now on. What it has written so far is in its pipes. Raises HostMissing if it could not be
        started.
        """
        child.check()
        self.name = child.name
        self.pid = child.pid
        self.logs: Sequence[LogTail] = [LogTail(child.name, fd) for fd in child.take_outputs()]
        self._child = child
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pidfd = os.pidfd_open(child.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    def __repr__(self) -> str:
        state = self._exit.result() if self._exit.done() else "running"
        return f"<Helper {self.name} pid={self.pid} {state}>"

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._child.wait()
        for log in self.logs:
            log.close()
        if not self._exit.done():
            self._exit.set_result(status)

    @property
    def running(self) -> bool:
        return not self._exit.done()

    @property
    def last_lines(self) -> list[str]:
        """The last lines of all its outputs."""
        return [line for log in self.logs for line in log.lines]

    async def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        return await asyncio.shield(self._exit)

    def send_signal(self, number: int) -> None:
        """Signal it if it still runs."""
        if self.running:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """End it and reap it. If not even SIGKILL ends it in DEATH_LIMIT seconds it is left, and reaped when it does
        end: the pod's exits are to be reported all the same.
        """
        self.send_signal(signal.SIGKILL)
        await asyncio.wait([self._exit], timeout=DEATH_LIMIT)
        if self.running:
            logger.error("%s (pid %d) lives on %g s after SIGKILL; it is left", self.name, self.pid, DEATH_LIMIT)


@asynccontextmanager
async def watched(child: Child) -> AsyncIterator[Helper]:
    """Yield the helper that `child` is; end it when the context is left."""
    helper = Helper(child)
    try:
        yield helper
    finally:
        await helper.kill()
