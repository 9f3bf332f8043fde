"""Root filesystems of every snapshotter: readable, writable, what was written is in the snapshot, and nothing stays."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import patient_timeouts
from tests.framework import oci, thinpool
from tests.framework.busybox import write_archive
from tests.framework.containerd import REPOSITORY, USUAL, Containerd, claimed_directory
from tests.framework.ctr import Container, Ctr
from tests.framework.leftovers import Leftovers, loop_files
from tests.framework.pod import Pod
from tests.framework.sandbox import SHIM, Sandbox
from tests.framework.waiting import until

SNAPSHOTTERS = ("overlayfs", "native", "blockfile", "erofs")
ON_DEVICES = ("blockfile",)
"""Those whose root filesystems have a device of their own, on every containerd that has them."""

WRITES = "mkdir /new && mv /etc/passwd /new && rm /etc/group; echo by the container >> /written; sleep 100000"


def require(containerd: Containerd, snapshotter: str) -> None:
    """Skip where this containerd has no such snapshotter, or could not load it."""
    rows = [line.split() for line in containerd.ctr("plugins", "ls").stdout.splitlines()]
    states = [row[-1] for row in rows if row[0].endswith("snapshotter.v1") and row[1] == snapshotter]
    if states != ["ok"]:
        pytest.skip(
            f"this host lacks what the snapshotter {snapshotter} needs"
            if states
            else f"containerd {containerd.version} has no snapshotter {snapshotter}"
        )


@pytest.fixture(params=SNAPSHOTTERS)
def snapshotter(containerd: Containerd, request: pytest.FixtureRequest) -> str:
    """Return the name of a snapshotter that this containerd has."""
    require(containerd, request.param)
    return str(request.param)


def diff(ctr: Ctr, snapshotter: str, container_id: str) -> dict[str, bytes]:
    """Return what a snapshot has more than its image, as `ctr snapshots diff` exports it: contents by name.

    It cannot where a snapshot's mounts are for containerd's mount manager.
    """
    client = ctr.client("snapshots", "--snapshotter", snapshotter, "diff", container_id)
    archive, said = client.communicate(timeout=60)
    assert client.returncode == 0, said.decode()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [(member, tar.extractfile(member)) for member in tar]
        return {member.name.strip("/"): file.read() if file else b"" for member, file in members}


def for_the_mount_manager(ctr: Ctr, snapshotter: str) -> bool:
    """Tell whether containerd itself mounts what a snapshot consists of; that goes with the container, not the task."""
    return snapshotter == "erofs" and ctr.containerd.version not in {"2.0", "2.1"}


def start(ctr: Ctr, snapshotter: str, script: str) -> Container:
    """Start a container of the snapshotter that runs `script`, which ends with WRITES; return it when that is done."""
    container = ctr.start("sh", "-c", script, options=["--snapshotter", snapshotter])
    until(lambda: container.exec("test", "-s", "/written").returncode == 0)
    return container


@pytest.mark.every_containerd
def test_what_a_container_writes_is_in_its_snapshot(ctr: Ctr, snapshotter: str) -> None:
    container = start(ctr, snapshotter, WRITES)
    assert container.exec("cat", "/new/passwd").stdout.startswith("root:x:0:0")
    ctr("tasks", "rm", "--force", container.id)
    if not for_the_mount_manager(ctr, snapshotter):
        written = diff(ctr, snapshotter, container.id)
        assert written["written"] == b"by the container\n"
        assert written["new/passwd"].startswith(b"root:x:0:0")
        assert {"etc/.wh.passwd", "etc/.wh.group"} <= written.keys()
    ctr("tasks", "start", "--detach", "--null-io", container.id)
    until(lambda: container.exec("cat", "/written").stdout == "by the container\n" * 2)
    assert container.exec("ls", "/etc").stdout == ""


def test_a_root_filesystem_can_be_read_only(ctr: Ctr, snapshotter: str) -> None:
    options = ["--snapshotter", snapshotter, "--read-only"]
    done = ctr.run("sh", "-c", "cat /etc/group && touch /written", options=options)
    assert done.stdout.startswith("root:x:0:")
    assert "Read-only file system" in done.stderr


def test_nothing_stays_when_the_shim_is_killed(ctr: Ctr, snapshotter: str, leftovers: Leftovers) -> None:
    container = start(ctr, snapshotter, WRITES)
    assert container.exec("cat", "/written").returncode == 0
    Sandbox(ctr.containerd, container.id).kill(SHIM)
    if for_the_mount_manager(ctr, snapshotter):
        ctr("containers", "rm", container.id)
        ctr("content", "prune", "references")  # containerd collects garbage
        leftovers.check()
    else:
        leftovers.check()
        assert diff(ctr, snapshotter, container.id)["written"] == b"by the container\n"


@pytest.mark.parametrize("snapshotter", ON_DEVICES, indirect=True)
def test_a_device_is_free_when_delete_has_answered(pod: Pod, snapshotter: str) -> None:
    """Also while the VM goes on, with other containers: what it remembers of files would keep them open on the host."""
    container = start(pod, snapshotter, f"find / -xdev >/dev/null; {WRITES}")
    assert container.exec("cat", "/written").returncode == 0
    assert len(loop_files(pod.containerd.home)) == 1
    pod("tasks", "rm", "--force", container.id)
    assert loop_files(pod.containerd.home) == []
    assert diff(pod, snapshotter, container.id)["written"] == b"by the container\n"
    assert pod.first.exec("true").returncode == 0


@pytest.fixture(params=["ext4", "xfs"])
def devmapper(
    artefacts: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest, only_our_runtime: None
) -> Iterator[Ctr]:
    """Yield a client of a containerd whose snapshotter `devmapper` has a thin pool and makes file systems of a type."""
    if lacking := thinpool.missing():
        pytest.skip(lacking)
    if shutil.which(f"mkfs.{request.param}") is None:
        pytest.skip(f"there is no mkfs.{request.param}")
    with claimed_directory(REPOSITORY / "build/devmapper") as directory:
        name = f"pymicro-{tmp_path.name}"
        settings = {"root_path": f"{directory}/root/devmapper", "pool_name": name, "fs_type": request.param}
        plugins = {"devmapper": {**settings, "base_image_size": "384MB" if request.param == "xfs" else "32MB"}}
        timeouts = {"timeouts": patient_timeouts()}
        containerd = Containerd(USUAL, directory, namespace="test", settings=timeouts, snapshotters=plugins)
        with thinpool.thin_pool(tmp_path, name):
            try:
                containerd.start(environment=thinpool.ENVIRONMENT)
                client = Ctr(containerd)
                nothing = Leftovers(containerd, client.ids)
                yield client
                client.clean_up()
                nothing.check()
            finally:
                containerd.stop()


@pytest.mark.kvm
@pytest.mark.slow
def test_a_thin_device_is_the_root_and_has_what_was_written(devmapper: Ctr) -> None:
    container = start(devmapper, "devmapper", WRITES)
    assert container.exec("cat", "/new/passwd").stdout.startswith("root:x:0:0")
    devmapper("tasks", "rm", "--force", container.id)
    assert diff(devmapper, "devmapper", container.id)["written"] == b"by the container\n"
    devmapper("tasks", "start", "--detach", "--null-io", container.id)
    assert container.exec("cat", "/written").stdout == "by the container\n" * 2
    Sandbox(devmapper.containerd, container.id).kill(SHIM)
    Leftovers(devmapper.containerd, devmapper.ids).check()
    devmapper("containers", "rm", container.id)  # containerd cannot remove a device that is in use


def test_containers_of_a_pod_with_different_snapshotters(pod: Pod) -> None:
    """The second one's layers are mounted by containerd when the pod runs already."""
    for snapshotter in SNAPSHOTTERS:
        require(pod.containerd, snapshotter)
        container = start(pod, snapshotter, WRITES)
        assert container.exec("cat", "/new/passwd").stdout.startswith("root:x:0:0"), snapshotter


def test_more_layers_than_a_page_of_mount_options_names(ctr: Ctr, tmp_path: Path) -> None:
    name, layers = "localhost/layers:latest", 100
    thin = []
    for number in range(layers):
        one = oci.Layer()
        one.file(f"layer-{number}", str(number).encode())
        thin.append(one.data())
    write_archive(tmp_path / "image.tar", name, above=thin)
    ctr("images", "import", str(tmp_path / "image.tar"))
    try:
        container_id = ctr.new_id()
        ctr("run", "--detach", "--null-io", "--runtime", ctr.runtime, name, container_id, "sleep", "100000")
        container = Container(ctr, container_id)
        assert container.exec("sh", "-c", "cat /layer-* | wc -w; echo new >> /layer-7").stdout.strip() == "1"
        assert len(container.exec("sh", "-c", "ls -d /layer-*").stdout.split()) == layers
        ctr("tasks", "rm", "--force", container_id)
        assert diff(ctr, "overlayfs", container_id)["layer-7"] == b"7new\n"
        ctr("containers", "rm", container_id)
    finally:
        ctr("images", "rm", "--sync", name)
