"""What one process holds: memory, open files, threads, as proc(5) tells."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HOG = ("dd", "if=/dev/zero", "of=/dev/null", "bs=96M", "count=1")
"""A command that takes 96 MiB of memory at once."""

_INTERVAL = 0.2


def pss(pid: int) -> float:
    """Return the memory that a process takes, its part of what it shares with others included, in MB."""
    found = re.search(r"^Pss: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024 / 1e6


def open_files(pid: int) -> list[str]:
    """Return what each descriptor of a process leads to, sorted; numbers of sockets and pipes are left out."""
    found = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(re.sub(r"\d+", "N", os.readlink(file)))
    return sorted(found)


def threads(pid: int) -> int:
    """Return the number of a process's threads."""
    return len(os.listdir(f"/proc/{pid}/task"))


@dataclass
class Peak:
    """The most memory that a process has taken while it was watched, in MB."""

    pss: float = 0.0


@contextmanager
def peak(pid: int) -> Iterator[Peak]:
    """Look at a process's memory again and again until the block ends."""
    found, ended = Peak(pss(pid)), threading.Event()

    def look() -> None:
        while not ended.wait(_INTERVAL):
            found.pss = max(found.pss, pss(pid))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        ended.set()
        looking.join()
