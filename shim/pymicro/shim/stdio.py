"""A process's stdio on the host: FIFOs (or a log file) on one side, the guest's raw streams on the other.

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
import stat
import termios
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from pymicro.shim.channel.base import Channel
from pymicro.shim.errors import InvalidRequest, StepTimeout, Unsupported
from pymicro.shim.requests import StdioPaths

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
_PIPE_SIZE = 1 << 20
_POLL = 0.005


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)

    def ready() -> None:
        if not future.done():
            future.set_result(None)

    add(fd, ready)
    try:
        await future
    finally:
        remove(fd)


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
        except OSError as error:
            logger.warning("an output stream broke after %d bytes: %s", self.relayed, error)

    async def _splice(self, channel: Channel) -> int:
        source, sink = channel.fileno(), self._sink
        while True:
            try:
                return os.splice(source, sink, CHUNK, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
            except BlockingIOError:
                # either side may be the one that blocks: first the source, and once it has data, the sink
                await _ready(source, write=False)
                try:
                    return os.splice(source, sink, CHUNK, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
                except BlockingIOError:
                    await _ready(sink, write=True)
            except ConnectionError:
                return 0
            except OSError as error:
                if error.errno != errno.EINVAL:  # this socket family or kernel cannot splice
                    raise
                self._spliceable = False
                return await self._copy(channel)

    async def _copy(self, channel: Channel) -> int:
        try:
            data = await asyncio.get_running_loop().sock_recv(channel.socket, CHUNK)
        except ConnectionError:
            return 0
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._sink, view) :]
            except BlockingIOError:
                await _ready(self._sink, write=True)
        return len(data)


class Input:
    """stdin: reads the client's FIFO and writes it to the guest's stream.

    The FIFO is opened when the process is about to run, not before: `ctr` drops an end of file that it reads before its
    task exists, and until somebody reads the FIFO its writer waits, so it cannot come to the end too early.
    """

    def __init__(self, path: str) -> None:
        """Take a FIFO's path. Raises InvalidRequest when there is none."""
        if not os.path.exists(path):
            raise InvalidRequest(f"there is no FIFO {path!r} to read stdin from")
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
            if not self._wants_end:
                self._keepalive = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._close_fds()
            raise InvalidRequest(f"cannot open the input {self._path!r}: {error.strerror}") from error
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
            await _ready(self._fd, write=False)
            try:
                moved = os.splice(self._fd, sink, CHUNK, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
            except BlockingIOError:
                await _ready(sink, write=True)
                continue
            except ConnectionError:  # the guest took no more: the process is gone
                moved = 0
            if moved == 0:
                break
            total += moved
        if self._ended is not None:
            self._ended(total)


async def open_output(path: str, timeout: float) -> Output | None:
    """Open a stdout or stderr destination: a FIFO, `file:///path`, or "" for none.

    A FIFO is opened for writing first, which waits for the client's reader, then for reading as well, so that it
    outlives a
    client that goes away and comes back. `timeout` is in seconds. Raises StepTimeout, InvalidRequest, Unsupported.
    """
    if not path:
        return None
    if "://" in path:
        return _open_uri(path)
    try:
        if not stat.S_ISFIFO(os.stat(path).st_mode):
            return Output(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), spliceable=False)
        writer = await _open_fifo_writer(path, timeout)
        keepalive = _open_keepalive(path, os.O_RDONLY, writer)
    except OSError as error:
        raise InvalidRequest(f"cannot open the output {path!r}: {error.strerror}") from error
    with suppress(OSError):  # not permitted beyond the user's pipe quota; the default size then serves
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    return Output(writer, keepalive, spliceable=True)


def _open_uri(uri: str) -> Output:
    parts = urlsplit(uri)
    if parts.scheme != "file":
        raise Unsupported(f"stdio URI {uri!r}: the scheme {parts.scheme!r} is not supported; use a FIFO or file://")
    path = unquote(parts.path)
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InvalidRequest(f"cannot open the log file {path!r}: {error.strerror}") from error
    return Output(fd, spliceable=False)


async def _open_fifo_writer(path: str, limit: float) -> int:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        if loop.time() > deadline:
            raise StepTimeout(f"nobody opened the FIFO {path!r} for reading in {limit:g} s")
        await asyncio.sleep(_POLL)


def _open_keepalive(path: str, mode: int, other: int) -> int:
    """Open the other end of a FIFO of which `other` is open; closes `other` when that fails. Raises OSError."""
    try:
        return os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        os.close(other)
        raise


class Stdio:
    """The streams of one process."""

    def __init__(self, stdin: Input | None, stdout: Output | None, stderr: Output | None) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr

    @classmethod
    async def open(cls, paths: StdioPaths, timeout: float) -> "Stdio":
        """Open everything that `paths` names, or nothing. With a terminal stderr is ignored. Raises as
        open_output().
        """
        stdio = cls(None, None, None)
        try:
            stdio.stdin = Input(paths.stdin) if paths.stdin else None
            stdio.stdout = await open_output(paths.stdout, timeout)
            stdio.stderr = await open_output("" if paths.terminal else paths.stderr, timeout)
        except BaseException:
            stdio.close()
            raise
        return stdio

    async def drain(self, counts: dict[str, int], limit: float) -> None:
        """Wait until the client has read the given number of bytes of each output, at most `limit` seconds."""
        outputs = ((self.stdout, counts["stdout"]), (self.stderr, counts["stderr"]))
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                for output, count in outputs:
                    if output is not None:
                        await output.reached(count)
                        await output.taken()

    async def closed(self, limit: float) -> None:
        """Wait until all outputs have ended, at most `limit` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                for output in (self.stdout, self.stderr):
                    if output is not None:
                        await output.closed()

    def expect_no_streams(self) -> None:
        """The guest is gone: outputs that it has not connected yet end now, so that nobody waits for them."""
        for output in (self.stdout, self.stderr):
            if output is not None:
                output.expect_no_stream()

    def close(self) -> None:
        """Close everything. Idempotent."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
