"""A record that is lost or half written: what it would have said is found all the same, and `delete` leaves nothing."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pymicro.protos import task_pb2
from pymicro.shim import cgroup, delete, freeing, guard, lost, sockets, state
from pymicro.shim.arguments import Arguments

from tests.framework.fakes import needs_root

ADDRESS, NAMESPACE = "/run/containerd.sock", "ns"

# A guard and the daemon that is its child, as `become_guard` makes them; its stdin stands for the daemon's pipe.
GUARD = 'sleep 1000 & d=$!; exec -a pymicro-guard /bin/sh -c "read -r end" pymicro-guard python -m x "$0" $d "$1"'


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Lost:
    """A sandbox's run directory and its containers' bundles, without what a shim would do there."""

    def __init__(self, directory: Path, socket_directory: Path) -> None:
        self.run = directory / "run/0123456789abcdef"
        self.bundles = directory / "ns"
        self.sockets = socket_directory
        self._guards: list[subprocess.Popen[bytes]] = []
        self.bundle = self.container("c1")

    def container(self, container_id: str, **spec: object) -> Path:
        """Make a bundle, and a container's folder in the share."""
        bundle = self.bundles / container_id
        bundle.mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps({"ociVersion": "1.1.0", **spec}))
        self.folder(container_id)
        return bundle

    def folder(self, container_id: str = "c1") -> None:
        (self.run / f"share/1-{container_id}").mkdir(parents=True, exist_ok=True)

    def guarded(self) -> int:
        """Start a guard with a stand-in for a daemon, in place of an earlier one; return the latter's pid."""
        self.end()
        words = ["bash", "-c", GUARD, str(self.run), str(self.bundle)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE)
        self._guards.append(process)
        command = Path(f"/proc/{process.pid}/cmdline")
        while b"pymicro-guard\0-c" not in (said := command.read_bytes()):
            assert process.poll() is None
        return int(said.split(b"\0")[8])

    def end(self) -> None:
        while self._guards:
            self._guards.pop().communicate()

    def listener(self) -> socket.socket:
        """Listen where the shim would, and say so in the bundle."""
        path = sockets.path(ADDRESS, NAMESPACE, "c1", str(self.sockets))
        listener = sockets.bind(path)
        assert listener
        (self.bundle / "address").write_text(f"unix://{path}")
        return listener

    def delete(self, capfd: pytest.CaptureFixture[str], container_id: str = "c1") -> task_pb2.DeleteResponse:
        """Run `delete` in this process; return its answer."""
        bundle = self.bundles / container_id
        words = ["-namespace", NAMESPACE, "-address", ADDRESS, "-id", container_id, "-bundle", str(bundle), "delete"]
        read, write = os.pipe()
        stdout = os.dup(1)
        os.dup2(write, 1)
        try:
            delete.delete(Arguments(words))
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            os.close(write)
        with open(read, "rb") as pipe:
            answer = pipe.read()
        return task_pb2.DeleteResponse.FromString(answer)

    @property
    def complete(self) -> dict[str, object]:
        """What a real record holds."""
        return {
            "namespace": NAMESPACE,
            "sandbox": "c1",
            "bundle": str(self.bundle),
            "socket": "/run/containerd/s/0",
            "protocol": "ttrpc",
            "shim_pid": 4194304,
            "shim_start_time": 123,
            "created_at": 1764078000.25,
            "cgroups": ["/sys/fs/cgroup/memory/ns/pymicro-0123456789abcdef"],
            "templates": "/dev/shm/pymicro-templates",
            "vcpus": 1,
            "memory_mib": 256,
            "accel": "tcg",
            "containers": ["c1"],
            "container_cgroups": ["/sys/fs/cgroup/memory/ns/c1"],
        }


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lost]:
    with tempfile.TemporaryDirectory() as directory:
        found = Lost(tmp_path, Path(directory))
        monkeypatch.setattr(state, "directory", lambda *_: str(found.run))
        yield found
        found.end()


def test_delete_with_the_record_cut_off_at_every_byte(sandbox: Lost, capfd: pytest.CaptureFixture[str]) -> None:
    state.write(str(sandbox.run), sandbox.complete)
    whole = (sandbox.run / state.STATE_FILE).read_bytes()
    daemon = 0
    for size in range(len(whole)):
        if size % 20 == 0:  # a guard takes its time
            daemon = sandbox.guarded()
        sandbox.folder()
        (sandbox.run / state.STATE_FILE).write_bytes(whole[:size])
        assert sandbox.delete(capfd).exit_status == 137, f"cut off at byte {size}"
        assert not sandbox.run.exists(), f"cut off at byte {size}"
        assert not alive(daemon), f"the daemon lives, cut off at byte {size}"
    assert capfd.readouterr().err == ""


def test_delete_twice_without_a_record_or_directory(sandbox: Lost, capfd: pytest.CaptureFixture[str]) -> None:
    daemon = sandbox.guarded()
    (sandbox.run / "share/1-c1").rmdir()
    (sandbox.run / "share").rmdir()
    sandbox.run.rmdir()
    for _ in range(2):
        assert sandbox.delete(capfd).exit_status == 137
        assert not alive(daemon)


def test_the_search_is_for_lost_records_alone(sandbox: Lost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost, "find", lambda *_: pytest.fail("it was searched for"))
    state.write(str(sandbox.run), sandbox.complete)
    freeing.free(str(sandbox.run))
    assert not sandbox.run.exists()


def test_a_record_that_the_daemon_has_not_added_to_is_half(sandbox: Lost) -> None:
    """`start` writes who the sandbox is, the daemon who it is itself."""
    daemon = sandbox.guarded()
    state.write(str(sandbox.run), {"namespace": "ns", "sandbox": "c1", "socket": "/kept"})
    found = freeing.recorded(str(sandbox.run))
    assert (found["shim_pid"], found["socket"]) == (daemon, "/kept")


def test_a_guards_child_that_is_another_process_by_now_is_left_alone(sandbox: Lost) -> None:
    """The daemon is dead, and its pid is somebody's else."""
    bystander = subprocess.Popen(["sleep", "1000"])
    words = ["bash", "-c", GUARD.replace("sleep 1000 & d=$!", f"d={bystander.pid}"), str(sandbox.run), "/"]
    other = subprocess.Popen(words, stdin=subprocess.PIPE)
    try:
        while b"pymicro-guard\0-c" not in Path(f"/proc/{other.pid}/cmdline").read_bytes():
            assert other.poll() is None
        assert "shim_pid" not in lost.find(str(sandbox.run))
    finally:
        other.communicate()
        bystander.kill()
        bystander.wait()


def test_guards_of_other_sandboxes_are_left_alone(sandbox: Lost) -> None:
    sandbox.guarded()
    assert "shim_pid" not in lost.find(str(sandbox.run) + "0")
    assert "shim_pid" not in lost.find(str(sandbox.run)[:-1])


def test_the_guard_itself_finds_a_lost_record(sandbox: Lost) -> None:
    held = freeing.hold(str(sandbox.run))
    guard.free_after(held, str(sandbox.run), 4194304, str(sandbox.bundle))
    os.close(held)
    assert not sandbox.run.exists()


@pytest.mark.parametrize("left", [True, False], ids=["the old one is there first", "nothing is there first"])
def test_delete_that_comes_late_leaves_a_new_sandbox_alone(
    sandbox: Lost, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """Before its child begins, somebody else has freed the old one, and the new one has no record yet."""
    if not left:
        shutil.rmtree(sandbox.run)

    def meanwhile() -> None:  # what the child does first
        shutil.rmtree(sandbox.run, ignore_errors=True)
        sandbox.folder()

    monkeypatch.setattr(os, "setsid", meanwhile)
    daemon = sandbox.guarded()
    assert sandbox.delete(capfd).exit_status == 137
    assert alive(daemon)
    assert sandbox.run.exists()


# --- the parts


@pytest.mark.parametrize("as_json", [False, True])
def test_socket_that_the_bundle_names(sandbox: Lost, capfd: pytest.CaptureFixture[str], as_json: bool) -> None:
    with sandbox.listener() as listener:
        path = listener.getsockname()
        if as_json:
            (sandbox.bundle / "address").write_text(json.dumps({"version": 2, "address": path, "protocol": "grpc"}))
        assert lost.find(str(sandbox.run), str(sandbox.bundle))["socket"] == path
    sandbox.delete(capfd)
    assert not os.path.exists(path)


def test_a_socket_at_which_somebody_listens_by_now_stays(sandbox: Lost, capfd: pytest.CaptureFixture[str]) -> None:
    """A new shim of the same name may have it before all of the old one is freed."""
    with sandbox.listener() as listener:
        sandbox.delete(capfd)
        assert os.path.exists(listener.getsockname())


@pytest.mark.parametrize(
    "address", ["", "{", "[]", "{}", '{"address": 7}', "unix:///etc/hostname", f"/{'0' * 64}", "\xff"]
)
def test_addresses_that_name_no_socket_of_ours(sandbox: Lost, address: str) -> None:
    (sandbox.bundle / "address").write_bytes(address.encode("latin-1"))
    assert "socket" not in lost.find(str(sandbox.run), str(sandbox.bundle))


def test_poststop_hooks_of_all_containers_are_owed(sandbox: Lost, capfd: pytest.CaptureFixture[str]) -> None:
    seen = sandbox.run.parent / "seen"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"cat >> {seen}; echo >> {seen}"], "env": ["PATH=/bin"]}
    sandbox.container("c2", hooks={"poststop": [hook]}, annotations={"a": "b"})
    sandbox.container("c3", hooks={"prestart": [hook]})
    sandbox.delete(capfd)
    (line,) = seen.read_text().splitlines()
    said = json.loads(line)
    assert (said["id"], said["status"], said["annotations"]) == ("c2", "stopped", {"a": "b"})
    assert said["bundle"] == str(sandbox.bundles / "c2")
    assert capfd.readouterr().err == ""


def test_containers_that_are_gone_owe_nothing(sandbox: Lost) -> None:
    """Its folder is removed before its hooks run."""
    bundle = sandbox.container("c2", hooks={"poststop": [{"path": "/bin/false"}]})
    (sandbox.run / "share/1-c2").rmdir()
    assert "poststop" not in lost.find(str(sandbox.run), str(bundle))


@pytest.mark.parametrize("hooks", [7, {"poststop": 7}, {"poststop": [7]}, {"poststop": [{"path": "relative"}]}])
def test_hooks_that_make_no_sense(sandbox: Lost, capfd: pytest.CaptureFixture[str], hooks: object) -> None:
    sandbox.container("c2", hooks=hooks)
    sandbox.delete(capfd)
    assert not sandbox.run.exists()


@pytest.mark.parametrize("config", ["", "{", "[]", '{"linux": 7}', '{"linux": {"cgroupsPath": 7}}'])
def test_bundles_that_make_no_sense(sandbox: Lost, capfd: pytest.CaptureFixture[str], config: str) -> None:
    (sandbox.bundle / "config.json").write_text(config)
    assert sandbox.delete(capfd).exit_status == 137
    assert not sandbox.run.exists()


@needs_root
def test_cgroups_are_found_by_their_names(sandbox: Lost, capfd: pytest.CaptureFixture[str]) -> None:
    """With a helper in one, and with nobody in them."""
    groups = cgroup.directories(f"pymicro-test-{os.getpid()}/pymicro-{sandbox.run.name}")
    own = cgroup.directories(f"pymicro-test-{os.getpid()}/c1")
    (sandbox.bundle / "config.json").write_text(
        json.dumps({"linux": {"cgroupsPath": f"/pymicro-test-{os.getpid()}/c1"}})
    )
    try:
        for occupied in (True, False):
            cgroup.create([*groups, *own])
            sandbox.folder()
            helper = subprocess.Popen(["sleep", "1000"])
            for group in groups if occupied else ():
                Path(group, "cgroup.procs").write_text(str(helper.pid))
            try:
                found = lost.find(str(sandbox.run), str(sandbox.bundle))
                assert found["cgroups"] == list(groups)
                assert found["container_cgroups"] == sorted(own)
                sandbox.delete(capfd)
                assert (helper.poll() is not None or not alive(helper.pid)) is occupied
            finally:
                helper.kill()
                helper.wait()
            assert not any(os.path.exists(group) for group in (*groups, *own))
    finally:
        cgroup.remove([*groups, *own, *cgroup.directories(f"pymicro-test-{os.getpid()}")])


# --- whose VM it is


def test_a_vm_that_others_use_is_left_also_without_a_record(sandbox: Lost, capfd: pytest.CaptureFixture[str]) -> None:
    daemon = sandbox.guarded()
    sandbox.folder("c2")
    assert sandbox.delete(capfd).exit_status == 137
    assert alive(daemon)
    assert sandbox.run.exists()
