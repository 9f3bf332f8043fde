"""A sandbox's directory and what is recorded in it, so that `delete` finds everything after any crash.

Imported by `start` and `delete`: only what is small. What a sandbox takes is recorded before it exists;
freeing what was never made is harmless.
"""

import fcntl
import hashlib
import json
import os
import select
import signal
import stat
import time
from contextlib import suppress

from pymicro.shim import cgroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_RUN = "/run/pymicro"
STATE_FILE = "state.json"
VERSION = 1
_DEATH_LIMIT = 5.0
"""Seconds that a killed process may take to be gone."""


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


def read(run_directory: str) -> "dict[str, Any]":
    """Return what is recorded; an empty dict where there is nothing, or nothing that can be read."""
    try:
        with open(os.path.join(run_directory, STATE_FILE), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot (proc(5), field 22), 0 if it is gone.

    Together with the pid it names a process for certain: pids are used again.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def shim_runs(state: "dict[str, Any]") -> bool:
    """Tell whether the shim that wrote `state` is alive."""
    pid, started = state.get("shim_pid"), state.get("shim_start_time")
    return isinstance(pid, int) and pid > 1 and bool(started) and start_time(pid) == started


def free(run_directory: str, *, keep_socket: bool = False) -> list[str]:
    """Kill what is left of a sandbox and remove all it had. Idempotent, whatever state it is in, and done by one at a
    time: who comes second waits, and finds nothing. Returns what is worth a warning.

    Its containers' poststop hooks run, within their time-outs. A new shim of the same name keeps the socket: it has
    bound the path anew.
    """
    import shutil

    lock = _lock(run_directory)
    if lock < 0:
        return []
    try:
        _end_shim(read(run_directory))
        state = read(run_directory)  # what it noted last
        groups = _cgroups(state, "cgroups")
        cgroup.kill(groups)
        cgroup.remove([*groups, *_cgroups(state, "container_cgroups")])  # not ours alone: those are never killed
        if not keep_socket:
            _remove_socket(state.get("socket"))
        for path in _half_made_templates(state):
            shutil.rmtree(path, ignore_errors=True)
        warnings = _run_poststop(run_directory, state)
        shutil.rmtree(run_directory, ignore_errors=True)
    finally:
        os.close(lock)
    return warnings


def _lock(run_directory: str) -> int:
    """Return a descriptor of the directory, locked, or -1 where there is none, or none any more: one that lies there
    after we have waited for the lock is a new sandbox's.
    """
    try:
        fd = os.open(run_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    fcntl.flock(fd, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), os.stat(run_directory)):
            return fd
    os.close(fd)
    return -1


def _end_shim(state: "dict[str, Any]") -> None:
    """Kill the shim that wrote `state` unless it is gone, or ourselves, and wait until it does nothing any more."""
    if not shim_runs(state) or state["shim_pid"] == os.getpid():
        return
    with suppress(OSError):
        pidfd = os.pidfd_open(state["shim_pid"])
        try:
            if shim_runs(state):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], _DEATH_LIMIT)
        finally:
            os.close(pidfd)


def _run_poststop(run_directory: str, state: "dict[str, Any]") -> list[str]:
    """Run the poststop hooks that the shim did not come to. Who is killed meanwhile leaves the rest to the next."""
    owed = state.get("poststop")
    if not owed or not isinstance(owed, dict):
        return []
    from pymicro.shim.hooks import run_owed

    warnings = []
    while owed:
        warnings += run_owed(next(iter(owed.values())))
        owed.pop(next(iter(owed)))
        with suppress(OSError):
            write(run_directory, state)
    return warnings


def _cgroups(state: "dict[str, Any]", name: str) -> list[str]:
    recorded = state.get(name)
    return [path for path in recorded if cgroup.is_ours(path)] if isinstance(recorded, list) else []


def _half_made_templates(state: "dict[str, Any]") -> "list[str]":
    """Return the directories in which the shim was making a template: they hold a VM's memory, on tmpfs."""
    directory, pid = state.get("templates"), state.get("shim_pid")
    if not isinstance(directory, str) or not os.path.isabs(directory) or not isinstance(pid, int):
        return []
    with suppress(OSError), os.scandir(directory) as entries:
        return [each.path for each in entries if each.name.endswith(f".{pid}") and each.is_dir(follow_symlinks=False)]
    return []


def _remove_socket(path: object) -> None:
    """Remove `path` if it is a socket: never another file, whatever the record says."""
    with suppress(OSError, ValueError):
        if isinstance(path, str) and stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
