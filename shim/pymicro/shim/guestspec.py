"""From a container's OCI runtime spec to the one that crun gets inside the guest, and what the host has to do for it.

Pure: no file is looked at. Paths are those of the guest, where the container's root filesystem and its bind mounts
appear in the pod's share; what only makes sense on the host is taken out; what a VM cannot do is refused, with why.
Covers runtime-spec 1.0 to 1.2.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from pymicro.shim.errors import InvalidRequest, Unsupported
from pymicro.shim.hooks import Hook, parse
from pymicro.shim.hypervisor.base import VmSpec
from pymicro.shim.netns import HOST_NETWORK
from pymicro.wire.messages import GUEST_SHARE

Json = dict[str, Any]
"""A JSON object of the spec: its values are whatever containerd wrote."""

NS_FILES = {
    "network": "net",
    "mount": "mnt",
    "pid": "pid",
    "ipc": "ipc",
    "uts": "uts",
    "cgroup": "cgroup",
    "time": "time",
}
"""Namespace types of the spec and their files below /proc/<pid>/ns."""
GUEST_NETWORK = "/proc/1/ns/net"
"""The guest's own network namespace is the pod's."""
AGENT_PID = 1
"""The agent stands in for the pod's pause container: namespaces of the sandbox are those of the agent."""

_GUEST_FILESYSTEMS = frozenset(
    ("cgroup", "cgroup2", "devpts", "hugetlbfs", "mqueue", "proc", "ramfs", "sysfs", "tmpfs")
)
_KERNEL_BINDS = {"/proc": "proc", "/sys": "sysfs", "/sys/fs/cgroup": "cgroup"}
"""Binds of the host's own kernel file systems: the guest's are meant, the host's would be wrong and dangerous."""
_NO_PEER = frozenset(("shared", "rshared", "slave", "rslave"))
"""Propagation needs a mount to exchange events with, and the host's mounts are in another kernel."""

_GUEST_DEVICES = frozenset(
    {("c", 1, minor) for minor in (3, 5, 7, 8, 9, 11)}  # null, zero, full, random, urandom, kmsg
    | {("c", 5, minor) for minor in (0, 1, 2)}  # tty, console, ptmx
    | {("c", 10, 200), ("c", 10, 229)}  # net/tun, fuse
)
"""Devices (admin-guide/devices.txt) that the guest's kernel has as well."""
_GUEST_DEVICE_PATHS = frozenset(
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "kmsg", "tty", "net/tun", "fuse")
)

_SHM = "/dev/shm"  # noqa: S108  # the place of POSIX's shared memory
_CRI = "io.kubernetes.cri.container-type"
"""The annotation of every container of the CRI."""

_TOP_LEVEL = ("ociVersion", "hostname", "domainname")
_HOST_ONLY_PROCESS = ("apparmorProfile", "selinuxLabel", "execCPUAffinity")
_HOST_ONLY_LINUX = ("mountLabel", "intelRdt", "rootfsPropagation", "memoryPolicy")
_HOST_ONLY_RESOURCES = ("blockIO", "network", "rdma")  # host devices, host interfaces, host hardware
_HOST_ONLY_CPU = ("cpus", "mems", "realtimePeriod", "realtimeRuntime")  # numbers of host CPUs; absent from cgroups v2
# The guest has no swap, and cgroups v2 has neither of the others: crun would refuse them.
_HOST_ONLY_MEMORY = ("swap", "kernel", "kernelTCP", "swappiness", "disableOOMKiller", "useHierarchy")
_STEERING = ("run.oci.", "module.")
"""Annotations that tell crun to behave differently; a pod's author has no say in that."""


class Bind(Struct, frozen=True):
    """A host directory or file that must appear as `mounts/<name>` in the container's part of the share.

    A relative `source` is relative to the bundle. With `recursively` what is mounted below it is read-only as well.
    """

    source: str
    name: str
    read_only: bool
    recursively: bool = False


class HostHooks(Struct, frozen=True):
    """The OCI hooks that run on the host."""

    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


class GuestPlan(Struct, frozen=True):
    """What crun gets, and what the host does before. `dropped` names what was left out, for the log."""

    spec: Json
    binds: tuple[Bind, ...]
    root_path: str
    terminal: bool
    hooks: HostHooks
    dropped: tuple[str, ...]


def build(
    spec: Mapping[str, Any],
    container_id: str,
    guest_pids: Mapping[int, int] | None = None,
    *,
    folder: str | None = None,
    hook_limit: float | None = None,
    host_pid: str = "refuse",
) -> GuestPlan:
    """Return the plan for `container_id` with the OCI runtime spec `spec`, which stays as it is.

    `folder` is the container's directory in the share, named after its id unless the caller knows better.
    `guest_pids` maps the task pids (on the host) of this pod's containers to the pids of their init processes in the
    guest, AGENT_PID for the sandbox: `/proc/<pid>/ns/...` of these can be joined. `hook_limit` is in seconds, for
    those hooks in the guest that have no time-out. `host_pid` is the setting: what a container gets that asks for the
    host's processes. Raises InvalidRequest where the spec makes no sense, Unsupported
    where it asks for what a VM cannot give.
    """
    _check_version(spec)
    root = _object(spec, "root", required=True)
    if not isinstance(root_path := root.get("path"), str) or not root_path:
        raise InvalidRequest("the spec has no root.path")
    process = _object(spec, "process", required=True)
    if not process.get("args"):
        raise InvalidRequest("the spec has no process.args: the image has no command and none was given")
    share = f"{GUEST_SHARE}/{folder or container_id}"
    mounts, binds = _mounts(_objects(spec, "mounts"), share, cri=_CRI in _object(spec, "annotations"))
    linux = _linux(_object(spec, "linux"), container_id, guest_pids or {}, host_pid)
    host_hooks, guest_hooks = _hooks(_object(spec, "hooks"), hook_limit)
    guest: Json = {key: spec[key] for key in _TOP_LEVEL if key in spec}
    guest |= {"root": {**root, "path": f"{share}/rootfs"}, "process": guest_process(process), "mounts": mounts}
    guest |= {"linux": linux, "annotations": _annotations(_object(spec, "annotations"))}
    if guest_hooks:
        guest["hooks"] = guest_hooks
    return GuestPlan(guest, binds, root_path, bool(process.get("terminal")), host_hooks, _dropped(spec))


def guest_process(process: Mapping[str, Any]) -> Json:
    """Return an OCI `process` (of a spec or an exec) without what names profiles and CPUs of the host."""
    return {key: value for key, value in process.items() if key not in _HOST_ONLY_PROCESS}


def guest_resources(resources: Mapping[str, Any]) -> Json:
    """Return OCI `linux.resources` (of a spec or an update) without what the guest's cgroups cannot know or do."""
    kept = {key: value for key, value in resources.items() if key not in _HOST_ONLY_RESOURCES and value is not None}
    for section, host_only in (("cpu", _HOST_ONLY_CPU), ("memory", _HOST_ONLY_MEMORY)):
        if section in kept:
            kept[section] = {key: value for key, value in kept[section].items() if key not in host_only}
    return kept


class Limits(Struct, frozen=True):
    """How much memory (bytes) and how many CPUs a container may use, 0 where that is not limited; and the microseconds
    in which its CPU quota holds.
    """

    memory: int = 0
    cpus: float = 0.0
    period: int = 100_000  # the kernel's default


def limits_of(resources: Mapping[str, Any], present: Limits) -> Limits:
    """Return what OCI `linux.resources` (of a spec or an update) limit. An update may leave the period as it is.

    Raises InvalidRequest.
    """
    memory, cpu = _object(resources, "memory"), _object(resources, "cpu")
    quota, period = _number(cpu, "quota"), _number(cpu, "period") or present.period
    return Limits(_number(memory, "limit"), quota / period, period)


def require_room(wanted: Limits, present: Limits, vm: VmSpec) -> None:
    """Raise Unsupported where new limits are higher and more than the VM has: it cannot grow, so they would be untrue.

    One that is as before may be more than that: clients send all of them, and a VM is never larger than its host.
    """
    if wanted.memory > max(vm.memory_mib << 20, present.memory):
        raise Unsupported(
            f"a memory limit of {wanted.memory >> 20} MiB: the VM has {vm.memory_mib} MiB and cannot grow; a new pod"
            " gets one that its limits fit into"
        )
    if wanted.cpus > max(vm.vcpus, present.cpus):
        raise Unsupported(
            f"a limit of {wanted.cpus:g} CPUs: the VM has {vm.vcpus} and cannot grow; a new pod gets one that its"
            " limits fit into"
        )


def _check_version(spec: Mapping[str, Any]) -> None:
    version = spec.get("ociVersion")
    if not isinstance(version, str) or not version.startswith("1."):
        raise InvalidRequest(f"the spec has ociVersion {version!r}; this runtime knows 1.0 to 1.2")


def _mounts(mounts: Sequence[Json], share: str, *, cri: bool) -> tuple[list[Json], tuple[Bind, ...]]:
    """Return the guest's mounts and the binds that bring host files there. A pod of the CRI has its /dev/shm in common,
    and empty: a directory of the host's memory is bound there, in place of which the guest's own does.
    """
    guest: list[Json] = []
    binds: list[Bind] = []
    for mount in mounts:
        if not isinstance(destination := mount.get("destination"), str) or not destination:
            raise InvalidRequest(f"the spec has a mount without a destination: {mount}")
        options = [str(option) for option in mount.get("options") or ()]
        kind, source = str(mount.get("type") or "none"), str(mount.get("source") or "")
        if kind in ("bind", "rbind") or {"bind", "rbind"} & set(options):
            if not source:
                raise InvalidRequest(f"the bind mount at {destination} has no source")
            options = [option for option in options if option not in _NO_PEER]
            if cri and destination.rstrip("/") == _SHM:
                guest.append({**mount, "type": "bind", "source": _SHM, "options": _bound(options)})
            else:
                guest.append(_bind(mount, source.rstrip("/") or "/", options, binds, share))
        elif kind in _GUEST_FILESYSTEMS:
            guest.append({**mount, "options": [option for option in options if option not in _NO_PEER]})
        else:
            raise Unsupported(
                f"the mount at {destination} is of type {kind!r}, which a VM cannot take from the host;"
                " mount it on the host and pass the directory as a bind mount"
            )
    return guest, tuple(binds)


def _bound(options: list[str]) -> list[str]:
    return options if {"bind", "rbind"} & set(options) else [*options, "rbind"]


def _bind(mount: Json, source: str, options: list[str], binds: list[Bind], share: str) -> Json:
    if filesystem := _KERNEL_BINDS.get(source):
        options = [option for option in options if option not in ("bind", "rbind", "private", "rprivate")]
        return {**mount, "type": filesystem, "source": filesystem, "options": options}
    options = _bound(options)
    if source == "/dev" or source in _GUEST_DEVICE_PATHS:  # the guest's own
        return {**mount, "type": "bind", "source": source, "options": options}
    name = f"m{len(binds)}"
    last = ([option for option in options if option in ("ro", "rw", "rro")] or ["rw"])[-1]
    binds.append(Bind(source, name, last != "rw", recursively=last == "rro"))
    return {**mount, "type": "bind", "source": f"{share}/mounts/{name}", "options": options}


def _linux(linux: Json, container_id: str, guest_pids: Mapping[int, int], host_pid: str) -> Json:
    if linux.get("netDevices"):
        raise Unsupported("linux.netDevices would move network interfaces of the host into a VM; use a CNI network")
    if (linux.get("seccomp") or {}).get("listenerPath"):
        raise Unsupported("linux.seccomp.listenerPath: a seccomp agent on the host cannot answer for another kernel")
    guest = {key: value for key, value in linux.items() if key not in _HOST_ONLY_LINUX and value is not None}
    guest["namespaces"] = _namespaces(_objects(linux, "namespaces"), guest_pids, host_pid)
    guest["cgroupsPath"] = f"/pymicro/{container_id}"
    if "resources" in guest:
        guest["resources"] = guest_resources(_object(linux, "resources"))
    if devices := _objects(linux, "devices"):
        guest["devices"] = [device for device in devices if _in_guest(device)]
    return guest


def _dropped(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the spec asks for and the guest's lacks, by its place in the spec: devices by their paths."""
    linux = _object(spec, "linux")
    resources = _object(linux, "resources")
    places = (
        ("process", _object(spec, "process"), _HOST_ONLY_PROCESS),
        ("linux", linux, _HOST_ONLY_LINUX),
        ("linux.resources", resources, _HOST_ONLY_RESOURCES),
        ("linux.resources.cpu", _object(resources, "cpu"), _HOST_ONLY_CPU),
        ("linux.resources.memory", _object(resources, "memory"), _HOST_ONLY_MEMORY),
    )
    fields = [f"{place}.{key}" for place, section, keys in places for key in keys if section.get(key)]
    devices = [device for device in _objects(linux, "devices") if not _in_guest(device)]
    return (*fields, *(f"device {device.get('path')}" for device in devices))


def _in_guest(device: Json) -> bool:
    kind = "c" if device.get("type") == "u" else device.get("type")
    return kind == "p" or (kind, device.get("major"), device.get("minor")) in _GUEST_DEVICES


_HOST_NAMESPACES = {
    "network": HOST_NETWORK,
    "pid": "a VM has no part in the host's processes (--pid host, hostPID); vm.host_pid = \"guest\" gives it the VM's",
    "ipc": "a VM has no part in the host's System V IPC (--ipc host, hostIPC)",
    "uts": "a VM has a host name of its own (--uts host)",
}
"""Why a namespace that the spec leaves out, which is to say the host's, is refused."""


def _namespaces(namespaces: Sequence[Json], guest_pids: Mapping[int, int], host_pid: str) -> list[Json]:
    """Return the container's namespaces in the guest. Raises Unsupported for those of the host and of other VMs."""
    wanted = {str(namespace.get("type")): str(namespace.get("path") or "") for namespace in namespaces}
    for kind, why in _HOST_NAMESPACES.items():
        if kind not in wanted and (kind, host_pid) != ("pid", "guest"):
            raise Unsupported(f"the spec has no {kind} namespace: {why}")
    guest = []
    for kind, path in wanted.items():
        if kind == "network":
            _check_network(path, guest_pids)
            guest.append({"type": kind, "path": GUEST_NETWORK})
        elif path:
            guest.append({"type": kind, "path": _joined(kind, path, guest_pids)})
        else:
            guest.append({"type": kind})
    # a root filesystem needs a mount namespace; without a cgroup namespace the guest's own groups would show
    return guest + [{"type": kind} for kind in ("mount", "cgroup") if kind not in wanted]


def _check_network(path: str, guest_pids: Mapping[int, int]) -> None:
    """Refuse another process's network namespace; a named one is the pod's, in which its VM has been started."""
    if path.startswith("/proc/") and _pid(path) not in guest_pids:
        raise Unsupported(f"the network namespace {path} belongs to no container of this pod; {_OTHER_VM}")


_OTHER_VM = "a VM can share namespaces only among its own containers"


def _joined(kind: str, path: str, guest_pids: Mapping[int, int]) -> str:
    """Return where in the guest the namespace is that `path` names on the host."""
    guest_pid = guest_pids.get(_pid(path)) if kind in NS_FILES else None
    if guest_pid is None:
        raise Unsupported(f"cannot join the {kind} namespace {path}: {_OTHER_VM}")
    if kind == "pid" and guest_pid == AGENT_PID:
        raise Unsupported("the containers of a pod cannot share one pid namespace (shareProcessNamespace) yet")
    return f"/proc/{guest_pid}/ns/{NS_FILES[kind]}"


def _pid(path: str) -> int:
    """Return the pid in `/proc/<pid>/ns/<file>`, 0 where the path is another."""
    match = re.fullmatch(r"/proc/(\d+)/ns/\w+", path)
    return int(match[1]) if match else 0


def _hooks(hooks: Json, limit: float | None) -> tuple[HostHooks, Json]:
    """Return the hooks of the host and those of the guest: createContainer and startContainer, which see the mounts.

    crun takes whole seconds, and waits for ever where there is no time-out.
    """
    host = HostHooks(
        prestart=parse("prestart", _objects(hooks, "prestart")),
        create_runtime=parse("createRuntime", _objects(hooks, "createRuntime")),
        poststart=parse("poststart", _objects(hooks, "poststart")),
        poststop=parse("poststop", _objects(hooks, "poststop")),
    )
    guest: Json = {}
    for kind in ("createContainer", "startContainer"):
        parse(kind, wanted := _objects(hooks, kind))
        default = {} if limit is None else {"timeout": math.ceil(limit)}
        if wanted:
            guest[kind] = [
                {**default, **{key: value for key, value in hook.items() if value is not None}} for hook in wanted
            ]
    return host, guest


def _annotations(annotations: Json) -> Json:
    return {key: value for key, value in annotations.items() if not key.startswith(_STEERING)}


def _object(parent: Mapping[str, Any], key: str, *, required: bool = False) -> Json:
    value = parent.get(key)
    if value is None and not required:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"the spec has no {key} section" if value is None else f"the spec's {key} is no object")
    return value


def _number(parent: Mapping[str, Any], key: str) -> int:
    """Return a number, 0 where there is none or a negative one: they say that there is no limit."""
    value = parent.get(key) or 0
    if not isinstance(value, int):
        raise InvalidRequest(f"{key} in the resources is no number: {value!r}")
    return max(0, value)


def _objects(parent: Mapping[str, Any], key: str) -> list[Json]:
    value = parent.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise InvalidRequest(f"the spec's {key} is no list of objects")
    return value
