"""The proof that a test left nothing on the host: no process, mount, loop device, directory, socket, cgroup or tap.

A private containerd has directories and a namespace of its own, so what is found there is the test's, whatever else
the host is doing meanwhile.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pymicro.shim import state

from tests.framework.containerd import Containerd
from tests.framework.processes import all_processes, mounts_above, mounts_under, processes_of
from tests.framework.waiting import seconds

GRACE = 5.0
CGROUPS = Path("/sys/fs/cgroup")
SHIM_SOCKETS = Path("/run/containerd/s")
LINKS = Path("/sys/class/net")


class Leftovers:
    """What a test leaves behind. Made before the test, `remaining()` and `check()` look at what came since."""

    def __init__(self, containerd: Containerd, container_ids: Iterable[str] = ()) -> None:
        """`container_ids`: a live collection of the ids that the test uses."""
        self._containerd = containerd
        self._ids = container_ids
        self._taps_before = _taps()

    def remaining(self) -> list[str]:
        """Return one line for each thing that is there now and should not be."""
        found = [f"process {process}" for process in self._processes()]
        found += [f"mount {point}" for point in self._mounts()]
        found += [f"directory {path}" for path in self._sandbox_directories()]
        found += [f"socket {path}" for path in self._sockets()]
        found += [f"cgroup {path}" for path in self._cgroups()]
        found += [f"tap {name}" for name in sorted(_taps() - self._taps_before)]
        found += [f"loop device of {file}" for file in loop_files(self._containerd.home)]
        return found

    def check(self, grace: float = GRACE) -> None:
        """Fail unless everything is gone within `grace` seconds, on a usual host."""
        grace = seconds(grace)
        deadline = time.monotonic() + grace
        while found := self.remaining():
            if time.monotonic() > deadline:
                raise AssertionError(f"left behind, {grace:.0f} s after the end:\n  " + "\n  ".join(found))
            time.sleep(0.1)

    def _processes(self) -> list[str]:
        """Return those with the daemon's mark, their children, and those that name our directories."""
        everything = all_processes()
        members = {process.pid for process in processes_of(self._containerd.home)}
        names = [str(directory) for directory in self._directories()]
        members |= {pid for pid, process in everything.items() if any(name in process.command for name in names)}
        members -= {process.pid for process in self._containerd.daemons()} | {os.getpid(), os.getppid()}
        return [str(everything[pid]) for pid in sorted(members) if pid in everything]

    def _mounts(self) -> list[str]:
        """Return mounts below our directories in any mount namespace of the host."""
        namespaces: dict[str, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    namespaces.setdefault(os.readlink(entry / "ns/mnt"), entry.name)
        found: set[str] = set()
        directories = self._directories()
        for pid in namespaces.values():
            with suppress(OSError):
                found.update(mounts_under(directories, pid))
        return sorted(found)

    def _sandbox_directories(self) -> list[Path]:
        bundles = self._containerd.home.glob("state/io.containerd.runtime.v2.task/*/*")
        sandboxes = {*self._containerd.sandboxes(), *(path for path in self._own_sandboxes() if path.exists())}
        return [*sorted(sandboxes), *sorted(bundles)]

    def _own_sandboxes(self) -> list[Path]:
        """Return the directories of the sandboxes that have the test's ids, whether they exist or not."""
        address, namespace = self._containerd.address, self._containerd.namespace
        return [Path(state.directory(address, namespace, each)) for each in self._ids]

    def _directories(self) -> list[Path]:
        """Return the directories below which everything is the test's."""
        return [self._containerd.home / "state", *self._own_sandboxes(), *self._containerd.sandboxes()]

    def _sockets(self) -> list[Path]:
        """Return the shims' sockets, whose names containerd's shim contract makes of address, namespace and id."""
        prefix = f"{self._containerd.address}/{self._containerd.namespace}"
        names = [hashlib.sha256(f"{prefix}/{each}".encode()).hexdigest() for each in self._ids]
        return [SHIM_SOCKETS / name for name in names if (SHIM_SOCKETS / name).exists()]

    def _cgroups(self) -> list[Path]:
        """Return cgroups below the namespace's own, where `ctr` puts its containers, in every hierarchy."""
        roots = [CGROUPS, *(path for path in CGROUPS.iterdir() if path.is_dir())]
        return sorted({path for root in roots for path in (root / self._containerd.namespace).glob("*/")})


def loop_files(directory: Path) -> list[str]:
    """Return the files at or below `directory` that are a loop device, less image layers, which containerd has
    mounted. They are named as seen from the root or, like those that a namespace which is gone had, from a mount point.
    """
    seen = {"", *mounts_above(directory)} - {"/"}
    prefixes = tuple(f"{str(directory).removeprefix(point)}/" for point in seen)
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # freed meanwhile
            file = path.read_text().strip()
            if file.startswith(prefixes) and not file.endswith("/layer.erofs"):
                found.append(file)
    return sorted(found)


def _taps() -> set[str]:
    return {link.name for link in LINKS.iterdir() if (link / "tun_flags").exists()}
