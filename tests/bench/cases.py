"""What one container costs: each case takes a containerd and returns one figure."""

import os
import subprocess
import time
from dataclasses import dataclass
from itertools import count

from pymicro.shim import state

from tests.framework import busybox
from tests.framework.containerd import Containerd

IMAGE = busybox.NAME
RUNC = "io.containerd.runc.v2"
PYMICRO = "io.containerd.pymicro.v1"
COLD = ("--annotation", "io.pymicro.start=boot")

_numbers = count()


@dataclass(frozen=True, slots=True)
class Idle:
    """A container that runs and does nothing."""

    containerd: Containerd
    id: str

    @property
    def shim_pid(self) -> int:
        """The daemon of its pod, which runs with pymicro."""
        recorded = state.read(state.directory(self.containerd.address, self.containerd.namespace, self.id))
        return int(recorded["shim_pid"])

    def read(self, path: str) -> str:
        """Return a file as the container sees it."""
        return self.containerd.ctr("task", "exec", "--exec-id", new_id(), self.id, "cat", path).stdout

    def remove(self) -> None:
        self.containerd.ctr("task", "rm", "--force", self.id, check=False)  # says how it was killed, by its status
        self.containerd.ctr("container", "rm", self.id)


def new_id() -> str:
    return f"bench-{next(_numbers)}"


def run_true(containerd: Containerd, runtime: str, *options: str) -> float:
    """Return the seconds of a whole `ctr run --rm` of `true`."""
    begun = time.monotonic()
    containerd.ctr("run", "--rm", "--runtime", runtime, *options, IMAGE, new_id(), "true")
    return time.monotonic() - begun


def idle(containerd: Containerd, runtime: str) -> Idle:
    """Start a container that does nothing."""
    name = new_id()
    containerd.ctr("run", "--detach", "--runtime", runtime, IMAGE, name, "sleep", "100000")
    return Idle(containerd, name)


def exec_true(container: Idle) -> float:
    """Return the seconds of a `ctr task exec` of `true`."""
    begun = time.monotonic()
    container.containerd.ctr("task", "exec", "--exec-id", new_id(), container.id, "true")
    return time.monotonic() - begun


def stdout_rate(container: Idle, megabytes: int) -> float:
    """Return the megabytes (10^6 bytes) per second that come out of a container through stdout."""
    command = ["task", "exec", "--exec-id", new_id(), container.id]
    program = ["dd", "if=/dev/zero", "bs=1000000", f"count={megabytes}"]
    begun = time.monotonic()
    with subprocess.Popen(
        [container.containerd.bin / "ctr", *command, *program],
        env={**os.environ, **container.containerd.client_environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        received = sum(len(chunk) for chunk in iter(lambda: os.read(fd, 1 << 20), b""))
    if process.returncode or received != megabytes * 1_000_000:
        raise RuntimeError(f"dd in {container.id} ended with {process.returncode} after {received} bytes")
    return megabytes / (time.monotonic() - begun)
