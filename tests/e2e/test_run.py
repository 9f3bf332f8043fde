"""`ctr run`: the guest's kernel, exit codes, messages, signals, and what a container leaves in its snapshot."""

import json
import platform
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.framework.ctr import RUNC, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.pod import Pod
from tests.framework.waiting import seconds, until

TERM_HANDLER = 'trap "echo bye; exit 6" TERM; echo ready; while true; do sleep 0.1; done'


@contextmanager
def mounted_snapshot(ctr: Ctr, key: str, snapshotter: str, directory: Path) -> Iterator[Path]:
    """Mount a container's snapshot on the host and yield where it is."""
    command = ctr("snapshots", "--snapshotter", snapshotter, "mounts", str(directory), key).stdout
    subprocess.run(shlex.split(command), check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


# -- the core, with every containerd and a VM of its own ---------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.every_containerd
def test_a_container_runs_on_the_guests_kernel(ctr: Ctr, artefacts: dict[str, str]) -> None:
    done = ctr.run("uname", "-r")

    release = json.loads(Path(artefacts["kernel"]).with_name("manifest.json").read_text())["release"]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{release}\n", "")
    assert release != platform.release()


@pytest.mark.every_containerd
def test_a_missing_program_is_named_and_leaves_nothing(ctr: Ctr, leftovers: Leftovers) -> None:
    done = ctr.run("nosuch", "argument")

    assert done.returncode == ctr.run("nosuch", runtime=RUNC).returncode
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert 'exec: "nosuch": executable file not found in $PATH' in line
    leftovers.check()
    assert ctr("containers", "ls", "-q").stdout == ""


@pytest.mark.every_containerd
def test_killing_a_container_gives_137(ctr: Ctr) -> None:
    container = ctr.start("sleep", "100000")

    container.kill("SIGKILL")

    assert container.wait() == 137
    container.remove()


# -- the rest in one VM ------------------------------------------------------------------------------------------------


@pytest.mark.every_containerd
@pytest.mark.parametrize("code", [0, pytest.param(3, marks=pytest.mark.kvm), 255])
def test_the_exit_code_comes_through(pod: Pod, code: int) -> None:
    assert pod.run("sh", "-c", f"exit {code}").returncode == code


@pytest.mark.kvm
@pytest.mark.every_containerd
def test_stdout_and_stderr_stay_apart(pod: Pod) -> None:
    done = pod.run("sh", "-c", "echo out; echo err >&2; echo more; printf end >&2")

    assert (done.stdout, done.stderr) == ("out\nmore\n", "err\nend")


def test_what_the_shell_cannot_find_gives_127(pod: Pod) -> None:
    assert pod.same_as_runc("sh", "-c", "nosuch").returncode == 127


@pytest.mark.parametrize(
    ("program", "reason"),
    [("/bin/nosuch", "no such file or directory"), ("/etc/passwd", "permission denied"), ("/etc", "permission denied")],
)
def test_a_program_that_cannot_be_run_is_named_with_the_reason(pod: Pod, program: str, reason: str) -> None:
    done = pod.run(program)

    assert done.returncode == pod.run(program, runtime=RUNC).returncode
    (line,) = done.stderr.splitlines()
    assert f'exec: "{program}": {reason}' in line


def test_a_container_that_kills_itself_gives_the_signal_as_the_shell_does(pod: Pod) -> None:
    done = pod.run("sh", "-c", "sh -c 'kill -KILL $$'; echo $?; sh -c 'kill -TERM $$'; echo $?")

    assert done.stdout == "137\n143\n"


def test_pid_1_without_a_handler_ignores_term(pod: Pod) -> None:
    container = pod.start("sleep", "100000")

    assert container.kill("SIGTERM").returncode == 0

    assert container.exec("true").returncode == 0
    assert container.status == "RUNNING"


@pytest.mark.kvm
def test_pid_1_with_a_handler_ends_as_the_handler_says(pod: Pod) -> None:
    container_id = pod.new_id()
    client = pod.popen("sh", "-c", TERM_HANDLER, container_id=container_id)
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"

    pod("tasks", "kill", "--signal", "SIGTERM", container_id)

    out, err = client.communicate(timeout=seconds(30))
    assert (client.returncode, out, err) == (6, b"bye\n", b"")


def test_term_ends_a_process_that_is_not_pid_1_with_143(pod: Pod) -> None:
    shared_pids = f"pid:/proc/{pod.first.pid}/ns/pid"
    container = pod.start("sleep", "100000", options=["--with-ns", shared_pids])

    container.kill("SIGTERM")

    assert container.wait() == 143


def test_every_signal_reaches_the_container_by_name_and_number(pod: Pod) -> None:
    script = 'for s in HUP INT USR1 USR2 WINCH; do trap "echo $s" $s; done; echo ready; while true; do sleep 0.1; done'
    container_id = pod.new_id()
    client = pod.popen("sh", "-c", script, container_id=container_id)
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"

    for signal, name in (("SIGHUP", b"HUP"), ("2", b"INT"), ("SIGUSR1", b"USR1"), ("12", b"USR2")):
        pod("tasks", "kill", "--signal", signal, container_id)
        assert client.stdout.readline() == name + b"\n"


def test_an_id_can_be_used_again_at_once(pod: Pod) -> None:
    container_id = pod.new_id()

    codes = [pod.run("sh", "-c", f"exit {code}", container_id=container_id).returncode for code in range(1, 6)]

    assert codes == [1, 2, 3, 4, 5]


# -- what a container writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
def test_what_a_container_writes_is_in_its_snapshot(ctr: Ctr, snapshotter: str, tmp_path: Path) -> None:
    script = (
        "echo written >/home/file && chmod 640 /home/file && chown 1000:50 /home/file"
        " && mkdir /made && ln -s target /made/link && mknod /made/fifo p && ln /home/file /made/hard"
        " && rm /etc/group && rm -r /tmp && echo root:x:0:0::/:/bin/sh >/etc/passwd && mkdir /ready && sleep 100000"
    )
    container = ctr.start("sh", "-c", script, options=["--snapshotter", snapshotter])
    until(lambda: "ready" in container.exec("ls", "/").stdout)
    container.kill()
    assert container.wait() == 137

    with mounted_snapshot(ctr, container.id, snapshotter, tmp_path) as root:
        file = root / "home/file"
        status = file.stat()
        assert file.read_text() == "written\n"
        assert (oct(status.st_mode), status.st_uid, status.st_gid) == ("0o100640", 1000, 50)
        assert (root / "made/link").readlink() == Path("target")
        assert (root / "made/fifo").is_fifo()
        assert (root / "made/hard").samefile(file)
        assert not (root / "etc/group").exists()
        assert not (root / "tmp").exists()
        assert (root / "etc/passwd").read_text() == "root:x:0:0::/:/bin/sh\n"
        assert (root / "bin/busybox").stat().st_mode & 0o777 == 0o755


@pytest.mark.every_containerd
@pytest.mark.parametrize("snapshotter", ["native"])
def test_another_snapshotter_serves_as_well(ctr: Ctr, snapshotter: str) -> None:
    done = ctr.run("sh", "-c", "echo text >/file; cat /file /etc/group", options=["--snapshotter", snapshotter])

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("text\nroot:")


def test_a_container_that_is_started_again_finds_what_it_wrote(ctr: Ctr) -> None:
    container = ctr.start("sh", "-c", "echo run >>/runs; exec sleep 100000")
    until(lambda: container.exec("cat", "/runs").stdout == "run\n")
    container.kill()
    container.wait()

    ctr("tasks", "start", "--detach", "--null-io", container.id)

    until(lambda: container.exec("cat", "/runs").stdout == "run\nrun\n")


def test_a_root_directory_without_a_snapshot_can_be_run(ctr: Ctr, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").write_bytes(Path("/bin/busybox").read_bytes())
    (tmp_path / "bin/sh").chmod(0o755)

    done = ctr.fed(
        "run", "--rm", "--runtime", ctr.runtime, "--rootfs", str(tmp_path), ctr.new_id(), "/bin/sh", "-c",
        "echo kept >/kept; echo $0", stdin=None,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, "/bin/sh\n"), done.stderr
    assert (tmp_path / "kept").read_text() == "kept\n"
