"""Bad input gets a message that names the cause and the remedy, in ctr's output, and leaves nothing behind.

The settings come through `--runtime-config-path`, so one containerd serves all tests. That nothing is left is what the
`ctr` fixture proves after each of them.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.framework.ctr import PYMICRO, Completed, Ctr
from tests.framework.settings import dev_paths, write_settings

Failing = Callable[..., Completed]


@pytest.fixture(autouse=True)
def only_our_runtime(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--runtime") != PYMICRO:
        pytest.skip("these tests know pymicro's settings")


@pytest.fixture
def run_with(ctr: Ctr, tmp_path: Path) -> Failing:
    """Return a function that runs a container with the given tables of settings, which must fail."""

    def run(*options: str, command: tuple[str, ...] = ("true",), **tables: dict[str, object]) -> Completed:
        settings = tmp_path / "config.toml"
        write_settings(settings, **tables)
        done = ctr.run(*command, options=["--runtime-config-path", str(settings), *options])
        assert done.returncode == 1, f"it did not fail: {done}"
        assert done.stdout == ""
        return done

    return run


@pytest.mark.every_containerd
def test_misspelt_setting_names_the_nearest_key(run_with: Failing) -> None:
    message = run_with(vm={"memroy_mib": 512}).stderr
    assert "memroy_mib" in message
    assert "memory_mib" in message.replace("memroy_mib", "")
    assert "config.toml" in message


def test_settings_file_that_is_not_there(ctr: Ctr) -> None:
    done = ctr.run("true", options=["--runtime-config-path", "/nowhere/config.toml"])
    assert done.returncode == 1
    assert "/nowhere/config.toml" in done.stderr


@pytest.mark.parametrize(("key", "remedy"), [("kernel", "make kernel"), ("image", "make rootfs")])
def test_missing_guest_file_says_how_to_make_it(run_with: Failing, key: str, remedy: str) -> None:
    message = run_with(paths={key: f"/nowhere/{key}"}).stderr
    assert f"/nowhere/{key}" in message
    assert remedy in message


def damaged_copy(tmp_path: Path, key: str, damage: Callable[[Path], None]) -> Path:
    """Return a damaged copy of the kernel or image, its manifest beside it."""
    original = Path(str(dev_paths()[key]))
    directory = tmp_path / key
    directory.mkdir()
    copy = Path(shutil.copy(original, directory))
    shutil.copy(original.parent / "manifest.json", directory)
    damage(copy)
    return copy


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 20)


def lose_the_first_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(4096))


@pytest.mark.parametrize("damage", [cut_short, lose_the_first_page])
def test_corrupt_image_is_named(run_with: Failing, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    image = damaged_copy(tmp_path, "image", damage)
    message = run_with(paths={"image": str(image)}, vm={"start": "boot"}, timeouts={"hello": 30}).stderr
    assert str(image) in message
    assert "sha256" in message or "corrupt" in message


def test_no_qemu(run_with: Failing) -> None:
    message = run_with(paths={"qemu": "/nowhere/qemu"}).stderr
    assert "/nowhere/qemu" in message
    assert "paths.qemu" in message or "install" in message


def test_too_little_memory_names_the_least(run_with: Failing) -> None:
    message = run_with(vm={"memory_mib": 16}).stderr
    assert "memory_mib" in message
    assert "96" in message


def test_unusable_kvm_that_is_demanded(run_with: Failing) -> None:
    if "vmx" in Path("/proc/cpuinfo").read_text() or "svm" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this host may have KVM")
    begun = time.monotonic()
    message = run_with(vm={"accel": "kvm"}).stderr
    assert "KVM" in message
    assert "vm.accel" in message
    assert time.monotonic() - begun < 15


def test_net_host_is_refused(ctr: Ctr) -> None:
    done = ctr.run("true", options=["--net-host"])
    assert done.returncode == 1
    assert "--net-host" in done.stderr
    assert "network" in done.stderr


@pytest.mark.parametrize("name", ["io.pymicro.memroy_mib", "io.pymicro.nonsense"])
def test_unknown_annotation_is_refused(ctr: Ctr, name: str) -> None:
    done = ctr.run("true", options=["--annotation", f"{name}=512"])
    assert done.returncode == 1
    assert name in done.stderr
    if name == "io.pymicro.memroy_mib":
        assert "io.pymicro.memory_mib" in done.stderr


def test_annotation_that_is_not_allowed_says_what_would_allow_it(ctr: Ctr) -> None:
    done = ctr.run("true", options=["--annotation", "io.pymicro.accel=tcg"])
    assert done.returncode == 1
    assert "annotations.allow" in done.stderr


@pytest.mark.every_containerd
@pytest.mark.parametrize(
    ("command", "words"),
    [("no-such-program", "executable file not found in $PATH"), ("/no/such/program", "no such file or directory")],
)
def test_missing_binary_is_named_and_nothing_else_is_said(ctr: Ctr, command: str, words: str) -> None:
    done = ctr.run(command)
    assert done.returncode == 1
    assert f'exec: "{command}": {words}' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bind_source_that_is_not_there(ctr: Ctr) -> None:
    done = ctr.run("true", options=["--mount", "type=bind,src=/nowhere/data,dst=/data,options=rbind"])
    assert done.returncode == 1
    assert "/nowhere/data" in done.stderr


def test_guest_that_never_says_hello_shows_its_console(run_with: Failing) -> None:
    begun = time.monotonic()
    message = run_with(vm={"start": "boot"}, timeouts={"hello": 0.2}).stderr
    assert "hello" in message
    assert "0.2 s" in message
    assert "timeouts.hello" in message
    assert "console" in message
    assert time.monotonic() - begun < 20


def test_log_has_the_reason_too(run_with: Failing, ctr: Ctr) -> None:
    message = run_with(paths={"kernel": "/nowhere/kernel"}).stderr
    assert "/nowhere/kernel" in message
    assert "/nowhere/kernel" in ctr.containerd.log.read_text(errors="replace")


def test_each_start_writes_its_phases(ctr: Ctr) -> None:
    before = ctr.containerd.log.stat().st_size
    ctr.run("true")
    text = ctr.containerd.log.read_text(errors="replace")[before:]
    lines = [line for line in text.splitlines() if '"pymicro": "start"' in line]
    assert len(lines) == 1
    timeline = json.loads(lines[0][lines[0].index("{") :])
    assert timeline["container"] == ctr.ids[-1]
    assert {"shim", "rootfs", "vmm", "guest", "create", "start"} <= set(timeline["phases_ms"])
    assert all(milliseconds >= 0 for milliseconds in timeline["phases_ms"].values())
    assert timeline["total_ms"] > 0
