"""A terminal of our own with a program on it: send keys, wait for text, change its size."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from tests.framework.waiting import seconds

TIMEOUT = 60.0


class Terminal:
    """A child process whose controlling terminal is the other end of a pty that we hold."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], *, rows: int, columns: int) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(rows, columns)
        self.output = b""
        self.process = subprocess.Popen(
            argv,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - the only way to SIGWINCH
        )
        os.close(theirs)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size, as dragging a window's edge does; the program gets SIGWINCH."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text: str) -> None:
        """Type `text`."""
        os.write(self._ours, text.encode())

    def expect(self, text: str, timeout: float = TIMEOUT) -> str:
        """Read until `text` appears, and return and consume everything up to its end. Raises AssertionError."""
        wanted = text.encode()
        timeout = seconds(timeout)
        deadline = time.monotonic() + timeout
        while wanted not in self.output:
            if not self._read(deadline):
                raise AssertionError(f"{text!r} did not appear in {timeout:.0f} s; the terminal shows {self.output!r}")
        before, _, self.output = self.output.partition(wanted)
        return (before + wanted).decode(errors="replace")

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Read everything until the program ends and return its exit code. Raises TimeoutExpired."""
        deadline = time.monotonic() + seconds(timeout)
        while self._read(deadline):
            pass
        status = self.process.wait(max(deadline - time.monotonic(), 1))
        self.close()
        return status

    def close(self) -> None:
        """Hang up."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    def _read(self, deadline: float) -> bool:
        """Add what arrives to `output`; return whether more may come before the deadline."""
        ready, _, _ = select.select([self._ours], [], [], max(deadline - time.monotonic(), 0))
        data = b""
        if ready:
            with suppress(OSError):  # EIO: the program has closed its end
                data = os.read(self._ours, 65536)
        self.output += data
        return bool(data)
