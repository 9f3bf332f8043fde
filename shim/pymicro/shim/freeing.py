"""Freeing whatever a sandbox has left, from its record: `delete` does it, the guard, and a `start` of the same name.

Imported by `start` and `delete`: only what is small.
"""

import fcntl
import os
import select
import signal
import time
from contextlib import suppress

from pymicro.shim import cgroup
from pymicro.shim.state import process_stat, read, shim_runs, start_time, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DEATH_LIMIT = 5.0
"""Seconds that a killed process may take to be gone."""
_FAREWELL = 1.0
"""Seconds that a log binary has to end by itself, and again after SIGTERM."""
_POLL = 0.01


def recorded(run_directory: str, bundle: str = "") -> "dict[str, Any]":
    """Return what a sandbox has taken: its record, and where that is lost or was never finished, what `lost` finds.

    `bundle` is that of one of its containers, where it is known: it helps to find more.
    """
    known = read(run_directory)
    if "shim_pid" in known:
        return known
    from pymicro.shim import lost

    return {**lost.find(run_directory, bundle), **known}


def free(run_directory: str, bundle: str = "", *, keep_socket: bool = False) -> list[str]:
    """Kill what is left of a sandbox and remove all it had. Idempotent, whatever state it is in, and done by one at a
    time: who comes second waits, and finds nothing. Returns what is worth a warning.

    Its containers' poststop hooks run, within their time-outs. While helpers live on, which not even SIGKILL ends, the
    run directory is kept for whoever frees it next. A new shim of the same name needs that place, and keeps the socket:
    it has bound the path anew. `bundle` as for recorded().
    """
    held = hold(run_directory)
    if held < 0:
        return []
    try:
        if not lock(held, run_directory):
            return []
        return free_recorded(run_directory, recorded(run_directory, bundle), keep_socket=keep_socket)
    finally:
        os.close(held)


def free_recorded(run_directory: str, state: "dict[str, Any]", *, keep_socket: bool = False) -> list[str]:
    """Free what `state` says, as free(): for a sandbox that has no run directory any more. Returns warnings."""
    import shutil

    _end_shim(state)
    if "shim_pid" in (last := read(run_directory)):
        state = last  # it may have noted more meanwhile
    helpers, containers = _cgroups(state, "cgroups"), _cgroups(state, "container_cgroups")
    cgroup.kill(helpers)
    cgroup.wait(containers)  # not ours alone: nobody is killed there
    left = cgroup.remove([*helpers, *containers])
    kept = not keep_socket and cgroup.processes(helpers)
    warnings = [cgroup.warning(left)] if left else []
    _end_loggers(state)
    if not keep_socket:
        _remove_socket(state.get("socket"))
    for path in _half_made_templates(state):
        shutil.rmtree(path, ignore_errors=True)
    warnings += _run_poststop(run_directory, state)
    if not kept:
        shutil.rmtree(run_directory, ignore_errors=True)
    return warnings


def lives_on(state: "dict[str, Any]") -> bool:
    """Tell whether there are processes in the helpers' cgroup of a sandbox that has ended."""
    return bool(cgroup.processes(_cgroups(state, "cgroups")))


def hold(run_directory: str) -> int:
    """Return a descriptor of a sandbox's run directory, -1 where there is none. While it is open no other directory can
    be taken for that one, whatever lies at its path.
    """
    try:
        return os.open(run_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def lock(held: int, run_directory: str) -> bool:
    """Wait until nobody else frees the sandbox that hold() was asked for; tell whether there is something left to free.
    If not, what lies at its path is a new sandbox's.
    """
    fcntl.flock(held, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(held), os.stat(run_directory))
    return False


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


def _end_loggers(state: "dict[str, Any]") -> None:
    """End the log binaries of a shim that is gone. They see the end of their outputs, and have a second for it."""
    recorded = state.get("loggers")
    if not isinstance(recorded, dict):
        return
    deadline = time.monotonic() + _FAREWELL
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        left = [int(pid) for pid, started in recorded.items() if _is_logger(pid, started)]
        for pid in left if number else ():
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
        while left and time.monotonic() < deadline:
            left = [pid for pid in left if _lives(pid)]
            time.sleep(_POLL if left else 0)
        deadline += _FAREWELL


def _is_logger(pid: str, started: object) -> bool:
    return pid.isdecimal() and int(pid) > 1 and bool(started) and start_time(int(pid)) == started and _lives(int(pid))


def _lives(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return process_stat(pid)[1][0] not in {"Z", "X"}
    except (OSError, IndexError):
        return False


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
    """Remove `path` if it is a socket that nobody listens at any more: never another file, whatever the record says."""
    with suppress(OSError, ValueError):
        if isinstance(path, str) and os.path.lexists(path):
            from pymicro.shim.sockets import remove_dead

            remove_dead(path)
