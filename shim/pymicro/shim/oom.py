"""Whom the host's kernel ends first when its memory runs out: oom_score_adj, -1000 (never) to 1000 (first), proc(5).

The workload is in the VM, so its pod's VMM and helpers are what the host can end in its place.
"""

from collections.abc import Iterable
from contextlib import suppress


def adjust(pids: Iterable[int], score: int) -> None:
    """Give these processes this score; those that have ended meanwhile are none."""
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(score))
