"""The guest's wall clock: behind the host's by no more than the quickest request so far took to get here."""

import time

LEAST_NS = 1_000_000
"""What is less off than this is left alone."""


def follow(host_ns: int, *, back: bool) -> None:
    """Set CLOCK_REALTIME to what the host's was when it sent the request that has just been read, nanoseconds since the
    epoch. Only forward, unless `back`: else a request that took long would make the clock worse, and programs do not
    expect one that goes back. So each quicker request mends it, and so does the first one after the host has slept.

    Raises OSError.
    """
    behind = host_ns - time.time_ns()
    if behind >= LEAST_NS or (back and behind <= -LEAST_NS):
        time.clock_settime_ns(time.CLOCK_REALTIME, host_ns)
