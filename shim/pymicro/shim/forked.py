"""The first lines of a forked child that is to become another program."""

import os
import signal

from pymicro.shim import syscalls


def reset_signals() -> None:
    """Take back what the shim has set: Python's own handlers, and the event loop's."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def die_with(parent: int) -> None:
    """End when `parent`, which has forked us, does, also if it has already. Raises OSError."""
    syscalls.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
