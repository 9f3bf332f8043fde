"""What belongs to a sandbox whose record is lost, or was never finished: found by what bears its run directory's name.

Imported only then: it looks at every process of the host. What it finds has the form of the record, so that `freeing`
need not know the difference.

- The guard's command line names the run directory and the daemon. Without a guard, the daemon is the one that leads a
  session among those whose mount namespace has the pod's share. Its anchors are in there too, its log binaries are its
  other children.
- The helpers' cgroup is named after the run directory. It says which processes to kill.
- The share has a folder for each container, named after it; beside the bundle lie those of the pod's other containers.
  They say which cgroups the containers had, and which poststop hooks are owed: the folder goes before the hooks run.

Not found are log binaries whose shim is dead, which end by themselves when they see the end of their pipes, and
half-made templates, which whoever makes the next one removes.
"""

import json
import os
import stat
from contextlib import suppress

from pymicro.shim import cgroup, guard
from pymicro.shim.state import process_stat, start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ANCHOR = "pymicro-anchor"  # anchor.NAME, whose module takes asyncio
_HOOK_LIMIT = 20.0
"""Seconds for a hook without a time-out: the default of the setting `timeouts.hook`, whose file is not read here."""
_SOCKET_NAME = 64
"""Hexadecimal digits in the name of a shim's socket."""


class _Process:
    """A process of the host. Raises OSError for one that is gone, or no process at all."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.name, words = process_stat(pid)
        self.parent, self.session = int(words[1]), int(words[3])  # proc(5), fields 4 and 6
        self.namespace = os.readlink(f"/proc/{pid}/ns/mnt")


def find(run_directory: str, bundle: str = "") -> "dict[str, Any]":
    """Return what the record of the sandbox with this run directory would say, an empty dict if there is nothing.

    `bundle` is that of one of its containers, where it is known.
    """
    everything = _processes()
    pod = _in_namespace_of_share(run_directory, everything)
    daemon = _guarded(run_directory, everything) or _leader(pod)
    containers = _containers(run_directory)
    bundles = {each: os.path.join(os.path.dirname(bundle.rstrip("/")), each) for each in containers} if bundle else {}
    found: dict[str, Any] = {
        "containers": sorted(containers),
        "cgroups": _helpers_cgroups(f"pymicro-{os.path.basename(run_directory)}", pod),
        "container_cgroups": _container_cgroups(pod, bundle, bundles),
        "socket": _socket(bundle),
        "poststop": {each: owed for each, path in bundles.items() if (owed := _poststop(each, path))},
    }
    if daemon:
        found |= {"shim_pid": daemon, "shim_start_time": start_time(daemon)}
        loggers = [each.pid for each in everything.values() if each.parent == daemon and each.pid not in pod]
        found["loggers"] = {str(pid): start_time(pid) for pid in loggers}
    return {name: value for name, value in found.items() if value}


def _processes() -> dict[int, _Process]:
    """Return the processes of the host."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                found[int(name)] = _Process(int(name))
    return found


def _in_namespace_of_share(run_directory: str, everything: dict[int, _Process]) -> dict[int, _Process]:
    """Return the processes that see the pod's share as a mount: nobody else does."""
    own = os.readlink("/proc/self/ns/mnt")
    seen: dict[str, bool] = {own: False}
    share = f" {run_directory}/share "
    for each in everything.values():
        if each.namespace not in seen:
            with suppress(OSError), open(f"/proc/{each.pid}/mountinfo", encoding="utf-8", errors="replace") as file:
                seen[each.namespace] = any(share in line for line in file)
    return {pid: each for pid, each in everything.items() if seen.get(each.namespace)}


def _guarded(run_directory: str, everything: dict[int, _Process]) -> int:
    """Return the pid of the daemon that a guard of this run directory names, 0 without one."""
    for pid in everything:
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
            if words[0] == os.fsencode(guard.NAME):
                daemon = int(words[words.index(os.fsencode(run_directory)) + 1])
                if daemon in everything and everything[daemon].parent == pid:
                    return daemon
    return 0


def _leader(pod: dict[int, _Process]) -> int:
    """Return the pid of the process that leads a session in the pod's namespace, the oldest if somebody else looks into
    it, 0 without one.
    """
    leaders = [each.pid for each in pod.values() if each.session == each.pid]
    return min(leaders, key=lambda pid: (start_time(pid), pid), default=0)


def _containers(run_directory: str) -> list[str]:
    """Return the ids of the containers that have a folder in the share, `<number>-<id>`."""
    with suppress(OSError):
        return [name.partition("-")[2] for name in os.listdir(f"{run_directory}/share") if "-" in name]
    return []


def _helpers_cgroups(name: str, pod: dict[int, _Process]) -> list[str]:
    """Return the directories of the cgroup `name`, in which the helpers are."""
    for pid in pod:
        path = _cgroup_of(pid)
        if os.path.basename(path) == name:
            return _existing(path)
    base = cgroup.directories("")[0]  # it is made in this hierarchy first
    for parent, names, _ in os.walk(base):
        if name in names:
            return _existing(os.path.relpath(os.path.join(parent, name), base))
    return []


def _container_cgroups(pod: dict[int, _Process], bundle: str, bundles: dict[str, str]) -> list[str]:
    """Return the directories of the containers' cgroups: those of the anchors, and those that the bundles name."""
    paths = {_cgroup_of(each.pid) for each in pod.values() if each.name == _ANCHOR}
    for container_id, path in {os.path.basename(bundle.rstrip("/")): bundle, **bundles}.items():
        if container_id:
            linux = _spec(path).get("linux")
            named = linux.get("cgroupsPath") if isinstance(linux, dict) else None
            paths.add(cgroup.relative_path(named if isinstance(named, str) else "", f"pymicro/{container_id}"))
    return sorted({directory for path in paths - {""} for directory in _existing(path)})


def _cgroup_of(pid: int) -> str:
    """Return the cgroup of a process, below the hierarchies' roots (cgroups(7)), "" for the root."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if path != "/" and (cgroup.is_v2() or set(controllers.split(",")) & set(cgroup.V1_CONTROLLERS)):
                return path.lstrip("/")
    return ""


def _existing(relative: str) -> list[str]:
    return [path for path in cgroup.directories(relative) if os.path.isdir(path)]


def _socket(bundle: str) -> str:
    """Return the path of the shim's socket that the bundle's file `address` names, "" if there is none."""
    with suppress(OSError, ValueError, AttributeError), open(f"{bundle}/address", encoding="utf-8") as file:
        text = file.read()
        path = str(json.loads(text).get("address")) if text.startswith("{") else text.removeprefix("unix://")
        name = os.path.basename(path)
        if len(name) == _SOCKET_NAME and int(name, 16) >= 0 and stat.S_ISSOCK(os.lstat(path).st_mode):
            return path
    return ""


def _poststop(container_id: str, bundle: str) -> "dict[str, Any]":
    """Return the poststop hooks of a container as the record has them (hooks.Owed), an empty dict without any."""
    spec = _spec(bundle)
    hooks = spec.get("hooks")
    wanted = hooks.get("poststop") if isinstance(hooks, dict) else None
    if not wanted:
        return {}
    from pymicro.shim.hooks import state

    return {"hooks": wanted, "state": state(spec, container_id, bundle, "stopped"), "limit": _HOOK_LIMIT}


def _spec(bundle: str) -> "dict[str, Any]":
    with suppress(OSError, ValueError), open(f"{bundle}/config.json", encoding="utf-8") as file:
        spec = json.load(file)
        return spec if isinstance(spec, dict) else {}
    return {}
