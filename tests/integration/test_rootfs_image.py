"""The guest image as built from Debian's packages: the same bytes each time, with what the agent needs inside."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INPUTS = ("agent/pymicro/agent", "protos/pymicro/wire", "rootfs-builder")
PYTHON = "/usr/bin/python3"  # the builder runs with the host's own interpreter
LARGEST = 45 * 1024 * 1024

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="building the image needs root"),
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap"),
    pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="needs erofs-utils"),
]


@dataclass(frozen=True)
class Built:
    """A finished image: its directory, its manifest, the cache that it is in."""

    directory: Path
    manifest: dict[str, Any]  # JSON
    cache: Path

    @property
    def image(self) -> Path:
        return self.directory / str(self.manifest["file"])


def copy_inputs(source: Path, target: Path) -> Path:
    for name in INPUTS:
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build(checkout: Path, cache: Path, umask: int = -1, **environment: str) -> Built:
    result = subprocess.run(
        [PYTHON, str(checkout / "rootfs-builder/build.py"), "--print-path"],
        env={**os.environ, "PYMICRO_CACHE": str(cache), **environment},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    directory = Path(result.stdout.splitlines()[-1])
    return Built(directory, json.loads((directory / "manifest.json").read_text()), cache)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the inputs, so that an edit in the work tree does not disturb a running test."""
    return copy_inputs(REPOSITORY, tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(checkout, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tree(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's files, unpacked from the finished erofs."""
    directory = tmp_path_factory.mktemp("unpacked") / "tree"
    subprocess.run(["fsck.erofs", f"--extract={directory}", str(built.image)], check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def guest_python(tree: Path) -> Callable[[str], Any]:
    """Run an expression in the guest's interpreter, with the options that PID 1 gets, and return its value."""

    def run(expression: str) -> Any:  # whatever the expression yields as JSON
        code = f"import json; print(json.dumps({expression}))"
        command = ["chroot", str(tree), "/usr/bin/python3", "-I", "-S", "-c", code]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return run


def test_two_builds_give_the_same_bytes_whatever_the_callers_environment(
    checkout: Path, built: Built, tmp_path: Path
) -> None:
    elsewhere = copy_inputs(checkout, tmp_path / "elsewhere")
    again = build(
        elsewhere, tmp_path / "cache", umask=0o077, PYTHONOPTIMIZE="1", PYTHONHASHSEED="7", LC_ALL="C", TZ="Asia/Tokyo"
    )
    assert again.manifest == built.manifest
    assert again.image.read_bytes() == built.image.read_bytes()
    assert again.directory.name == built.directory.name


def test_the_manifest_describes_the_image(built: Built) -> None:
    manifest = built.manifest
    assert manifest["file"] == "image.erofs"
    assert manifest["sha256"] == hashlib.sha256(built.image.read_bytes()).hexdigest()
    assert manifest["size"] == built.image.stat().st_size < LARGEST
    assert manifest["suite"] == "trixie"
    assert manifest["python"] == manifest["packages"]["python3.13-minimal"]
    assert manifest["crun"] == manifest["packages"]["crun"]
    assert {"libc6", "libseccomp2"} <= manifest["packages"].keys()
    assert {"dpkg", "tar", "debconf", "libssl3t64"}.isdisjoint(manifest["packages"])
    assert manifest["tools"].keys() == {"mmdebstrap", "mkfs.erofs"}


def test_a_second_checkout_builds_nothing(checkout: Path, built: Built, tmp_path: Path) -> None:
    elsewhere = copy_inputs(checkout, tmp_path)
    started = time.monotonic()
    assert build(elsewhere, built.cache).directory == built.directory
    assert time.monotonic() - started < 2


def test_the_cache_holds_the_two_layers_and_no_leftovers(built: Built) -> None:
    names = sorted(path.name.split("-")[0] for path in built.cache.iterdir())
    assert names == [".rootfs.lock", "base", "image"]
    assert str(built.cache) not in Path("/proc/self/mountinfo").read_text()


def test_an_edit_of_the_agent_does_not_fetch_debian_again(checkout: Path, built: Built, tmp_path: Path) -> None:
    edited = copy_inputs(checkout, tmp_path)
    (edited / "agent/pymicro/agent/added.py").write_text("VALUE = 7\n")
    started = time.monotonic()
    another = build(edited, built.cache)
    assert time.monotonic() - started < 5  # 0.6 s on an idle machine, fetching takes 8
    assert another.directory != built.directory
    assert len(list(built.cache.glob("base-*"))) == 1
    shutil.rmtree(another.directory)


def test_a_mistake_in_the_agent_is_named_and_publishes_nothing(checkout: Path, built: Built, tmp_path: Path) -> None:
    broken = copy_inputs(checkout, tmp_path)
    (broken / "agent/pymicro/agent/broken.py").write_text("def broken(:\n")
    before = sorted(built.cache.iterdir())
    result = subprocess.run(
        [PYTHON, str(broken / "rootfs-builder/build.py")],
        env={**os.environ, "PYMICRO_CACHE": str(built.cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "pymicro/agent/broken.py" in result.stderr
    assert sorted(built.cache.iterdir()) == before


def test_every_module_is_precompiled_and_none_depends_on_a_file_time(tree: Path) -> None:
    assert list(tree.rglob("*.py")) == []
    compiled = list(tree.rglob("*.pyc"))
    assert len(compiled) > 300
    # PEP 552: bytes 4 to 8 are flags, 1 is "by hash", 2 "checked at run time"
    assert {path.read_bytes()[4:8] for path in compiled} == {b"\1\0\0\0"}


def test_the_guest_loads_the_bytecode(guest_python: Callable[[str], Any]) -> None:
    assert guest_python("json.__spec__.origin") == "/usr/lib/python3.13/json/__init__.pyc"
    assert guest_python("type(json.__loader__).__name__") == "SourcelessFileLoader"


@pytest.mark.parametrize("module", ["socket", "subprocess", "ctypes", "threading", "hashlib", "asyncio", "zoneinfo"])
def test_the_standard_library_works(guest_python: Callable[[str], Any], module: str) -> None:
    assert guest_python(f"__import__({module!r}).__name__") == module


def test_pid_1_is_what_the_manifest_says(built: Built, tree: Path) -> None:
    program, *arguments = built.manifest["init"]
    assert (tree / program.lstrip("/")).exists()
    script = tree / arguments[-1].lstrip("/")
    assert script.read_bytes()[4:8] == b"\1\0\0\0"


def test_all_modules_of_agent_and_wire_are_inside(checkout: Path, tree: Path) -> None:
    for portion in INPUTS[:2]:
        directory = checkout / portion
        wanted = {path.relative_to(directory.parent).with_suffix(".pyc") for path in directory.rglob("*.py")}
        inside = tree / "usr/lib/pymicro/pymicro"
        assert {path.relative_to(inside) for path in (inside / directory.name).rglob("*.pyc")} == wanted


def test_there_is_a_place_to_mount_on(tree: Path) -> None:
    for name in ("proc", "sys", "dev", "run", "tmp"):
        assert (tree / name).is_dir()
    assert (tree / "etc/machine-id").read_bytes() == b""
    assert "root:x:0:0:" in (tree / "etc/passwd").read_text()


def test_no_package_manager_and_no_shell_are_inside(tree: Path) -> None:
    assert {path.name for path in (tree / "usr/bin").iterdir()} == {"crun", "python3", "python3.13"}
    assert not (tree / "var/lib/dpkg").exists()
    assert not (tree / "usr/share").exists()


def test_a_killed_build_leaves_no_process_and_the_next_one_cleans_up(checkout: Path, tmp_path: Path) -> None:
    builder = subprocess.Popen(
        [PYTHON, str(checkout / "rootfs-builder/build.py")],
        env={**os.environ, "PYMICRO_CACHE": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    until(lambda: any("mmdebstrap" in line for line in command_lines(str(tmp_path))), "mmdebstrap runs")
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    until(lambda: not command_lines(str(tmp_path)), "every process of the build has gone")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert list(tmp_path.glob(".rootfs-tmp-*"))
    build(checkout, tmp_path)
    assert not list(tmp_path.glob(".rootfs-tmp-*"))


def command_lines(needle: str) -> list[str]:
    """Return the command lines of all processes that mention `needle`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if needle in line:
            found.append(line)
    return found


def until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s and it is not so that {what}"
        time.sleep(0.02)
