"""The streams of one process on the host, as one thing: opened together, drained, closed."""

import asyncio
from contextlib import suppress

from pymicro.shim.destination import open_output
from pymicro.shim.input import Input
from pymicro.shim.output import Output
from pymicro.shim.requests import StdioPaths


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
