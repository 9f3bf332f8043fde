"""Logging of the daemon: lines as containerd's own shims write them, to the bundle's `log` FIFO, never blocking."""

import json
import logging
import os
from contextlib import suppress
from datetime import UTC, datetime

from pymicro.shim import early

TIMELINE = "pymicro.shim.timeline"
"""The logger whose messages are JSON and stay as they are, for programs to read."""


class FifoHandler(logging.Handler):
    """Writes each record as one line to file descriptor 2. A line that does not fit into the pipe is dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write `record`."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        line = text if record.name == TIMELINE else quoted(text)
        with suppress(OSError):
            os.write(2, f'time="{moment}" level={record.levelname.lower()} runtime=pymicro msg={line}\n'.encode())


def quoted(text: str) -> str:
    """Return `text` in double quotes on one line, as logfmt has it.

    Control characters are escaped: a guest's words, which a message may quote, must not look like a line of their own.
    """
    return json.dumps(text)


def set_up(level: str) -> None:
    """Send everything at `level` and above to containerd, and what has been said before."""
    logging.basicConfig(level=level.upper(), handlers=[FifoHandler()], force=True)
    early.release()
