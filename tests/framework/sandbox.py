"""One container's host processes, found in /proc by what they are: its shim, VMM, helpers and anchor."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pymicro.shim import state

from tests.framework.containerd import Containerd
from tests.framework.processes import Process, all_processes
from tests.framework.waiting import seconds

SHIM = "shim"
ANCHOR = "anchor"
HELPERS = {
    "qemu": ("qemu-system", "cloud-hypervisor"),
    "virtiofsd": ("virtiofsd",),
    "vhost-device-vsock": ("vhost-device-vsock",),
}
"""Name of a helper, and what its command line contains. "qemu" stands for the VMM, whichever it is."""
KINDS = (SHIM, *HELPERS, ANCHOR)

APPEARS = 20.0
_POLL = 0.002


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The processes of the container `id`, which need not have been started yet. Each look is a new one."""

    containerd: Containerd
    id: str

    @property
    def directory(self) -> Path:
        """Its run directory, whether that exists or not."""
        return Path(state.directory(self.containerd.address, self.containerd.namespace, self.id))

    def find(self, kind: str) -> int | None:
        """Return the pid of one of KINDS, None while there is none. A helper that forks counts as its first process."""
        return next((pid for pid in self.pids(kind)), None)

    def pids(self, kind: str) -> Iterator[int]:
        """Yield the pids of one of KINDS with the children that do the same work, the parents first."""
        everything = all_processes()
        shim = self._shim(everything)
        if kind == SHIM:
            yield from [shim] if shim else []
        elif kind == ANCHOR:
            yield from (pid for pid in _children(everything, shim) if _name(pid) == "pymicro-anchor")
        else:
            programs = {pid: _program(everything[pid]) for pid in _children(everything, shim)}
            found = [pid for pid, program in programs.items() if any(name in program for name in HELPERS[kind])]
            yield from found
            yield from (child for pid in found for child in _children(everything, pid))

    def _shim(self, everything: dict[int, Process]) -> int | None:
        """Return the daemon: `start`, which has the same command line, leads no session."""
        mark = f" -id {self.id} "
        address = f" -address {self.containerd.address} "
        matching = [p for p in everything.values() if mark in f"{p.command} " and address in f"{p.command} "]
        daemons = [p.pid for p in matching if "containerd-shim-pymicro" not in p.command or _session(p.pid) == p.pid]
        return daemons[0] if daemons else None

    def wait_for(self, kind: str, limit: float = APPEARS) -> int:
        """Return the pid of one of KINDS as soon as there is one. Raises AssertionError."""
        found: list[int] = []

        def look() -> bool:
            found.extend(self.pids(kind))
            return bool(found)

        eventually(look, f"{kind} of {self.id} appears", limit)
        return found[0]

    def kill(self, kind: str) -> None:
        """Send SIGKILL to one of KINDS, which must run."""
        pid = self.find(kind)
        assert pid, f"{self.id} has no {kind}"
        os.kill(pid, signal.SIGKILL)


def eventually(condition: Callable[[], bool], what: str, limit: float) -> float:
    """Wait until `condition()` holds and return the seconds that took.

    Raises AssertionError after `limit` seconds, of a usual host.
    """
    limit = seconds(limit)
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < limit, f"not within {limit:g} s: {what}"
        time.sleep(_POLL)
    return time.monotonic() - begun


def _children(everything: dict[int, Process], parent: int | None) -> list[int]:
    return sorted(pid for pid, process in everything.items() if process.parent == parent)


def _program(process: Process) -> str:
    """Return the path of its program and, where a loader runs it, the loader's arguments up to the first option."""
    words = process.command.split()
    return " ".join(words[:6] if "ld-linux" in words[0] else words[:1])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0
