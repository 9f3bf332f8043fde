"""Log binaries: a client's own program that takes what a process writes (`binary:///path?key=value`, shim logging v2).

It has stdout on its descriptor 3, stderr on 4, and 5 to say that it is ready: by a byte, or by closing it, which a
`binary-v2` must not. It runs as hooks do, on the host and outside of the pod, for it has to see the outputs' end when
the pod is gone. What it is to be found by, if the shim is killed, is in the record.
"""

import asyncio
import fcntl
import logging
import os
import signal
from contextlib import ExitStack, suppress
from urllib.parse import parse_qsl, unquote, urlsplit

from msgspec import Struct
from pymicro.shim import splicing
from pymicro.shim.errors import InvalidRequest, ShimError, StepTimeout
from pymicro.shim.helper import LogTail
from pymicro.shim.hostprogram import Running, launch, outer_namespace
from pymicro.shim.output import Output
from pymicro.shim.state import Record, start_time

logger = logging.getLogger(__name__)

SCHEMES = ("binary", "binary-v2")
_FAREWELL = 1.0
"""Seconds for a log binary to end by itself, once it sees the end of both outputs."""
_TERM_LIMIT = 10.0
"""Seconds between SIGTERM and SIGKILL: containerd's own shims give log binaries that much to write what they hold."""
_SAME_MOMENT = 0.02
"""Seconds between a process's descriptors being closed and its end being told, amply."""


class LogOwner(Struct, frozen=True):
    """Whose output is logged: a container, or an exec by its own id, in a containerd namespace."""

    id: str
    namespace: str
    record: Record


def is_log_binary(uri: str) -> bool:
    """Tell whether an output goes to a log binary."""
    return uri.partition("://")[0] in SCHEMES


def command(uri: str) -> list[str]:
    """Return the command line: the path, then each key and its first value."""
    parts = urlsplit(uri)
    arguments: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        arguments.setdefault(key, value)
    return [unquote(parts.path), *(word for pair in arguments.items() for word in pair)]


class LogBinary:
    """A log binary that runs. `stdout` and `stderr` are to be relayed to it, or closed."""

    def __init__(self, running: Running, owner: LogOwner, path: str, outputs: tuple[int, int], said: int) -> None:
        """Watch `running`; `outputs` are the write ends of its pipes, `said` is what it writes itself."""
        self.stdout, self.stderr = (Output(fd, spliceable=True) for fd in outputs)
        self._running = running
        self._owner = owner
        self._path = path
        self._log = LogTail(os.path.basename(path), said)
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(running.pidfd, self._has_ended)

    def __repr__(self) -> str:
        return f"<LogBinary {self._path} of {self._owner.id} {'ended' if self._ended.is_set() else 'runs'}>"

    @classmethod
    async def start(cls, uri: str, owner: LogOwner, limit: float) -> "LogBinary":
        """Start it and wait until it is ready, at most `limit` seconds.

        Raises InvalidRequest if it cannot be run, StepTimeout, ShimError if it ends instead; then nothing is left.
        """
        binary, is_ready = _launch(uri, owner)
        try:
            binary.record()
            await binary.ready(is_ready, uri, limit)
        except BaseException:
            binary.kill()
            raise
        finally:
            os.close(is_ready)
        return binary

    def record(self) -> None:
        """Note how to find it, should this shim be killed. Raises OSError."""
        self._note(self._loggers | {str(self._running.pid): start_time(self._running.pid)})

    async def ready(self, is_ready: int, uri: str, limit: float) -> None:
        """Return when it has said by the pipe `is_ready` that it is ready. Raises StepTimeout, ShimError."""
        try:
            async with asyncio.timeout(limit):
                await splicing.ready(is_ready, write=False)
        except TimeoutError:
            raise StepTimeout(
                f"the log binary {self._path!r} was not ready in {limit:g} s (timeouts.request): "
                f"it must write to or close its descriptor 5; {self._last_words()}"
            ) from None
        if os.read(is_ready, 1):
            return
        if not uri.startswith("binary-v2:"):
            with suppress(TimeoutError):
                async with asyncio.timeout(_SAME_MOMENT):
                    await self._ended.wait()
            if self._running.peek() in {None, 0}:
                return
        ended = f"ended before it was ready, {self._how()}"
        what = ended if self._ended.is_set() else "closed its descriptor 5 without a word"
        raise ShimError(f"the log binary {self._path!r} {what}; {self._last_words()}")

    def _has_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._running.pidfd)
        self._ended.set()
        self._log.close()
        if not (self.stdout.ended and self.stderr.ended):
            logger.warning(
                "the log binary %r of %s ended, %s, while output may still come: that is lost; %s",
                self._path,
                self._owner.id,
                self._how(),
                self._last_words(),
            )

    async def end(self) -> None:
        """Wait for its end, its outputs are closed: first for nothing, then for SIGTERM, then kill it. Idempotent."""
        for limit, number in ((_FAREWELL, signal.SIGTERM), (_TERM_LIMIT, signal.SIGKILL)):
            with suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await self._ended.wait()
            if self._ended.is_set():
                break
            if number == signal.SIGKILL:
                logger.warning("the log binary %r of %s does not end and is killed", self._path, self._owner.id)
            self._running.signal(number)
        self.kill()

    def kill(self) -> None:
        """Kill it if it still runs, and forget it. Idempotent."""
        if self._running.status is not None:
            return
        self.stdout.close()
        self.stderr.close()
        asyncio.get_running_loop().remove_reader(self._running.pidfd)
        if self._running.peek() == 0:
            self._running.reap()
        else:
            self._running.end()
        self._ended.set()
        self._log.close()
        left = {pid: started for pid, started in self._loggers.items() if pid != str(self._running.pid)}
        self._owner.record.forget(loggers=left)

    @property
    def _loggers(self) -> dict[str, int]:
        loggers: dict[str, int] = self._owner.record.facts.get("loggers", {})
        return loggers

    def _note(self, loggers: dict[str, int]) -> None:
        self._owner.record.note(loggers=loggers)

    def _how(self) -> str:
        status = self._running.peek() or 0
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    def _last_words(self) -> str:
        return f"it said: {' | '.join(self._log.lines[-5:]) or 'nothing'}"


def _launch(uri: str, owner: LogOwner) -> tuple[LogBinary, int]:
    """Return the log binary, which watches itself, and the read end of its ready pipe. Raises InvalidRequest."""
    with ExitStack() as ours, ExitStack() as theirs:

        def pipe(*, we_write: bool) -> tuple[int, int]:
            ends = os.pipe2(os.O_CLOEXEC)
            own, other = reversed(ends) if we_write else ends
            ours.callback(os.close, own)
            theirs.callback(os.close, other)
            return own, other

        stdout_sink, stdout = pipe(we_write=True)
        stderr_sink, stderr = pipe(we_write=True)
        said, says = pipe(we_write=False)
        is_ready, be_ready = pipe(we_write=False)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        theirs.callback(os.close, null)
        for sink in (stdout_sink, stderr_sink):
            os.set_blocking(sink, False)
            with suppress(OSError):  # not permitted beyond the user's pipe quota; the default size then serves
                fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, splicing.PIPE_SIZE)
        argv = command(uri)
        try:
            running = launch(
                argv,
                {"CONTAINER_ID": owner.id, "CONTAINER_NAMESPACE": owner.namespace},
                (null, says, says, stdout, stderr, be_ready),
                namespace=outer_namespace(),
                dies_with_us=False,
            )
        except OSError as error:
            raise InvalidRequest(f"the log binary of {uri!r}: {error}") from error
        ours.pop_all()
    return LogBinary(running, owner, argv[0], (stdout_sink, stderr_sink), said), is_ready
