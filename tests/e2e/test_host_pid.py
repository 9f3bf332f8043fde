"""A container that asks for the host's processes: refused, or given those of its VM (`vm.host_pid`)."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.framework import busybox
from tests.framework.ctr import Completed, Ctr

pytestmark = pytest.mark.usefixtures("only_our_runtime")


@pytest.fixture
def root() -> Iterator[Path]:
    with TemporaryDirectory(prefix="host-pid-") as directory:
        busybox.write_root(root := Path(directory) / "root")
        yield root


def run_with_host_pid(ctr: Ctr, root: Path, *command: str) -> Completed:
    """Run a container whose spec has no PID namespace, which `ctr` has no option for."""
    container_id = ctr.new_id()
    spec = json.loads(ctr("oci", "spec").stdout)
    spec["root"] = {"path": str(root)}
    spec["process"] |= {"args": list(command), "env": ["PATH=/bin"], "terminal": False}
    spec["linux"]["cgroupsPath"] = f"/{ctr.containerd.namespace}/{container_id}"
    spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != "pid"]
    file = root.parent / "spec.json"
    file.write_text(json.dumps(spec))
    return ctr("run", "--rm", "--runtime", ctr.runtime, "--config", str(file), container_id, check=False)


def test_the_hosts_processes_are_refused_with_what_can_be_had_instead(ctr: Ctr, root: Path) -> None:
    done = run_with_host_pid(ctr, root, "true")

    assert done.returncode != 0
    assert "a VM has no part in the host's processes" in done.stderr
    assert 'vm.host_pid = "guest"' in done.stderr


def test_a_container_may_get_the_processes_of_its_vm(ctr: Ctr, root: Path) -> None:
    ctr.containerd.write_settings(vm={"host_pid": "guest"})
    try:
        done = run_with_host_pid(ctr, root, "sh", "-c", "sleep 1000 & cat /proc/1/cmdline; echo; echo $$")
    finally:
        ctr.containerd.write_settings()

    first, own = done.stdout.replace("\0", " ").splitlines()
    assert (done.returncode, done.stderr) == (0, "")  # and the end is not the sleep's
    assert "pymicro" in first or "python" in first
    assert int(own) > 1
