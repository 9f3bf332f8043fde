"""The socket that a sandbox's shim listens at: its path, and who has it. Imported by `start`: only what is small."""

import fcntl
import hashlib
import os
import socket
import stat
import struct
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio.trsock import TransportSocket
    from collections.abc import Iterator

DIRECTORY = "/run/containerd/s"
"""Where containerd's own shims have theirs; containerd 2.3 can name another directory (`socket_dir`)."""
LONGEST_PATH = 107
"""Bytes of a unix socket's path (sun_path in unix(7) has 108 with the NUL)."""
_BACKLOG = 128


def path(address: str, namespace: str, sandbox_id: str, directory: str = "") -> str:
    """Return where the sandbox's shim listens: the place that containerd's own shims use.

    `directory` is the one that containerd has named, "" for the usual one. Raises ValueError where it is too long, or
    relative.
    """
    directory = directory.rstrip("/") or DIRECTORY
    if not os.path.isabs(directory):
        raise ValueError(f"containerd's socket_dir {directory!r} is no absolute path")
    name = hashlib.sha256(f"{address}/{namespace}/{sandbox_id}".encode()).hexdigest()
    if len(os.fsencode(directory)) + 1 + len(name) > LONGEST_PATH:
        raise ValueError(
            f"the socket directory {directory} is too long: with the socket's name, of {len(name)} bytes, Linux takes"
            f" {LONGEST_PATH} bytes, so containerd's socket_dir may have {LONGEST_PATH - 1 - len(name)}"
        )
    return f"{directory}/{name}"


def bind(path: str) -> socket.socket | None:
    """Return a socket that listens at `path`, or None when a shim of ours listens there already.

    A leftover socket that nobody listens at is replaced. Raises OSError.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with _alone(path):
        if os.path.lexists(path):
            if answers(path):
                return None
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        return listener


def remove_dead(path: str) -> None:
    """Remove a socket unless somebody listens there, as a new shim of the same name may do: never another file. Raises
    OSError.
    """
    with _alone(path):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not answers(path):
            os.unlink(path)


@contextmanager
def _alone(path: str) -> "Iterator[None]":
    """Hold the lock under which sockets in the directory of `path` come and go. Raises OSError."""
    lock = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def answers(path: str) -> bool:
    """Tell whether a process of our own user listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except BlockingIOError:  # so many wait already (unix(7), EAGAIN), and it may never take them
            return os.lstat(path).st_uid == os.geteuid()
        except OSError:
            return False
        return same_user(client)


def same_user(peer: "socket.socket | TransportSocket") -> bool:
    """Tell whether the process at the other end of a unix socket runs as our own user (SO_PEERCRED, unix(7)).

    Only the user who runs a shim may command it: the socket's mode says so, and so do the peer's credentials.
    """
    size = struct.calcsize("3i")
    _pid, uid, _gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(uid == os.geteuid())
