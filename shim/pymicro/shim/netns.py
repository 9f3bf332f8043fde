"""The pod's network namespace: the one that the spec names, or a new one that lives as long as we hold it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pymicro.shim import syscalls
from pymicro.shim.errors import InvalidRequest, Unsupported

HOST_NETWORK = "a VM has no part in the host's network (--net-host, --network host, hostNetwork); use a CNI network"


@contextmanager
def pod_netns(path: str) -> Iterator[int]:
    """Yield a file descriptor of the namespace at `path`, or of a new one for "".

    Raises InvalidRequest, and Unsupported for the host's own: Docker before 26 names that by a path.
    """
    fd = _open(path) if path else _create()
    try:
        yield fd
    finally:
        os.close(fd)


def _open(path: str) -> int:
    try:
        if os.path.samefile(path, "/proc/self/ns/net"):
            raise Unsupported(f"{path!r} is the host's network namespace: {HOST_NETWORK}")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(f"cannot open the network namespace {path!r}: {error.strerror}") from error


def _create() -> int:
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        try:
            return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            syscalls.setns(own, syscalls.CLONE_NEWNET)
    finally:
        os.close(own)
