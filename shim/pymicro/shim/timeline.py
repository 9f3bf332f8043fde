"""Where the milliseconds of a start go: one JSON line per start in the shim's log."""

import json
import time


class Timeline:
    """Collects the phases of one start. Phases of the boot run beside those of Create; `total` is wall time."""

    def __init__(self, begun_ns: int) -> None:
        """`begun_ns` is CLOCK_MONOTONIC at the shim's first line, nanoseconds."""
        self._begun = begun_ns
        self._phases: dict[str, float] = {}

    def span(self, name: str, begun_ns: int, ended_ns: int | None = None) -> int:
        """Record the phase `name`, which began at `begun_ns` and ends now; return now (CLOCK_MONOTONIC ns)."""
        now = time.monotonic_ns() if ended_ns is None else ended_ns
        self._phases[name] = round((now - begun_ns) / 1e6, 1)
        return now

    def record(self, name: str, milliseconds: float) -> None:
        """Record a phase that somebody else has measured."""
        self._phases[name] = round(milliseconds, 1)

    def log(self, container_id: str, **facts: object) -> None:
        """Write the line."""
        total = round((time.monotonic_ns() - self._begun) / 1e6, 1)
        line = {"pymicro": "start", "container": container_id, **facts, "total_ms": total, "phases_ms": self._phases}
        import logging

        logging.getLogger(__name__).info("%s", json.dumps(line))
