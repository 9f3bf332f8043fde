"""`make up`, `make down` and `make run`, as the README has a newcomer use them."""

import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.containerd import REPOSITORY, USUAL, VERSIONS, Containerd, claimed_directory
from tests.framework.golang import GoMissing
from tests.framework.processes import mounts_under, processes_of
from tests.framework.tools import tool
from tests.framework.waiting import seconds

RUN = "ctr run --rm --runtime io.containerd.pymicro.v1 localhost/busybox:latest"
TIMEOUT = 240


def make(target: str, directory: Path, version: str = USUAL) -> subprocess.CompletedProcess[str]:
    argv = ["make", target, f"DEV={directory}", f"CONTAINERD={version}"]
    return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=TIMEOUT)


def in_shell(directory: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a shell that has sourced the environment."""
    argv = ["bash", "-c", f". {directory}/env && {script}"]
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=TIMEOUT, stdin=subprocess.DEVNULL, cwd="/"
    )


def remains(directory: Path) -> list[str]:
    containerd = Containerd(USUAL, directory)
    sandboxes = containerd.sandboxes()
    mounts = mounts_under([containerd.home, *sandboxes])
    return [*map(str, processes_of(containerd.home)), *mounts, *map(str, sandboxes)]


@pytest.fixture
def directory(artefacts: dict[str, str]) -> Iterator[Path]:
    """Yield a directory for `make up`, which is down again afterwards."""
    with claimed_directory(REPOSITORY / "build/dev-test") as claimed:
        make("down", claimed)
        yield claimed
        make("down", claimed)
        assert remains(claimed) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_up_gives_a_shell_in_which_containers_run(directory: Path, version: str) -> None:
    try:
        tool(f"containerd-{version.partition('-')[0]}")
    except GoMissing as error:
        pytest.skip(str(error))
    make("up", directory, version)

    done = in_shell(directory, f"{RUN} a uname -r")

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != platform.release()
    release, _, _ = version.partition("-")  # of "1.7-grpc"
    assert release in in_shell(directory, "ctr version").stdout.partition("Server:")[2]


def test_up_again_changes_nothing(directory: Path) -> None:
    make("up", directory)
    before = [process.pid for process in processes_of(directory)]

    make("up", directory)

    assert [process.pid for process in processes_of(directory)] == before


def test_down_ends_what_runs(directory: Path) -> None:
    make("up", directory)
    started = in_shell(directory, f"{RUN.replace('--rm', '--detach')} sleeper sleep 100000")
    assert started.returncode == 0, started.stderr

    make("down", directory)

    assert remains(directory) == []


def test_down_cleans_up_after_everything_was_killed(directory: Path) -> None:
    make("up", directory)
    started = in_shell(directory, f"{RUN.replace('--rm', '--detach')} sleeper sleep 100000")
    assert started.returncode == 0, started.stderr
    for process in processes_of(directory):
        os.kill(process.pid, signal.SIGKILL)

    make("down", directory)

    assert remains(directory) == []


def test_run_prints_both_kernels_and_a_line_of_the_container() -> None:
    began = time.monotonic()
    done = subprocess.run(["make", "run"], cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=True)

    lines = [line for line in done.stdout.splitlines() if not line.startswith("make[")][-3:]
    host, guest = (line.partition(":")[2].strip() for line in lines[:2])
    assert host == platform.release()
    assert guest[0].isdigit()
    assert guest != host
    assert "hello from" in lines[2]
    assert time.monotonic() - began < seconds(20)
