"""The streams of one process on the host, as one thing: opened together, drained, closed."""

import asyncio
from contextlib import suppress

from pymicro.shim.destination import open_output
from pymicro.shim.input import Input
from pymicro.shim.logbinary import LogBinary, LogOwner, is_log_binary
from pymicro.shim.output import Output
from pymicro.shim.requests import StdioPaths


class Stdio:
    """The streams of one process."""

    def __init__(self) -> None:
        self.stdin: Input | None = None
        self.stdout: Output | None = None
        self.stderr: Output | None = None
        self._loggers: dict[str, LogBinary] = {}

    @classmethod
    async def open(cls, paths: StdioPaths, timeout: float, owner: LogOwner) -> "Stdio":
        """Open everything that `paths` names, or nothing. With a terminal stderr is ignored. Log binaries are told that
        they serve `owner`. Raises as open_output() and LogBinary.start().
        """
        stdio = cls()
        try:
            await stdio._open(paths, "" if paths.terminal else paths.stderr, timeout, owner)
        except BaseException:
            stdio.close()
            for binary in stdio._loggers.values():
                binary.kill()
            raise
        return stdio

    async def _open(self, paths: StdioPaths, stderr: str, timeout: float, owner: LogOwner) -> None:
        self.stdin = Input(paths.stdin) if paths.stdin else None
        for uri in filter(is_log_binary, dict.fromkeys((paths.stdout, stderr))):  # the same one takes both
            self._loggers[uri] = binary = await LogBinary.start(uri, owner, timeout)
            if uri == paths.stdout:
                self.stdout = binary.stdout
            else:
                binary.stdout.close()
            if uri == stderr:
                self.stderr = binary.stderr
            else:
                binary.stderr.close()
        if self.stdout is None:
            self.stdout = await open_output(paths.stdout, timeout)
        if self.stderr is None:
            self.stderr = await open_output(stderr, timeout)

    async def drain(self, stdout: int, stderr: int, limit: float) -> None:
        """Wait until the client has read so many bytes of each output, at most `limit` seconds."""
        outputs = ((self.stdout, stdout), (self.stderr, stderr))
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                for output, count in outputs:
                    if output is not None:
                        await output.reached(count)
                        await output.taken()

    @property
    def _outputs(self) -> list[Output]:
        return [output for output in (self.stdout, self.stderr) if output is not None]

    async def closed(self, limit: float) -> None:
        """Wait until all outputs have ended, at most `limit` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                for output in self._outputs:
                    await output.closed()

    async def drain_rest(self, limit: float) -> None:
        """The guest is gone: wait until the client has read what is on the way, at most `limit` seconds."""
        self.expect_no_streams()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                for output in self._outputs:
                    await output.closed()
                    await output.taken()

    def expect_no_streams(self) -> None:
        """Outputs that the guest has not connected yet end now, so that nobody waits for them."""
        for output in self._outputs:
            output.expect_no_stream()

    def close(self) -> None:
        """Close everything. Idempotent."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    async def end_log_binaries(self) -> None:
        """Return when no log binary is left; close() has been called. What they hold, they write first. Idempotent."""
        await asyncio.gather(*(binary.end() for binary in self._loggers.values()))
