"""The small file helpers and what is read from cgroups, on ordinary directories."""

from pathlib import Path

from pymicro.agent import cgroups, files


def test_make_and_remove_a_tree(tmp_path: Path) -> None:
    deep = tmp_path / "a/b/c"
    files.make_directories(str(deep))
    files.make_directories(str(deep))
    (deep / "file").write_text("x")
    (tmp_path / "outside").mkdir()
    (deep / "link").symlink_to(tmp_path / "outside")
    files.remove_tree(str(tmp_path / "a"))
    files.remove_tree(str(tmp_path / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


def test_write_and_read(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    files.write_text(path, "grüße\n")
    assert files.read_text(path) == "grüße\n"
    files.write_text(path, "x")
    assert files.read_text(path) == "x"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_pids_of_nested_groups(tmp_path: Path) -> None:
    (tmp_path / "a.slice/b").mkdir(parents=True)
    (tmp_path / "cgroup.procs").write_text("30\n")
    (tmp_path / "a.slice/cgroup.procs").write_text("")
    (tmp_path / "a.slice/b/cgroup.procs").write_text("10\n20\n")
    assert cgroups.pids(str(tmp_path)) == [10, 20, 30]
    assert cgroups.pids(str(tmp_path / "gone")) == []


def test_stats_are_the_files_that_are_there(tmp_path: Path) -> None:
    for name in ("memory.current", "hugetlb.2MB.current", "cgroup.procs", "cpu.stat"):
        (tmp_path / name).write_text(name)
    expected = {name: name for name in ("memory.current", "hugetlb.2MB.current", "cpu.stat")}
    assert cgroups.stats(str(tmp_path)) == expected
    assert cgroups.stats(str(tmp_path / "gone")) == {}
