"""The guest's cgroup v2 tree: what crun made for a container, read and signalled by us."""

import posix
import time

from pymicro.agent import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = "/sys/fs/cgroup"
PARENT = "/pymicro"
"""Where containers without a cgroupsPath of their own go, relative to ROOT."""

STATS_FILES = (
    "cpu.stat", "cpu.max", "cpu.pressure",
    "memory.current", "memory.peak", "memory.max", "memory.high", "memory.low", "memory.min", "memory.stat",
    "memory.events", "memory.pressure", "memory.swap.current", "memory.swap.max", "memory.swap.peak",
    "pids.current", "pids.max", "io.stat", "io.pressure", "rdma.current", "rdma.max",
)  # fmt: skip
"""What containerd's cgroup metrics, v1 and v2, are made of; hugetlb.* comes on top."""

SIGKILL = 9
RESERVED_THREADS = 256
"""Threads of the VM that containers cannot take from the agent, which needs one for each request and each stream."""
KERNEL_THREADS = 32
"""Threads that the kernel may need for each CPU besides; they count as well."""


def prepare() -> None:
    """Enable every controller for the containers' parent group, and bound the threads in it. Raises OSError."""
    files.make_directories(ROOT + PARENT)
    for group in (ROOT, ROOT + PARENT):
        controllers = files.read_text(f"{group}/cgroup.controllers").split()
        files.write_text(f"{group}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))
    most = int(files.read_text("/proc/sys/kernel/threads-max"))  # of the whole VM, by its memory; it binds root as well
    reserved = RESERVED_THREADS + KERNEL_THREADS * (posix.cpu_count() or 1)
    files.write_text(f"{ROOT}{PARENT}/pids.max", str(max(most - reserved, most // 2)))


def groups(group: str) -> "Iterator[str]":
    """Yield a group's path and those of all groups below it, children first; nothing if it is gone."""
    try:
        children = [entry.path for entry in posix.scandir(group) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for child in children:
        yield from groups(child)
    yield group


def pids(group: str) -> "list[int]":
    """Return every process in the group and below, in ascending order; none if it is gone."""
    found = []
    for path in groups(group):
        try:
            found += [int(word) for word in files.read_text(f"{path}/cgroup.procs").split()]
        except OSError:  # removed meanwhile, or a threaded group: its processes are listed above it
            continue
    return sorted(found)


def send_signal(group: str, number: int) -> bool:
    """Send a signal to every process of the group and below; tell whether there was one."""
    victims = pids(group)
    if number == SIGKILL and victims:
        files.write_text(f"{group}/cgroup.kill", "1")  # atomic: what is being forked dies too
        return True
    for pid in victims:
        try:
            posix.kill(pid, number)
        except ProcessLookupError:
            continue
    return bool(victims)


def stats(group: str) -> "dict[str, str]":
    """Return the text of each statistics file that the group has."""
    try:
        names = posix.listdir(group)
    except OSError:
        return {}
    texts = {}
    for name in names:
        if name in STATS_FILES or name.startswith("hugetlb."):
            try:
                texts[name] = files.read_text(f"{group}/{name}")
            except OSError:  # e.g. a pressure file while pressure accounting is off
                continue
    return texts


def remove(group: str, patience: float = 2.0) -> None:
    """Remove the group and all below it, killing what is in there. Raises OSError if it is still busy after that."""
    send_signal(group, SIGKILL)
    deadline = time.monotonic() + patience
    while files.exists(group):
        try:
            for path in groups(group):
                posix.rmdir(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)  # a killed process leaves its group when it has been reaped
