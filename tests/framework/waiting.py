"""Waiting for what comes in its own time, without guessing how long it takes.

Limits are written for a usual host. One that is slower by far says how much, in PYMICRO_SLOWER; the KVM lab does.
"""

import os
import time
from collections.abc import Callable

SLOWER_VARIABLE = "PYMICRO_SLOWER"
SLOWER = float(os.environ.get(SLOWER_VARIABLE, "1"))
"""How many times as long as on a usual host everything may take."""

TIMEOUT = 30.0


def seconds(usual: float) -> float:
    """Return the limit here for what may take `usual` seconds on a usual host."""
    return usual * SLOWER


def until(holds: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    """Return once `holds()` is true. Raises AssertionError if it is not in `timeout` seconds (of a usual host)."""
    limit = seconds(timeout)
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {limit:.0f} s"
        time.sleep(0.05)
