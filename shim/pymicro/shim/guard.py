"""The guard: the daemon's parent, which frees what a daemon leaves that was killed.

containerd does that by `delete`, but only for a shim that it had reached, and only while it runs itself. The guard
waits all its life, so it is a shell: a Python that waits would hold five megabytes for every pod.
"""

import os
import sys
import time
from contextlib import suppress

from pymicro.shim import freeing, state

GOOD_END = b"\n"
"""What a daemon says on its pipe when nothing is left to be freed. A pipe that closes without is a daemon that died."""
NAME = "pymicro-guard"
"""The guard's first word, by which it is known."""
_SHELL = "/bin/sh"
_WAIT = 'read -r end <&3 || exec "$@"'
_GRACE = 1.0
"""Seconds that containerd's `delete` has before the guard does its work."""


def become_guard(ended: int, directory: str, daemon: int, start_pid: int) -> None:
    """Turn this process, which is in the bundle, into the guard of its child `daemon`; never returns.

    `ended` is the daemon's pipe. Where the record is lost, `lost` finds the daemon by this command line.
    """
    try:
        bundle = os.getcwd()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        pipe = os.dup(ended)
        for fd, source in ((0, null), (1, null), (2, null), (3, pipe)):
            os.dup2(source, fd)
        os.set_inheritable(3, True)  # where the duplicate was 3 already
        os.closerange(4, 1 << 20)  # a listener that stays open would have containerd wait for a dead daemon
        free = [sys.executable, "-m", "pymicro.shim.guard", directory, str(daemon), str(start_pid), bundle]
        os.execv(_SHELL, [NAME, "-c", _WAIT, NAME, *free])  # noqa: S606  # that is the point
    finally:
        os._exit(1)


def free_after(directory: str, daemon: int, start_pid: int, bundle: str) -> None:
    """Free what `daemon`, our child, has left in `directory`, unless that is another's by now."""
    with suppress(ChildProcessError):
        os.waitpid(daemon, 0)
    time.sleep(_GRACE)
    recorded = state.read(directory)
    if recorded.get("shim_pid", daemon) == daemon and recorded.get("start_pid", start_pid) == start_pid:
        tell(bundle, freeing.free(directory, bundle))


def tell(bundle: str, warnings: list[str]) -> None:
    """Write warnings to the log of the shim that served `bundle`, if containerd still reads it."""
    with suppress(OSError):
        log = os.open(os.path.join(bundle, "log"), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for warning in warnings:
                os.write(log, f"pymicro: {warning}\n".encode())
        finally:
            os.close(log)


if __name__ == "__main__":
    free_after(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
