"""What the runtime says that it can do, as containerd hands it on, holds in a VM."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymicro.shim.features import FEATURES

from tests.framework.ctr import Ctr
from tests.framework.pod import Pod

pytestmark = pytest.mark.usefixtures("only_our_runtime")


def test_containerd_understands_what_the_runtime_says_of_itself(ctr: Ctr) -> None:
    if ctr.containerd.version.startswith("1."):
        pytest.skip("containerd asks from 2.0 on")
    said = json.loads(ctr("plugins", "inspect-runtime", "--runtime", ctr.runtime).stdout)
    assert said["Name"] == ctr.runtime
    for part in ("hooks", "mountOptions", "ociVersionMax", "potentiallyUnsafeConfigAnnotations"):
        assert said["Features"][part] == FEATURES[part]
    linux = said["Features"]["linux"]
    assert linux == {name: value for name, value in FEATURES["linux"].items() if name in linux}, (
        "it knows no netDevices"
    )
    assert {"namespaces", "capabilities", "cgroup", "seccomp", "mountExtensions"} <= linux.keys()
    assert said["Annotations"]["io.pymicro.guest.kernel"].endswith("-pymicro")
    assert said["Annotations"]["io.pymicro.guest.crun"]


@pytest.fixture
def nested(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host with a file system mounted in it."""
    inner = tmp_path / "inner"
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inner], check=True)
    (inner / "file").write_text("there")
    yield tmp_path
    subprocess.run(["umount", "--lazy", inner], check=True)


def mount(source: Path, options: str) -> list[str]:
    return ["--mount", f"type=bind,src={source},dst=/data,options={options}"]


TRY = "cat /data/inner/file; for d in /data /data/inner; do touch $d/new 2>/dev/null && echo wrote $d; done; true"


@pytest.mark.parametrize(
    ("options", "writable"), [("rbind:rw", ["/data", "/data/inner"]), ("rbind:rro", []), ("rbind:ro", ["/data/inner"])]
)
def test_recursively_read_only_mounts(ctr: Ctr, nested: Path, options: str, writable: list[str]) -> None:
    done = ctr.run("sh", "-c", TRY, options=mount(nested, options))
    assert done.returncode == 0, done.stderr
    wrote = [line.removeprefix("wrote ") for line in done.stdout.replace("there", "").split("\n") if line]
    assert wrote == writable or (options == "rbind:ro" and wrote == []), "at least as strict as asked for"


def test_all_capabilities_that_are_claimed_can_be_had(pod: Pod) -> None:
    claimed = FEATURES["linux"]["capabilities"]
    wanted = [word for name in claimed for word in ("--cap-add", name)]
    done = pod.run("grep", "CapEff", "/proc/self/status", options=wanted)
    assert int(done.stdout.split()[1], 16) == (1 << len(claimed)) - 1


def test_the_guests_kernel_knows_the_seccomp_actions(pod: Pod) -> None:
    known = pod.run("cat", "/proc/sys/kernel/seccomp/actions_avail").stdout.upper().split()
    claimed = {action.removeprefix("SCMP_ACT_") for action in FEATURES["linux"]["seccomp"]["actions"]}
    assert {name.replace("KILL_THREAD", "KILL") for name in claimed} <= {
        name.replace("KILL_THREAD", "KILL") for name in known
    }


def test_a_user_namespace(pod: Pod) -> None:
    done = pod.run("cat", "/proc/self/uid_map", options=["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "100000", "65536"]
