"""What is measured: each case takes a containerd and returns one figure."""

import os
import subprocess
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from pymicro.shim import state

from tests.framework.containerd import Containerd

IMAGE = "localhost/busybox:latest"
RUNC = "io.containerd.runc.v2"
PYMICRO = "io.containerd.pymicro.v1"
MEGABYTES = 200

_numbers = count()


@dataclass(frozen=True)
class Idle:
    """A container that runs and does nothing."""

    containerd: Containerd
    id: str
    pid: int

    def remove(self) -> None:
        self.containerd.ctr("task", "kill", "-s", "KILL", self.id)
        for _ in range(100):
            if "STOPPED" in self.containerd.ctr("task", "ls").stdout:
                break
            time.sleep(0.05)
        self.containerd.ctr("task", "rm", self.id, check=False)
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
    row = next(line for line in containerd.ctr("task", "ls").stdout.splitlines() if line.split()[0] == name)
    return Idle(containerd, name, int(row.split()[1]))


def exec_true(container: Idle) -> float:
    """Return the seconds of a `ctr task exec` of `true`."""
    begun = time.monotonic()
    container.containerd.ctr("task", "exec", "--exec-id", new_id(), container.id, "true")
    return time.monotonic() - begun


def stdout_rate(container: Idle) -> float:
    """Return the megabytes per second that come out of a container through stdout."""
    command = ["task", "exec", "--exec-id", new_id(), container.id]
    program = ["dd", "if=/dev/zero", "bs=1M", f"count={MEGABYTES}"]
    begun = time.monotonic()
    with subprocess.Popen(
        [container.containerd.bin / "ctr", *command, *program],
        env=container.containerd.client_environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        received = sum(len(chunk) for chunk in iter(lambda: os.read(fd, 1 << 20), b""))
    if process.returncode or received != MEGABYTES << 20:
        raise RuntimeError(f"dd in {container.id} ended with {process.returncode} after {received} bytes")
    return MEGABYTES / (time.monotonic() - begun)


def memory(container: Idle) -> dict[str, float]:
    """Return the PSS in MiB of each host process of a pymicro container's pod."""
    address, namespace = container.containerd.address, container.containerd.namespace
    recorded = state.read(state.directory(address, namespace, container.id))
    shim = recorded["shim_pid"]
    figures: dict[str, float] = {}
    for pid in (shim, *_descendants(shim)):
        name = "shim" if pid == shim else Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        pss = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        figures[name] = figures.get(name, 0.0) + pss / 1024
    return figures


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [found for child in map(int, children) for found in (child, *_descendants(child))]


def wave(containerd: Containerd, runtime: str, size: int) -> list[float]:
    """Start `size` containers at once; return how long each `ctr run --rm` of `true` took, in seconds."""
    begun = time.monotonic()
    running = {
        subprocess.Popen(
            [containerd.bin / "ctr", "run", "--rm", "--runtime", runtime, IMAGE, new_id(), "true"],
            env=containerd.client_environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(size)
    }
    took: list[float] = []
    while running:
        for process in [process for process in running if process.poll() is not None]:
            running.discard(process)
            took.append(time.monotonic() - begun)
            if process.returncode:
                assert process.stderr is not None
                raise RuntimeError(f"one of {size} containers failed: {process.stderr.read().decode()}")
        time.sleep(0.005)
    return sorted(took)
