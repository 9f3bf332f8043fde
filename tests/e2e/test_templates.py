"""Whatever has happened to a template, or to the place where it lies: the pod starts, one warning says why, and nothing
is left behind.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.framework.ctr import PYMICRO, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.sandbox import Sandbox, eventually
from tests.framework.waiting import seconds


@pytest.fixture(autouse=True)
def only_our_runtime(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--runtime") != PYMICRO:
        pytest.skip("these tests know how pymicro is built")


@pytest.fixture
def small(ctr: Ctr, templates: Path) -> Iterator[Callable[[int], Path]]:
    """Yield a function that mounts a tmpfs of so many MiB for the templates."""
    mounted = templates / "mounted"

    def mount(mib: int) -> Path:
        mounted.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "none", mounted], check=True)
        ctr.containerd.write_settings(vm={"start": "snapshot"}, templates={"directory": str(mounted)})
        return mounted

    yield mount
    if mounted.exists():
        subprocess.run(["umount", mounted], check=True)


@contextmanager
def one_warning(ctr: Ctr, why: str) -> Iterator[None]:
    """Fail unless the shims said exactly once that a pod boots cold in this block, and why."""
    log = ctr.containerd.log
    before = log.stat().st_size

    def warnings() -> list[str]:
        return [line for line in log.read_bytes()[before:].decode().splitlines() if "boots cold" in line]

    yield
    eventually(lambda: len(warnings()) > 0, "a warning in containerd's log", 2.0)
    (warning,) = warnings()
    assert why in warning


def says_well(ctr: Ctr) -> None:
    assert ctr.run("echo", "well").stdout == "well\n"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_damaged_template_costs_one_cold_boot(ctr: Ctr, leftovers: Leftovers, templates: Path) -> None:
    says_well(ctr)
    (name,) = names(templates)
    with (templates / name / "memory").open("r+b") as memory:
        memory.seek(16 << 20)
        memory.write(b"damage")

    with one_warning(ctr, f"template {name} is discarded: changed since it was made: memory"):
        says_well(ctr)
    assert names(templates) == []

    says_well(ctr)
    assert names(templates) == [name]
    leftovers.check()


def test_a_tmpfs_that_is_too_small_is_named(ctr: Ctr, leftovers: Leftovers, small: Callable[[int], Path]) -> None:
    directory = small(20)
    with one_warning(ctr, f"{directory} (templates.directory) is on a file system with 20 MiB left"):
        says_well(ctr)
    assert names(directory) == []
    leftovers.check()


def test_a_tmpfs_that_fills_up_while_a_template_is_made_is_named(
    ctr: Ctr, leftovers: Leftovers, small: Callable[[int], Path]
) -> None:
    directory = small(120)
    container_id = ctr.new_id()
    with one_warning(ctr, f"the file system of {directory} (templates.directory) is full"):
        client = ctr.popen("echo", "well", container_id=container_id)
        Sandbox(ctr.containerd, container_id).wait_for("qemu")
        with (directory / "filler").open("wb", buffering=0) as filler, suppress(OSError):  # ENOSPC, in the end
            while True:
                filler.write(bytes(1 << 20))
        output, _ = client.communicate(timeout=seconds(60))
    assert (client.returncode, output) == (0, b"well\n")
    assert names(directory) == ["filler"]
    leftovers.check()


def test_pymicroctl_makes_shows_and_removes_them(ctr: Ctr, templates: Path) -> None:
    def template(*arguments: str) -> str:
        return subprocess.run(
            [ctr.containerd.bin / "pymicroctl", "template", *arguments],
            env={**os.environ, **ctr.containerd.client_environment},
            stdout=subprocess.PIPE,
            text=True,
            timeout=seconds(60),
            check=True,
        ).stdout

    name = template("build").strip()
    assert names(templates) == [name]
    row = template("list").splitlines()[1].split()
    assert (row[0], row[-1]) == (name, "ok")
    assert 10 < int(row[4]) < 100, "MiB held"
    says_well(ctr)
    assert template("prune") == ""

    (templates / name / "state").write_bytes(b"damage")
    assert template("prune") == f"{name}  damaged: changed since it was made: state\n"
    assert names(templates) == []
