"""Host cgroups, v1 and v2: where a pod's processes live, so that killing the pod is killing its cgroup.

Imported by `delete`, hence only os and time. Paths are strings for the same reason.
"""

import os
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

ROOT = "/sys/fs/cgroup"
V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "pids", "freezer", "blkio", "devices")
V2_CONTROLLERS = ("cpu", "memory", "pids", "io", "cpuset")
KILL_TIMEOUT = 5.0
"""Seconds after which processes that do not die of SIGKILL are reported instead of waited for."""
DEATH_TIMEOUT = 1.0
"""Seconds that processes may take which die by themselves, as an anchor does with its shim."""


def is_v2(root: str = ROOT) -> bool:
    """Tell whether the host's cgroups are unified (v2 alone): then the root itself has cgroup.controllers."""
    return os.path.exists(f"{root}/cgroup.controllers")


def relative_path(cgroups_path: str, fallback: str) -> str:
    """Return a spec's `cgroupsPath` as a path below the hierarchy's root, without a leading slash.

    systemd's form `slice:prefix:name` becomes the path that systemd would use (systemd.slice(5): a-b.slice lies in
    a.slice), an empty one becomes `fallback`.
    """
    if cgroups_path.count(":") == 2:
        slice_name, prefix, name = cgroups_path.split(":")
        stem = slice_name.removesuffix(".slice")
        parts = stem.split("-") if stem and stem != "-" else []
        slices = ["-".join(parts[: n + 1]) + ".slice" for n in range(len(parts))]
        unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        cgroups_path = "/".join([*slices, unit])
    path = os.path.normpath("/" + (cgroups_path or fallback)).lstrip("/")
    return path or fallback


def directories(relative: str, root: str = ROOT) -> tuple[str, ...]:
    """Return the directory of the cgroup `relative` in every hierarchy that counts on this host."""
    if is_v2(root):
        return (f"{root}/{relative}",)
    present: dict[str, str] = {}
    for controller in V1_CONTROLLERS:
        base = f"{root}/{controller}"
        if os.path.isdir(base):
            present.setdefault(os.path.realpath(base), f"{base}/{relative}")  # cpu and cpuacct may be one hierarchy
    return tuple(present.values())


def is_ours(path: object, root: str = ROOT) -> bool:
    """Tell whether `path` can be what directories() returned: a cgroup below a hierarchy's root, written plainly.

    Killing what is in a root, or wherever `..` leads, would be killing the host.
    """
    if not isinstance(path, str) or not path.startswith(f"{root}/") or path != os.path.normpath(path):
        return False
    return path.count("/") - root.count("/") >= (1 if is_v2(root) else 2)


def create(directories: Iterable[str], root: str = ROOT) -> None:
    """Create the cgroups, enabling controllers (v2) or inheriting cpuset (v1) on the way. Raises OSError."""
    unified = is_v2(root)
    for directory in directories:
        base = root if unified else "/".join(directory.split("/")[: root.count("/") + 2])
        path = base
        for part in os.path.relpath(directory, base).split("/"):
            if unified:
                _enable_controllers(path)
            parent, path = path, f"{path}/{part}"
            with suppress(FileExistsError):
                os.mkdir(path)
            if not unified and os.path.exists(f"{path}/cpuset.cpus"):
                _inherit_cpuset(parent, path)


def _enable_controllers(path: str) -> None:
    for controller in V2_CONTROLLERS:
        with suppress(OSError):  # absent, or the cgroup has processes of its own: that limit then is not to be had here
            _write(f"{path}/cgroup.subtree_control", f"+{controller}")


def _inherit_cpuset(parent: str, path: str) -> None:
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not _read(f"{path}/{name}").strip():
            with suppress(OSError):
                _write(f"{path}/{name}", _read(f"{parent}/{name}"))


def join(directories: Iterable[str]) -> None:
    """Move the calling process into the cgroups. Raises OSError."""
    for directory in directories:
        _write(f"{directory}/cgroup.procs", "0")


def processes(directories: Iterable[str]) -> set[int]:
    """Return the pids in any of the cgroups."""
    found: set[int] = set()
    for directory in directories:
        with suppress(OSError):
            found.update(int(word) for word in _read(f"{directory}/cgroup.procs").split())
    return found - {0}  # what runs in a pid namespace that we cannot see; kill(0) would be our own group


def kill(directories: Sequence[str]) -> set[int]:
    """SIGKILL all processes in the cgroups and wait until they are gone; return the pids that remain after
    KILL_TIMEOUT.
    """
    return _wait(directories, KILL_TIMEOUT, signal.SIGKILL)


def wait(directories: Sequence[str]) -> set[int]:
    """Wait until no process is in the cgroups; return the pids that remain after DEATH_TIMEOUT."""
    return _wait(directories, DEATH_TIMEOUT, 0)  # no signal (kill(2))


def _wait(directories: Sequence[str], limit: float, number: int) -> set[int]:
    deadline = time.monotonic() + limit
    pause = 0.001
    while left := processes(directories):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if time.monotonic() > deadline:
            return left
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return set()


def remove(directories: Iterable[str]) -> list[str]:
    """Remove the cgroups; absent ones are fine. Return those that are left: there are processes in them, or cgroups."""
    left = list(directories)
    for attempt in range(20):
        left = [directory for directory in left if not _removed(directory)]
        if not left:
            break
        time.sleep(0.001 * (attempt + 1))  # the kernel lets go of a dead process a moment after it is reaped (EBUSY)
    return left


def _removed(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def warning(left: Sequence[str]) -> str:
    """Return what there is to say of cgroups that remove() has left."""
    pids = ", ".join(map(str, sorted(processes(left)))) or "none"
    return f"the cgroup {left[0]} cannot be removed; processes in it that do not end: {pids}"


def write_limits(directories: Iterable[str], resources: "dict[str, dict[str, int]]") -> None:
    """Write memory, cpu and pids limits of OCI `linux.resources`, so that host tools see the container's own numbers.

    The limits hold in the guest; here they apply to the container's anchor alone. A file that a host lacks is skipped.
    """
    unified = is_v2()
    values = _v2_limits(resources) if unified else _v1_limits(resources)
    for directory in directories:
        for name, value in values.items():
            if os.path.exists(f"{directory}/{name}"):
                with suppress(OSError):
                    _write(f"{directory}/{name}", value)


def _v1_limits(resources: "dict[str, dict[str, int]]") -> dict[str, str]:
    memory, cpu, pids = (resources.get(name) or {} for name in ("memory", "cpu", "pids"))
    wanted = {
        "memory.limit_in_bytes": memory.get("limit"),
        "memory.soft_limit_in_bytes": memory.get("reservation"),
        "cpu.shares": cpu.get("shares"),
        "cpu.cfs_period_us": cpu.get("period"),
        "cpu.cfs_quota_us": cpu.get("quota"),
        "pids.max": "max" if (pids.get("limit") or 0) < 0 else pids.get("limit"),
    }
    return {name: str(value) for name, value in wanted.items() if value}


def _v2_limits(resources: "dict[str, dict[str, int]]") -> dict[str, str]:
    memory, cpu, pids = (resources.get(name) or {} for name in ("memory", "cpu", "pids"))
    values: dict[str, str] = {}
    if limit := memory.get("limit"):
        values["memory.max"] = str(limit) if limit > 0 else "max"
    if reservation := memory.get("reservation"):
        values["memory.low"] = str(reservation)
    if quota := cpu.get("quota"):
        values["cpu.max"] = f"{quota if quota > 0 else 'max'} {cpu.get('period') or 100000}"
    if shares := cpu.get("shares"):
        # the field's mapping from v1's 2..262144 to v2's 1..10000, so that 1024 stays close to the default weight
        values["cpu.weight"] = str(1 + (max(2, min(shares, 262144)) - 2) * 9999 // 262142)
    if limit := pids.get("limit"):
        values["pids.max"] = str(limit) if limit > 0 else "max"
    return values


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
