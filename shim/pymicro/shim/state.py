"""A sandbox's directory and what is recorded in it, so that `freeing` finds everything after any crash.

Imported by `start` and `delete`: only what is small. What a sandbox takes is recorded before it exists;
freeing what was never made is harmless.
"""

import hashlib
import json
import os
import time
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_RUN = "/run/pymicro"
STATE_FILE = "state.json"
VERSION = 1


def key(address: str, namespace: str, sandbox_id: str) -> str:
    """Return 16 hex digits that name a sandbox on this host: ids may be too long for socket paths."""
    return hashlib.sha256(f"{address}\0{namespace}\0{sandbox_id}".encode()).hexdigest()[:16]


def directory(address: str, namespace: str, sandbox_id: str, run: str = DEFAULT_RUN) -> str:
    """Return the run directory of a sandbox."""
    return os.path.join(run, key(address, namespace, sandbox_id))


def write(run_directory: str, state: "dict[str, Any]") -> None:
    """Record `state`, replacing the file in one step."""
    temporary = os.path.join(run_directory, STATE_FILE + ".new")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"version": VERSION, **state}, file)
    os.replace(temporary, os.path.join(run_directory, STATE_FILE))


class Record:
    """What the shim of this process has taken, written to the run directory before it is taken."""

    def __init__(self, run_directory: str, **facts: "Any") -> None:
        """`facts` are JSON of any kind."""
        self.directory = run_directory
        own = {"shim_pid": os.getpid(), "shim_start_time": start_time(os.getpid())}
        self.facts = {**facts, **own, "created_at": time.time()}

    def note(self, **facts: "Any") -> None:
        """Record further facts. Raises OSError."""
        self.facts.update(facts)
        write(self.directory, self.facts)

    def forget(self, **facts: "Any") -> None:
        """Note facts that are fewer by what is gone. A disk that is full is no reason to keep anything: the record says
        too much then, which harms nobody.
        """
        with suppress(OSError):
            self.note(**facts)


def read(run_directory: str) -> "dict[str, Any]":
    """Return what is recorded; an empty dict where there is nothing, or nothing that can be read."""
    try:
        with open(os.path.join(run_directory, STATE_FILE), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def process_stat(pid: int) -> "tuple[str, list[str]]":
    """Return a process's name, and what the kernel says of it from its state on (proc(5), field 3 and later). Raises
    OSError for one that is gone.
    """
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        head, _, rest = file.read().rpartition(")")  # the name may hold anything, parentheses too
    return head.partition("(")[2], rest.split()


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot (proc(5), field 22), 0 if it is gone.

    Together with the pid it names a process for certain: pids are used again.
    """
    try:
        return int(process_stat(pid)[1][19])
    except (OSError, ValueError, IndexError):
        return 0


def shim_runs(state: "dict[str, Any]") -> bool:
    """Tell whether the shim that wrote `state` is alive."""
    pid, started = state.get("shim_pid"), state.get("shim_start_time")
    return isinstance(pid, int) and pid > 1 and bool(started) and start_time(pid) == started
