"""Child processes that do not outlive us, whatever ends us."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Ask, as a preexec_fn, for a SIGTERM when the parent is gone: the next builder may then clean up after us."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
