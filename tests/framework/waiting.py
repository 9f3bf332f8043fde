"""Waiting for what comes in its own time, without guessing how long it takes."""

import time
from collections.abc import Callable

TIMEOUT = 30.0


def until(holds: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    """Return once `holds()` is true. Raises AssertionError if it is not in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {timeout:.0f} s"
        time.sleep(0.05)
