"""Templates that something has happened to: the pod boots cold, one warning says why, and nothing of them is left."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.framework.ctr import Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.shimlog import ShimLog
from tests.framework.waiting import seconds, until

pytestmark = pytest.mark.usefixtures("only_our_runtime")

SIZE = 256
"""MiB that a VM has unless its pod asks for more."""
FULL_MIB = 40
"""Less than a template takes."""
ELSEWHERE = "elsewhere"
"""Where a test has moved something to."""


@pytest.fixture
def store(ctr: Ctr) -> Iterator[Path]:
    """Yield an empty directory, from whose templates pods start."""
    with tempfile.TemporaryDirectory(prefix="pymicro-test-", dir="/dev/shm") as directory:
        use(ctr, Path(directory))
        yield Path(directory)
        ctr.containerd.write_settings()


@pytest.fixture
def template(ctr: Ctr, store: Path) -> Path:
    """Return the directory of the template that the next pod would go on from; it has just been made."""
    return made(ctr, store, SIZE)


def use(ctr: Ctr, store: Path) -> None:
    """Have pods start from the templates in `store`."""
    ctr.containerd.write_settings(vm={"start": "snapshot"}, templates={"directory": str(store)})


def made(ctr: Ctr, store: Path, memory_mib: int) -> Path:
    """Make a template for VMs of this size, and return its directory."""
    done = subprocess.run(
        [ctr.containerd.bin / "pymicroctl", "template", "build", "--memory", str(memory_mib)],
        env={**os.environ, **ctr.containerd.client_environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=seconds(60),
        check=True,
    )
    return store / done.stdout.strip()


def templates(store: Path) -> list[Path]:
    """Return all directories in `store`: sound, damaged and half-made templates."""
    return [path for path in store.iterdir() if path.is_dir() or path.is_symlink()]


@contextmanager
def one_cold_start(ctr: Ctr, leftovers: Leftovers) -> Iterator[list[str]]:
    """Run a container at the end of the block; it must start cold, and the one warning is added to the yielded list."""
    log, container_id = ShimLog(ctr.containerd), ctr.new_id()
    warnings: list[str] = []
    yield warnings

    done = ctr.run("sh", "-c", "echo well; exit 7", container_id=container_id)

    assert (done.returncode, done.stdout, done.stderr) == (7, "well\n", "")
    until(lambda: bool(log.warnings()), 5)
    assert log.cold([container_id]) == [container_id]
    warnings += log.warnings()
    assert len(warnings) == 1, warnings
    leftovers.check()


# -- a template's files ------------------------------------------------------------------------------------------------


def overwritten(name: str, part: float) -> Callable[[Path], None]:
    """Return a function that changes one byte of a template's file: the first one for part 0, the last one for 1."""

    def damage(template: Path) -> None:
        path = template / name
        with path.open("r+b") as file:
            at = int((path.stat().st_size - 1) * part)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    return damage


def cut(name: str, part: float) -> Callable[[Path], None]:
    """Return a function that keeps this part of a template's file."""
    return lambda template: os.truncate(template / name, int((template / name).stat().st_size * part))


def missing(name: str) -> Callable[[Path], None]:
    return lambda template: (template / name).unlink()


def linked(name: str) -> Callable[[Path], None]:
    """Return a function that moves a file and leaves a link to it."""

    def damage(template: Path) -> None:
        (template / name).rename(template / ELSEWHERE)
        (template / name).symlink_to(ELSEWHERE)

    return damage


def directory_linked(template: Path) -> None:
    elsewhere = template.with_name(ELSEWHERE)
    template.rename(elsewhere)
    template.symlink_to(elsewhere)


DAMAGE = {
    "first byte of memory": overwritten("memory", 0),
    "last byte of memory": overwritten("memory", 1),
    "memory is a link": linked("memory"),
    "byte of state": overwritten("state", 0.5),
    "state cut": cut("state", 0.99),
    "state missing": missing("state"),
    "byte of manifest": overwritten("manifest", 0.5),
    "manifest missing": missing("manifest"),
    "directory is a link": directory_linked,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_template_is_discarded_and_the_pod_boots_cold(
    ctr: Ctr, leftovers: Leftovers, template: Path, damage: Callable[[Path], None]
) -> None:
    with one_cold_start(ctr, leftovers) as warnings:
        damage(template)

    assert template.name in warnings[0]
    assert not os.path.lexists(template)
    assert {path.name for path in templates(template.parent)} <= {ELSEWHERE}


def test_another_templates_manifest_is_noticed(ctr: Ctr, leftovers: Leftovers, template: Path) -> None:
    other = made(ctr, template.parent, SIZE + 64)

    with one_cold_start(ctr, leftovers) as warnings:
        shutil.copy(other / "manifest", template / "manifest")

    assert template.name in warnings[0]
    assert templates(template.parent) == [other]


def test_a_removed_template_is_made_again_and_nobody_is_warned(ctr: Ctr, leftovers: Leftovers, template: Path) -> None:
    shutil.rmtree(template)
    log, container_id = ShimLog(ctr.containerd), ctr.new_id()

    assert ctr.run("echo", "well", container_id=container_id).stdout == "well\n"

    assert log.cold([container_id]) == []
    assert log.warnings() == []
    assert templates(template.parent) == [template]
    leftovers.check()


# -- the place where templates lie -------------------------------------------------------------------------------------


@pytest.fixture
def small_tmpfs(ctr: Ctr, tmp_path: Path) -> Iterator[Path]:
    """Yield a directory for templates on a tmpfs that none fits into."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_MIB}m", "pymicro-test", tmp_path], check=True)
    use(ctr, tmp_path / "templates")
    yield tmp_path / "templates"
    ctr.containerd.write_settings()
    subprocess.run(["umount", tmp_path], check=True)


def test_a_tmpfs_that_is_full_is_named_and_the_pod_boots_cold(
    ctr: Ctr, leftovers: Leftovers, small_tmpfs: Path
) -> None:
    with one_cold_start(ctr, leftovers) as warnings:
        pass

    assert str(small_tmpfs) in warnings[0]
    assert "MiB left" in warnings[0] or "full" in warnings[0]
    assert templates(small_tmpfs) == []


def test_a_directory_that_others_can_enter_is_not_used(ctr: Ctr, leftovers: Leftovers, store: Path) -> None:
    store.chmod(0o755)

    with one_cold_start(ctr, leftovers) as warnings:
        pass

    assert str(store) in warnings[0]
    assert list(store.iterdir()) == []
