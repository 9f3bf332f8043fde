"""The guest's cgroup tree, on files that look like one."""

from pathlib import Path

import pytest
from pymicro.agent import cgroups


def test_containers_leave_the_agent_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "ROOT", str(tmp_path))
    for group in (tmp_path, tmp_path / "pymicro"):
        group.mkdir(exist_ok=True)
        (group / "cgroup.controllers").write_text("cpu memory pids\n")
    cgroups.prepare()
    for group in (tmp_path, tmp_path / "pymicro"):
        assert (group / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    most = int(Path("/proc/sys/kernel/threads-max").read_text())
    left = most - int((tmp_path / "pymicro/pids.max").read_text())
    threads_of_kernel = sum(1 for each in Path("/proc").glob("[0-9]*/cmdline") if not each.read_bytes())
    assert left >= cgroups.RESERVED_THREADS + threads_of_kernel or left == most - most // 2
