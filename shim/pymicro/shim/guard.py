"""The guard: the daemon's parent, which frees what a daemon leaves that was killed.

containerd does that by `delete`, but only for a shim that it had reached, and only while it runs itself. The guard
waits all its life, so it is a shell: a Python that waits would hold five megabytes for every pod.
"""

import os
import sys
import time
from contextlib import suppress

from pymicro.shim import freeing

GOOD_END = b"\n"
"""What a daemon says on its pipe when nothing is left to be freed. A pipe that closes without is a daemon that died."""
NAME = "pymicro-guard"
"""The guard's first word, by which it is known."""
_SHELL = "/bin/sh"
_WAIT = 'read -r end <&3 || exec "$@"'
_GRACE = 1.0
"""Seconds that containerd's `delete` has before the guard does its work."""
_HELD = 4
"""The guard's descriptor of the run directory: at that path may be another sandbox's when its time has come."""


def become_guard(ended: int, directory: str, daemon: int) -> None:
    """Turn this process, which is in the bundle, into the guard of its child `daemon`; never returns.

    `ended` is the daemon's pipe. Where the record is lost, `lost` finds the daemon by this command line.
    """
    try:
        bundle = os.getcwd()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        pipe, held = os.dup(ended), freeing.hold(directory)  # each a higher one than the last: no source is overwritten
        for fd, source in ((0, null), (1, null), (2, null), (3, pipe), (_HELD, held)):
            os.dup2(source, fd)
        os.closerange(_HELD + 1, 1 << 20)  # a listener that stays open would have containerd wait for a dead daemon
        free = [sys.executable, "-m", "pymicro.shim.guard", directory, str(daemon), bundle]
        os.execv(_SHELL, [NAME, "-c", _WAIT, NAME, *free])  # noqa: S606  # that is the point
    finally:
        os._exit(1)


def free_after(held: int, directory: str, daemon: int, bundle: str) -> None:
    """Free what `daemon`, our child, has left in `directory`, unless `held` is not what lies there any more."""
    with suppress(ChildProcessError):
        os.waitpid(daemon, 0)
    time.sleep(_GRACE)
    if freeing.lock(held, directory):
        tell(bundle, freeing.free_recorded(directory, freeing.recorded(directory, bundle)))


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
    free_after(_HELD, sys.argv[1], int(sys.argv[2]), sys.argv[3])
