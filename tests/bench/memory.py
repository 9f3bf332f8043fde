"""What idle pods take of the host's memory: PSS by process and by part, the guest's RAM, and what the guest says."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench import smaps
from tests.bench.cases import IMAGE, PYMICRO, Idle, new_id
from tests.bench.waves import together
from tests.framework.containerd import RUN, Containerd

SETTLE = 3.0
"""Seconds after which a started pod is idle: its guest has nothing left to do."""
AT_ONCE = 2
"""How many pods are started at the same time: as many as a small host has CPUs."""
MEGABYTE = 1e6

VMMS = ("qemu", "cloud-hypervisor")
KINDS = ("shim", "guard", "anchor", *VMMS, "virtiofsd", "vhost-device-vsock")
_PROGRAMS = {
    "qemu-system": "qemu",
    "cloud-hypervisor": "cloud-hypervisor",
    "virtiofsd": "virtiofsd",
    "vhost-device-vsock": "vhost-device-vsock",
}
_ANCHOR = "pymicro-anchor"
_GUARD = "pymicro-guard"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one pod of several takes, in MB: `pss` by process (`qemu: ...` are parts of QEMU's), `ram` of the guest."""

    pods: int
    pss: Mapping[str, float]
    ram: Mapping[str, float]


def usage(containerd: Containerd, counts: Sequence[int], say: Callable[[str], None]) -> list[Usage]:
    """Start idle pods up to each of `counts`, which grow, and return what one of them takes then. All are removed."""
    if strangers := len(list(RUN.glob("*/state.json"))):
        say(f"{strangers} pod(s) of others run on this host: what they share with ours makes its PSS less")
    before = available()
    pods: list[Idle] = []
    found = []
    try:
        for count in counts:
            say(f"memory of {count} idle pod(s)")
            while len(pods) < count:
                pods += _start(containerd, min(AT_ONCE, count - len(pods)))
            time.sleep(SETTLE)
            taken = {"MemAvailable fell by": (before - available()) / count / MEGABYTE}
            found.append(_look(pods, taken))
    finally:
        for pod in pods:
            pod.remove()
    return found


def _start(containerd: Containerd, count: int) -> list[Idle]:
    pods = [Idle(containerd, new_id()) for _ in range(count)]
    command = ("run", "--detach", "--runtime", PYMICRO, IMAGE)
    _, failures = together(containerd, [(*command, pod.id, "sleep", "100000") for pod in pods])
    if failures:
        raise RuntimeError(f"an idle pod did not start: {failures[0]}")
    return pods


def _look(pods: Sequence[Idle], taken: Mapping[str, float]) -> Usage:
    """Return what a pod takes: of each figure the median over the pods. The guest is asked last: that costs memory."""
    looks = [pod_now(pod.shim_pid) for pod in pods]
    pss = _medians([look.pss for look in looks])
    ram = _medians([look.ram for look in looks])
    return Usage(len(pods), pss, {**ram, **guest_says(pods[-1].read("/proc/meminfo")), **taken})


def _medians(looks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: median(look.get(name, 0.0) for look in looks) for name in looks[0]}


def pod_now(shim: int) -> Usage:
    """Return what the processes of one pod take now."""
    pss: Counter[str] = Counter()
    kinds = dict.fromkeys(KINDS)
    held: dict[tuple[int, int], int] = {}
    mapped = 0
    for kind, pid in processes(shim):
        kinds[kind] = None  # one that is not in KINDS counts as well
        for mapping in smaps.parse(Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace")):
            rows = [kind, "all", *([f"{kind}: {mapping.part}"] if kind in VMMS else [])]
            pss.update(dict.fromkeys(rows, mapping.pss))
            if mapping.part == smaps.GUEST_RAM:
                mapped += mapping.pss
                _hold(held, pid, mapping)
    order = [*(row for kind in kinds for row in (kind, *(f"{kind}: {part}" for part in smaps.PARTS))), "all"]
    ram = {"mapped, by all processes": mapped, "held by its file": sum(held.values())}
    return Usage(1, _in_megabytes({row: pss[row] for row in order if row in pss}), _in_megabytes(ram))


def _hold(held: dict[tuple[int, int], int], pid: int, mapping: smaps.Mapping) -> None:
    """Note the bytes that the guest's RAM takes: those of its file, or copies of a file that is mapped privately."""
    with suppress(FileNotFoundError):
        status = os.stat(f"/proc/{pid}/map_files/{mapping.addresses}")
        key = status.st_dev, status.st_ino
        held[key] = status.st_blocks * 512 if mapping.shared else held.get(key, 0) + mapping.anonymous


def _in_megabytes(sizes: Mapping[str, float]) -> dict[str, float]:
    return {name: size / MEGABYTE for name, size in sizes.items()}


# -- the processes of a pod --------------------------------------------------------------------------------------------


def processes(shim: int) -> Iterator[tuple[str, int]]:
    """Yield the pod's processes, each with its kind: the shim, its parent if that is a guard, and its descendants."""
    yield "shim", shim
    guard = int(Path(f"/proc/{shim}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
    if _command(guard)[0] == _GUARD:
        yield "guard", guard
    for pid in _descendants(shim):
        yield kind_of(Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip(), _command(pid)), pid


def kind_of(name: str, command: Sequence[str]) -> str:
    """Return which of KINDS a descendant of a shim is, by its own name and its command line."""
    if name == _ANCHOR:
        return "anchor"
    words = command[:6] if "ld-linux" in command[0] else command[:1]  # a program may run through a loader of its own
    return next((kind for program, kind in _PROGRAMS.items() if any(program in word for word in words)), name)


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def _descendants(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for thread in threads for child in thread.read_text(encoding="ascii").split()]
    return [found for child in children for found in (child, *_descendants(child))]


# -- meminfo -----------------------------------------------------------------------------------------------------------


def meminfo(text: str) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    lines = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {words[0].removesuffix(":"): int(words[1]) * 1024 for words in lines}


def available() -> int:
    """Return the bytes that this host could still give to programs."""
    return meminfo(Path("/proc/meminfo").read_text(encoding="ascii"))["MemAvailable"]


def guest_says(text: str) -> dict[str, float]:
    """Return what a guest's meminfo tells, in MB; what its kernel took before it counted is in none of them."""
    facts = meminfo(text)
    cache = facts["Buffers"] + facts["Cached"]
    used = facts["MemTotal"] - facts["MemFree"] - cache
    return _in_megabytes({"guest: in use": used, "guest: page cache": cache, "guest: free": facts["MemFree"]})
