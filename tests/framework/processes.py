"""Which processes and mounts belong to one private containerd, found in /proc, and how to end them.

Its daemon carries the variable PYMICRO_INSTANCE=<directory> in its environment; shims and their helpers inherit it. A
process that drops its environment is still found through its parents.
"""

import os
import signal
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.framework.waiting import seconds

MARK = "PYMICRO_INSTANCE"
END_TIMEOUT = seconds(10)


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc: enough to recognise a process. `started` is in clock ticks after boot."""

    pid: int
    parent: int
    started: int
    command: str
    instance: str | None

    def __str__(self) -> str:
        return f"{self.pid} {self.command[:200]}"


def all_processes() -> dict[int, Process]:
    """Return every process of the host that is not a kernel thread or a zombie, by pid."""
    found = (_read(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {process.pid: process for process in found if process}


def _read(pid: int) -> Process | None:
    directory = Path("/proc") / str(pid)
    try:
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        environment = (directory / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if fields[0] in "ZX" or not command:
        return None
    marks = [item.partition(b"=")[2].decode() for item in environment if item.startswith(f"{MARK}=".encode())]
    return Process(pid, int(fields[1]), int(fields[19]), command, marks[0] if marks else None)


def processes_of(directory: Path) -> list[Process]:
    """Return the processes of the instance in `directory`: those that carry its mark, and all their descendants."""
    everything = all_processes()
    members = {pid for pid, process in everything.items() if process.instance == str(directory)}
    grown = True
    while grown:
        children = {pid for pid, process in everything.items() if process.parent in members} - members
        members |= children
        grown = bool(children)
    members.discard(os.getpid())
    return [everything[pid] for pid in sorted(members)]


def end_processes_of(directory: Path) -> None:
    """Kill all processes of the instance and wait until they are gone. Raises TimeoutError."""
    deadline = time.monotonic() + END_TIMEOUT
    while remaining := processes_of(directory):
        if time.monotonic() > deadline:
            raise TimeoutError("these processes did not end after SIGKILL: " + "; ".join(map(str, remaining)))
        for process in remaining:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)


def mounts_under(directories: Collection[Path], pid: int | str = "self") -> list[str]:
    """Return the mount points at or below `directories` that the process `pid` sees, the oldest first."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return [point for point in points if any(point == str(d) or point.startswith(f"{d}/") for d in directories)]


def mounts_above(directory: Path) -> list[str]:
    """Return the mount points of this process that `directory` lies below."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if str(directory).startswith(f"{point.rstrip('/')}/")]


def unmount_under(directory: Path) -> None:
    """Unmount everything at or below `directory`, the newest first."""
    for point in reversed(mounts_under([directory])):
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
