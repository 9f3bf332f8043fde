"""Logging of the daemon: lines as containerd's own shims write them, to the bundle's `log` FIFO, never blocking."""

import logging
import os
from contextlib import suppress
from datetime import UTC, datetime


class FifoHandler(logging.Handler):
    """Writes each record as one line to file descriptor 2. A line that does not fit into the pipe is dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write `record`."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        line = text if text.startswith("{") else quoted(text)
        with suppress(OSError):
            os.write(2, f'time="{moment}" level={record.levelname.lower()} runtime=pymicro msg={line}\n'.encode())


def quoted(text: str) -> str:
    """Return `text` in double quotes on one line, as logfmt has it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def set_up(level: str) -> None:
    """Send everything at `level` and above to containerd."""
    logging.basicConfig(level=level.upper(), handlers=[FifoHandler()], force=True)
