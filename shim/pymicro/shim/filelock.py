"""A lock on a path: held by one process, gone with it, and no file stays behind when it is let go."""

import fcntl
import os
from typing import Self


class FileLock:
    """A lock that is held. A context that releases it."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    def __repr__(self) -> str:
        return f"<FileLock {self._path} {'held' if self._fd >= 0 else 'released'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Remove the file while it is still ours, then let go. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                if _lies_at(fd, self._path):
                    os.unlink(self._path)
            finally:
                os.close(fd)


def try_lock(path: str) -> FileLock | None:
    """Return the lock on `path`, or None if somebody has it. Raises OSError.

    Whoever opened the file before its holder removed it locks a file that nobody else will ever find: so it is looked
    at again once it is locked.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _lies_at(fd, path):
                fd, ours = -1, fd
                return FileLock(path, ours)
        except BlockingIOError:
            return None
        finally:
            if fd >= 0:
                os.close(fd)


def _lies_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
