"""Host cgroups: paths from specs, both versions on trees that are like the real ones, and the real ones under root."""

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymicro.shim import cgroup

from tests.framework.fakes import needs_root

MIB = 1 << 20


@pytest.mark.parametrize(
    ("cgroups_path", "relative"),
    [
        ("/default/c1", "default/c1"),
        ("default/c1", "default/c1"),
        ("", "pymicro/c1"),
        ("/", "pymicro/c1"),
        ("//", "pymicro/c1"),
        ("//default//c1/", "default/c1"),
        ("/kubepods/burstable/pod1/c1", "kubepods/burstable/pod1/c1"),
        ("system.slice:docker:abc", "system.slice/docker-abc.scope"),
        ("user-1000.slice:nerdctl:abc", "user.slice/user-1000.slice/nerdctl-abc.scope"),
        (
            "kubepods-besteffort-pod1.slice:cri-containerd:abc",
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-abc.scope",
        ),
        ("-.slice:cri:abc", "cri-abc.scope"),
        ("a.slice::name", "a.slice/name.scope"),
        ("a.slice:p:b.slice", "a.slice/b.slice"),
    ],
)
def test_paths_of_specs(cgroups_path: str, relative: str) -> None:
    assert cgroup.relative_path(cgroups_path, "pymicro/c1") == relative


@pytest.mark.parametrize(
    "path", ["..", "/..", "../../etc", "/a/../../../etc", "a/../..", "../../x:y:z", "x:../../../y:z"]
)
def test_no_path_leaves_the_hierarchy(path: str) -> None:
    relative = cgroup.relative_path(path, "pymicro/c1")
    assert os.path.normpath(f"/root/{relative}").startswith("/root/")
    assert ".." not in relative.split("/")


@settings(deadline=None)
@given(st.text(alphabet="ab./:-\0é", max_size=20))
def test_any_text_gives_a_path_inside(text: str) -> None:
    relative = cgroup.relative_path(text, "pymicro/c1")
    assert relative
    assert not relative.startswith("/")
    assert os.path.normpath(f"/root/{relative}") == f"/root/{relative}"


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """A tree like cgroups v1: a directory per controller, two of them one hierarchy."""
    root = tmp_path / "cgroup"
    for controller in ("memory", "cpu,cpuacct", "cpuset", "pids", "unknown"):
        (root / controller).mkdir(parents=True)
    for name in ("cpu", "cpuacct"):
        (root / name).symlink_to("cpu,cpuacct")
    return root


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpu memory pids\n")
    return root


def test_v1_has_one_directory_per_hierarchy(v1: Path) -> None:
    assert not cgroup.is_v2(str(v1))
    found = [os.path.relpath(path, v1) for path in cgroup.directories("a/c1", str(v1))]
    assert found == ["memory/a/c1", "cpu/a/c1", "cpuset/a/c1", "pids/a/c1"]


def test_v2_has_one_directory(v2: Path) -> None:
    assert cgroup.is_v2(str(v2))
    assert cgroup.directories("a/c1", str(v2)) == (f"{v2}/a/c1",)


def test_v1_creation_goes_from_the_top_and_may_be_repeated(v1: Path) -> None:
    groups = cgroup.directories("a/b/c1", str(v1))
    for _ in range(2):
        cgroup.create(groups, str(v1))
        assert all(Path(group).is_dir() for group in groups)
    assert sorted(path.name for path in v1.iterdir()) == [
        "cpu",
        "cpu,cpuacct",
        "cpuacct",
        "cpuset",
        "memory",
        "pids",
        "unknown",
    ]


def test_v2_creation_enables_controllers_on_the_way(v2: Path) -> None:
    cgroup.create(cgroup.directories("a/c1", str(v2)), str(v2))
    assert (v2 / "a/c1").is_dir()
    for level in (v2, v2 / "a"):
        assert (level / "cgroup.subtree_control").read_text() == "+cpuset"  # of a file, the last write remains
    assert not (v2 / "a/c1/cgroup.subtree_control").exists()


def limits(directory: Path, resources: dict[str, dict[str, int]], *, unified: bool, names: str) -> dict[str, str]:
    """Write `resources` into a directory with the files `names`, and return what changed."""
    for name in names.split():
        (directory / name).write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroup, "is_v2", lambda root=cgroup.ROOT: unified)
        cgroup.write_limits([str(directory)], resources)
    return {path.name: path.read_text() for path in directory.iterdir() if path.read_text()}


V1_FILES = "memory.limit_in_bytes memory.soft_limit_in_bytes cpu.shares cpu.cfs_period_us cpu.cfs_quota_us pids.max"
V2_FILES = "memory.max memory.low cpu.max cpu.weight pids.max"
RESOURCES = {
    "memory": {"limit": 256 * MIB, "reservation": 128 * MIB},
    "cpu": {"shares": 512, "quota": 50000, "period": 100000},
    "pids": {"limit": 100},
}


def test_v1_limits(tmp_path: Path) -> None:
    assert limits(tmp_path, RESOURCES, unified=False, names=V1_FILES) == {
        "memory.limit_in_bytes": str(256 * MIB),
        "memory.soft_limit_in_bytes": str(128 * MIB),
        "cpu.shares": "512",
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "50000",
        "pids.max": "100",
    }


def test_v2_limits(tmp_path: Path) -> None:
    assert limits(tmp_path, RESOURCES, unified=True, names=V2_FILES) == {
        "memory.max": str(256 * MIB),
        "memory.low": str(128 * MIB),
        "cpu.max": "50000 100000",
        "cpu.weight": "20",
        "pids.max": "100",
    }


def test_unlimited_is_spelled_max_in_v2(tmp_path: Path) -> None:
    unlimited = {"memory": {"limit": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}}
    assert limits(tmp_path, unlimited, unified=True, names=V2_FILES) == {
        "memory.max": "max",
        "cpu.max": "max 100000",
        "pids.max": "max",
    }


def test_unlimited_pids_are_spelled_max_in_v1(tmp_path: Path) -> None:
    assert limits(tmp_path, {"pids": {"limit": -1}}, unified=False, names=V1_FILES) == {"pids.max": "max"}


@pytest.mark.parametrize(("shares", "weight"), [(1, 1), (2, 1), (1024, 39), (262144, 10000), (1 << 30, 10000)])
def test_shares_become_weights(tmp_path: Path, shares: int, weight: int) -> None:
    assert limits(tmp_path, {"cpu": {"shares": shares}}, unified=True, names=V2_FILES) == {"cpu.weight": str(weight)}


@pytest.mark.parametrize("unified", [True, False])
def test_no_limits_and_absent_files_are_fine(tmp_path: Path, *, unified: bool) -> None:
    assert limits(tmp_path, {}, unified=unified, names=V1_FILES) == {}
    for path in tmp_path.iterdir():
        path.unlink()
    assert limits(tmp_path, RESOURCES, unified=unified, names="") == {}


def test_processes_that_we_cannot_see_are_not_killed(tmp_path: Path) -> None:
    """A process of another pid namespace shows as 0, and kill(0) would be ourselves."""
    (tmp_path / "cgroup.procs").write_text("0\n41\n42\n")
    assert cgroup.processes([str(tmp_path), str(tmp_path / "absent")]) == {41, 42}


def test_removing_what_is_not_there(tmp_path: Path) -> None:
    cgroup.remove([str(tmp_path / "absent")])
    assert cgroup.kill([str(tmp_path / "absent")]) == set()


@pytest.fixture
def real() -> Iterator[tuple[str, ...]]:
    groups = cgroup.directories(f"pymicro-test-{secrets.token_hex(4)}/c1")
    try:
        cgroup.create(groups)
    except OSError as error:
        pytest.skip(f"cgroups cannot be made here: {error}")
    yield groups
    cgroup.kill(groups)
    cgroup.remove(groups)
    cgroup.remove([os.path.dirname(group) for group in groups])
    assert not any(os.path.exists(group) for group in groups)


@needs_root
def test_real_cgroups_are_joined_killed_and_removed(real: tuple[str, ...]) -> None:
    process = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: cgroup.join(real))  # noqa: PLW1509  # no threads here
    assert cgroup.processes(real) == {process.pid}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroup, "KILL_TIMEOUT", 5.0)
        assert cgroup.kill(real) == set()
    assert process.wait(5) == -9
    cgroup.remove(real)
    assert not any(os.path.exists(group) for group in real)


@needs_root
def test_real_limits_are_taken(real: tuple[str, ...]) -> None:
    cgroup.write_limits(real, {"memory": {"limit": 64 * MIB}, "pids": {"limit": 50}})
    texts = {
        name: Path(group, name).read_text().strip()
        for group in real
        for name in os.listdir(group)
        if name in {"memory.limit_in_bytes", "memory.max", "pids.max"} and os.access(Path(group, name), os.R_OK)
    }
    assert texts.get("memory.limit_in_bytes", texts.get("memory.max", str(64 * MIB))) == str(64 * MIB)
    assert texts.get("pids.max", "50") == "50"
