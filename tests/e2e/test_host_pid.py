"""A container that asks for the host's processes: refused, or given those of its VM (`vm.host_pid`)."""

from pathlib import Path

import pytest

from tests.framework.ctr import Completed, Ctr
from tests.framework.specs import Spec, run_arguments

pytestmark = pytest.mark.usefixtures("only_our_runtime")


def run_with_host_pid(ctr: Ctr, directory: Path, *command: str) -> Completed:
    """Run a container whose spec has no PID namespace."""

    def change(spec: Spec) -> None:
        spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != "pid"]

    return ctr(*run_arguments(ctr, directory, *command, change=change), check=False)


def test_the_hosts_processes_are_refused_with_what_can_be_had_instead(ctr: Ctr, tmp_path: Path) -> None:
    done = run_with_host_pid(ctr, tmp_path, "true")

    assert done.returncode != 0
    assert "a VM has no part in the host's processes" in done.stderr
    assert 'vm.host_pid = "guest"' in done.stderr


def test_a_container_may_get_the_processes_of_its_vm(ctr: Ctr, tmp_path: Path) -> None:
    ctr.containerd.write_settings(vm={"host_pid": "guest"})
    try:
        done = run_with_host_pid(ctr, tmp_path, "sh", "-c", "sleep 1000 & cat /proc/1/cmdline; echo; echo $$")
    finally:
        ctr.containerd.write_settings()

    first, own = done.stdout.replace("\0", " ").splitlines()
    assert (done.returncode, done.stderr) == (0, "")  # and the end is not the sleep's
    assert "pymicro" in first or "python" in first
    assert int(own) > 1
