"""Where a client wants an output: a FIFO, a file. Opened here, written to by `output`. Log binaries: `logbinary`."""

import asyncio
import errno
import fcntl
import os
import stat
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from pymicro.shim.errors import InvalidRequest, StepTimeout, Unsupported
from pymicro.shim.output import Output
from pymicro.shim.splicing import PIPE_SIZE

_POLL = 0.005
_FILE = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
"""How what is no FIFO is opened. It may be one all the same, or a device, for which no other process must wait."""


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
            return Output(os.open(path, _FILE), spliceable=False)
        writer = await _open_fifo_writer(path, timeout)
        keepalive = _open_keepalive(path, os.O_RDONLY, writer)
    except OSError as error:
        raise InvalidRequest(f"cannot open the output {path!r}: {error.strerror}") from error
    with suppress(OSError):  # not permitted beyond the user's pipe quota; the default size then serves
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return Output(writer, keepalive, spliceable=True)


def _open_uri(uri: str) -> Output:
    parts = urlsplit(uri)
    if parts.scheme != "file":
        raise Unsupported(
            f"stdio URI {uri!r}: the scheme {parts.scheme!r} is not supported; use a FIFO, file:// or binary://"
        )
    path = unquote(parts.path)
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        fd = os.open(path, _FILE | os.O_CREAT, 0o644)
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
