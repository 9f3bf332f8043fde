"""Receiving a terminal from crun: it sends the master's descriptor over a unix socket that we listen on."""

import _socket
from _struct import unpack

ACCEPT_LIMIT = 10.0


def listen(path: str) -> _socket.socket:
    """Return a socket that listens at `path`. Raises OSError."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    listener.bind(path)
    listener.listen(1)
    return listener


def receive(listener: _socket.socket) -> int:
    """Return the terminal's master that crun, which has done its work already, left in the listener's queue.

    Raises OSError, also when none came.
    """
    listener.settimeout(ACCEPT_LIMIT)
    fd, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  # the C half of accept()
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
    try:
        connection.settimeout(ACCEPT_LIMIT)
        flags = _socket.MSG_CMSG_CLOEXEC
        _, ancillary, _, _ = connection.recvmsg(4096, _socket.CMSG_SPACE(4), flags)
    finally:
        connection.close()
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            return int(unpack("i", data[:4])[0])
    raise OSError("crun sent no terminal")
