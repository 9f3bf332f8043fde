"""Whoever is killed whenever: the container is reported as killed, its waiters return, and nothing of it is left."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pymicro.protos.task_pb2 import DeleteResponse

from tests.framework.containerd import Containerd
from tests.framework.ctr import Ctr
from tests.framework.events import listening
from tests.framework.leftovers import Leftovers
from tests.framework.pod import GROUP
from tests.framework.processes import all_processes
from tests.framework.sandbox import ANCHOR, HELPERS, KINDS, SHIM, Sandbox, eventually
from tests.framework.waiting import seconds

pytestmark = pytest.mark.usefixtures("only_our_runtime")

PROMPT = 2.0
"""Seconds in which whoever waits must hear of the end."""
STARTED = 0.5
"""Seconds between a process's appearance in the guest and the client's learning of its start, amply."""
SLEEP = ("sleep", "100000")
KILLED = 137


@pytest.fixture
def cold(ctr: Ctr) -> Iterator[None]:
    """Have VMs boot their kernel, so that a start takes long enough to be interrupted at every stage."""
    ctr.containerd.write_settings(vm={"start": "boot"})
    yield
    ctr.containerd.write_settings()


def attached(ctr: Ctr, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start a client that waits for a process; it must end by itself."""
    return subprocess.Popen(
        [ctr.containerd.bin / "ctr", *arguments],
        env={**os.environ, **ctr.containerd.client_environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


# -- at rest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_ends_the_container_and_all_who_wait(ctr: Ctr, leftovers: Leftovers, kind: str) -> None:
    if kind == "vhost-device-vsock" and os.path.exists("/dev/vhost-vsock"):
        pytest.skip("this host's kernel has vhost-vsock, so there is no such process")
    with listening(ctr.containerd) as events:
        container = ctr.start(*SLEEP)
        pid = container.pid
        waiter = attached(ctr, "tasks", "exec", "--exec-id", "other", container.id, *SLEEP)
        eventually(lambda: "other" in ctr("tasks", "ps", container.id).stdout, "the exec runs", 10)
        time.sleep(seconds(STARTED))

        Sandbox(ctr.containerd, container.id).kill(kind)

        # with a dead shim, also with runc's, containerd forgets the task and clients hear of a broken connection
        status, code = ("GONE", 1) if kind == SHIM else ("STOPPED", KILLED)
        eventually(lambda: container.status == status, f"the task is {status}", PROMPT)
        assert waiter.wait(seconds(PROMPT)) == code
        if kind != SHIM:
            assert container.wait(PROMPT) == KILLED
        events.until_told(container.id, f"exit {container.id} {KILLED}")
        events.synchronise()
    assert [str(event) for event in events.of(container.id) if event.kind == "exit"].count(
        f"exit {container.id} {KILLED}"
    ) == 1
    assert {each.content["pid"] for each in events.of(container.id) if each.process == container.id} == {pid}
    container.remove()
    leftovers.check()


@pytest.mark.parametrize(("kind", "code"), [(SHIM, 1), ("qemu", KILLED), (ANCHOR, KILLED)])
def test_ctr_run_returns_when_a_process_is_killed(ctr: Ctr, leftovers: Leftovers, kind: str, code: int) -> None:
    container_id = ctr.new_id()
    client = ctr.popen(*SLEEP, container_id=container_id)
    eventually(lambda: ctr.tasks().get(container_id) == "RUNNING", "the container runs", 60)

    Sandbox(ctr.containerd, container_id).kill(kind)

    _, errors = client.communicate(timeout=seconds(PROMPT))
    assert client.returncode == code
    broken = {"ttrpc": "ttrpc: closed", "grpc": "Unavailable"}[
        ctr.containerd.protocol
    ]  # of ttrpc runc's clients see it
    assert broken in errors.decode() if kind == SHIM else not errors
    leftovers.check()


def test_a_panic_of_the_guest_ends_the_container(ctr: Ctr, leftovers: Leftovers) -> None:
    begun = time.monotonic()
    done = ctr.run("sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000", options=["--privileged"])

    assert done.returncode == KILLED
    assert time.monotonic() - begun < seconds(60)
    assert "qemu ended" in ctr.containerd.log_tail()
    leftovers.check()


def test_a_guest_that_hangs_can_be_killed(ctr: Ctr, leftovers: Leftovers) -> None:
    ctr.containerd.write_settings(timeouts={"request": 6})
    try:
        container = ctr.start(*SLEEP)
    finally:
        ctr.containerd.write_settings()
    qemu = Sandbox(ctr.containerd, container.id).find("qemu")
    assert qemu
    os.kill(qemu, signal.SIGSTOP)

    assert container.kill("SIGTERM").returncode == 1, "nobody can tell whether it has arrived"
    assert container.status == "RUNNING"
    assert container.kill("SIGKILL").returncode == 0

    eventually(lambda: container.status == "STOPPED", "the task is STOPPED", PROMPT)
    assert container.wait(PROMPT) == KILLED
    container.remove()
    leftovers.check()


def test_what_takes_all_memory_of_the_guest_is_killed_and_nothing_else(ctr: Ctr) -> None:
    container = ctr.start(*SLEEP)

    hog = container.exec("sh", "-c", "x=1234567890123456; while :; do x=$x$x; done")

    assert hog.returncode in {KILLED, 2}  # a failed allocation of its own is as good
    assert container.exec("echo", "well").stdout == "well\n"


TAKE_THREADS = """
#include <pthread.h>
#include <unistd.h>
static void *stay(void *unused) { for (;;) pause(); return unused; }
int main(void) {
    pthread_attr_t small;
    pthread_t thread;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    for (;;)
        if (pthread_create(&thread, &small, stay, NULL) != 0)
            usleep(1000);
}
"""


def test_what_takes_all_threads_of_the_guest_takes_none_of_the_agents(ctr: Ctr, tmp_path: Path) -> None:
    """The kernel has room for so many by the VM's memory, and they count for root as well."""
    (tmp_path / "threads.c").write_text(TAKE_THREADS)
    subprocess.run(["gcc", "-static", "-pthread", "-o", tmp_path / "threads", tmp_path / "threads.c"], check=True)
    first = ctr.start(*SLEEP)
    options = ["--annotation", f"{GROUP}={first.id}", "--mount", f"type=bind,src={tmp_path},dst=/t,options=rbind:ro"]
    hog = ctr.start("/t/threads", options=options)
    most = int(first.exec("cat", "/proc/sys/kernel/threads-max").stdout)

    def has_taken_all() -> bool:
        return int(json.loads(ctr("tasks", "metrics", "--format", "json", hog.id).stdout)["pids"]["current"]) > most / 2

    eventually(has_taken_all, "the threads are taken", 60)
    time.sleep(2)

    assert first.exec("echo", "well").stdout == "well\n"
    hog.kill()
    eventually(lambda: hog.status == "STOPPED", "the task is STOPPED", PROMPT)
    assert hog.wait(PROMPT) == KILLED
    assert first.status == "RUNNING"


def test_all_processes_killed_at_once(ctr: Ctr, leftovers: Leftovers) -> None:
    container = ctr.start(*SLEEP)
    sandbox = Sandbox(ctr.containerd, container.id)

    for pid in [pid for kind in (*HELPERS, ANCHOR, SHIM) for pid in sandbox.pids(kind)]:
        with suppress(ProcessLookupError):  # they end because of each other
            os.kill(pid, signal.SIGKILL)

    eventually(lambda: container.status == "GONE", "the task is gone", 5)
    container.remove()
    leftovers.check()
    assert ctr.run("echo", "again").stdout == "again\n"


# -- while starting ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 2.5, 3.0])
def test_a_shim_killed_while_starting(ctr: Ctr, leftovers: Leftovers, delay: float) -> None:
    container_id = ctr.new_id()
    client = ctr.popen(*SLEEP, container_id=container_id)
    pid = Sandbox(ctr.containerd, container_id).wait_for(SHIM)
    time.sleep(delay)

    os.kill(pid, signal.SIGKILL)

    errors = errors_without_shim(ctr, client)
    assert client.returncode != 0
    assert errors or client.returncode in {KILLED, -signal.SIGTERM}
    leftovers.check()


def errors_without_shim(ctr: Ctr, client: subprocess.Popen[bytes]) -> str:
    """Return what `ctr run` says when the shim has been killed early.

    A shim of gRPC may not have answered the first dial by then, and containerd 1.7 dials again for 100 s
    (grpc.WithBlock in its runtime/v2/shim.go), or until its client goes away.
    """
    try:
        _, errors = client.communicate(timeout=seconds(PROMPT))
    except subprocess.TimeoutExpired:
        if ctr.containerd.protocol != "grpc":
            raise
        client.terminate()
        _, errors = client.communicate(timeout=seconds(PROMPT))
    return errors.decode()


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize(
    ("kind", "delay"),
    [
        *(("qemu", delay) for delay in (0.0, 0.1, 0.5, 1.0, 1.4, 1.8)),
        *(("virtiofsd", delay) for delay in (0.0, 0.5, 1.6)),
        *(("vhost-device-vsock", delay) for delay in (0.0, 0.5, 1.6)),
    ],
)
def test_a_vm_killed_while_starting(ctr: Ctr, leftovers: Leftovers, kind: str, delay: float) -> None:
    if kind == "vhost-device-vsock" and os.path.exists("/dev/vhost-vsock"):
        pytest.skip("this host's kernel has vhost-vsock")
    container_id = ctr.new_id()
    client = ctr.popen(*SLEEP, container_id=container_id)
    pid = Sandbox(ctr.containerd, container_id).wait_for(kind)
    time.sleep(delay)

    os.kill(pid, signal.SIGKILL)

    _, errors = client.communicate(timeout=seconds(PROMPT))
    assert client.returncode == KILLED or f"{kind} ended with signal 9" in errors.decode()
    leftovers.check()


# -- while a template is made ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.05, 0.7])
def test_a_shim_killed_while_it_makes_a_template_leaves_nothing_of_it(
    ctr: Ctr, leftovers: Leftovers, templates: Path, delay: float
) -> None:
    container_id = ctr.new_id()
    client = ctr.popen("true", container_id=container_id)
    sandbox = Sandbox(ctr.containerd, container_id)
    sandbox.wait_for("qemu")
    time.sleep(delay)

    sandbox.kill(SHIM)

    errors_without_shim(ctr, client)
    assert client.returncode != 0
    leftovers.check()
    assert [each for each in templates.iterdir() if each.is_dir()] == []
    assert ctr.run("echo", "well").stdout == "well\n"


def test_a_container_starts_although_its_template_could_not_be_made(
    ctr: Ctr, leftovers: Leftovers, templates: Path
) -> None:
    container_id = ctr.new_id()
    client = ctr.popen("echo", "well", container_id=container_id)
    sandbox = Sandbox(ctr.containerd, container_id)
    sandbox.wait_for("qemu")
    time.sleep(0.5)

    sandbox.kill("qemu")

    output, _ = client.communicate(timeout=seconds(60))
    assert (client.returncode, output) == (0, b"well\n")
    leftovers.check()
    assert [each for each in templates.iterdir() if each.is_dir()] == []


# -- containerd itself -------------------------------------------------------------------------------------------------


@pytest.mark.every_containerd
def test_a_container_outlives_containerd(ctr: Ctr, daemon: Containerd, leftovers: Leftovers) -> None:
    container = ctr.start(*SLEEP)
    pid = container.pid

    daemon.crash()
    daemon.revive()

    assert (container.status, container.pid) == ("RUNNING", pid)
    assert container.exec("echo", "still here").stdout == "still here\n"
    waiter = attached(ctr, "tasks", "attach", container.id)
    time.sleep(seconds(0.3))
    container.kill()
    assert waiter.wait(seconds(PROMPT + 5)) == KILLED
    container.remove()
    leftovers.check()


def test_a_container_that_ended_while_containerd_was_away_is_cleaned_up(
    ctr: Ctr, daemon: Containerd, leftovers: Leftovers
) -> None:
    container = ctr.start("sleep", "3")

    daemon.crash()
    time.sleep(3.5)
    daemon.revive()

    # it forgets a task without processes, also one of runc; 1.6 keeps it
    assert container.status == ("STOPPED" if daemon.version == "1.6" else "GONE")
    container.remove()
    leftovers.check()


def test_a_shim_that_dies_while_containerd_is_away_is_cleaned_up_when_it_is_back(
    ctr: Ctr, daemon: Containerd, leftovers: Leftovers
) -> None:
    container = ctr.start(*SLEEP)

    daemon.crash()
    Sandbox(daemon, container.id).kill(SHIM)
    daemon.revive()

    assert container.status == "GONE"
    container.remove()
    leftovers.check()


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("delay", [0.0, 0.8, 1.8])
def test_containerd_crashes_while_a_container_starts(
    ctr: Ctr, daemon: Containerd, leftovers: Leftovers, delay: float
) -> None:
    daemon.write_settings(vm={"start": "boot"}, timeouts={"unused": seconds(4)})
    container_id = ctr.new_id()
    client = ctr.popen(*SLEEP, container_id=container_id)
    Sandbox(daemon, container_id).wait_for(SHIM)
    time.sleep(delay)

    daemon.crash()
    client.communicate(timeout=seconds(PROMPT + 8))
    daemon.revive()

    ctr("tasks", "rm", "--force", container_id, check=False)
    ctr("containers", "rm", container_id, check=False)
    leftovers.check(grace=10)  # 1.6 connects to a shim without a container and lets it be


# -- `delete` ----------------------------------------------------------------------------------------------------------


def shim_delete(containerd: Containerd, bundle: Path, container_id: str) -> DeleteResponse:
    """Run the shim's `delete` as containerd does after a crash, and return its answer."""
    flags = ["-namespace", containerd.namespace, "-address", containerd.address, "-id", container_id]
    done = subprocess.run(
        [containerd.bin / "containerd-shim-pymicro-v1", *flags, "-bundle", bundle, "delete"],
        cwd=bundle,
        env={**os.environ, "PYMICRO_CONFIG": str(containerd.settings)},
        capture_output=True,
        timeout=seconds(20),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return DeleteResponse.FromString(done.stdout)


@pytest.mark.kvm
def test_delete_frees_all_that_a_running_sandbox_has_and_may_be_repeated(
    ctr: Ctr, leftovers: Leftovers, tmp_path: Path
) -> None:
    container = ctr.start(*SLEEP)
    sandbox = Sandbox(ctr.containerd, container.id)
    assert sandbox.find(SHIM)

    answers = [shim_delete(ctr.containerd, tmp_path, container.id) for _ in range(2)]

    assert [answer.exit_status for answer in answers] == [KILLED, KILLED]
    assert time.time() - answers[1].exited_at.ToSeconds() < 10
    assert sandbox.find(SHIM) is None
    assert not sandbox.directory.exists()
    container.remove()
    leftovers.check()


@pytest.mark.parametrize("killed", [(), (SHIM,), ("guard", SHIM), ("guard",)], ids=["", "shim", "both", "guard"])
@pytest.mark.parametrize("kept", [None, 0, 0.3, 0.99])
def test_delete_frees_a_vm_whose_record_is_lost(
    ctr: Ctr, leftovers: Leftovers, tmp_path: Path, kept: float | None, killed: tuple[str, ...]
) -> None:
    container = ctr.start(*SLEEP)
    sandbox = Sandbox(ctr.containerd, container.id)
    record = sandbox.directory / "state.json"
    whole = record.read_bytes()
    pids = [pid for kind in (*HELPERS, ANCHOR, SHIM) for pid in sandbox.pids(kind)]
    assert len(pids) >= 3
    shim = sandbox.find(SHIM)
    assert shim
    victims = {SHIM: shim, "guard": all_processes()[shim].parent}

    # containerd runs `delete` too, as soon as it hears of the shim's death, and removes the bundle then
    bundle = tmp_path / container.id
    bundle.mkdir()
    for name in ("address", "config.json"):
        shutil.copy(bundle_of(ctr, container.id) / name, bundle)

    if kept is None:
        record.unlink()
    else:
        record.write_bytes(whole[: int(kept * len(whole))])
    for kind in killed:
        os.kill(victims[kind], signal.SIGKILL)
    answer = shim_delete(ctr.containerd, bundle, container.id)

    assert answer.exit_status == KILLED
    eventually(lambda: not sandbox.directory.exists(), "the run directory is gone", PROMPT)
    eventually(lambda: not set(pids) & all_processes().keys(), "the pod's processes are gone", PROMPT)
    container.remove()
    leftovers.check()


def bundle_of(ctr: Ctr, container_id: str) -> Path:
    containerd = ctr.containerd
    return containerd.home / "state/io.containerd.runtime.v2.task" / containerd.namespace / container_id


def test_delete_of_one_container_leaves_the_pod_alone_whose_record_is_lost(ctr: Ctr, leftovers: Leftovers) -> None:
    first = ctr.start(*SLEEP)
    second = ctr.start(*SLEEP, options=["--annotation", f"io.containerd.runc.v2.group={first.id}"])
    sandbox = Sandbox(ctr.containerd, first.id)
    record = sandbox.directory / "state.json"
    record.write_bytes(record.read_bytes()[:50])

    for container in (second, first):
        assert shim_delete(ctr.containerd, bundle_of(ctr, container.id), container.id).exit_status == KILLED
        assert sandbox.find(SHIM)

    assert [each.exec("echo", "well").stdout for each in (first, second)] == ["well\n", "well\n"]
    for container in (second, first):
        container.remove()
    leftovers.check()


def test_delete_finds_a_shim_whose_settings_make_no_sense(ctr: Ctr, leftovers: Leftovers, tmp_path: Path) -> None:
    """Its VM has never been started, and it waits for a Create to say why."""
    container_id = ctr.new_id()
    (tmp_path / "config.json").write_text("{}")
    flags = ["-namespace", ctr.containerd.namespace, "-address", ctr.containerd.address, "-id", container_id]
    words = [str(ctr.containerd.bin / "containerd-shim-pymicro-v1"), *flags, "-publish-binary", "/x", "start"]
    environment = {**os.environ, "PYMICRO_CONFIG": "/no/such/file"}
    subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    sandbox = Sandbox(ctr.containerd, container_id)
    sandbox.wait_for(SHIM)

    assert shim_delete(ctr.containerd, tmp_path, container_id).exit_status == KILLED

    assert sandbox.find(SHIM) is None
    leftovers.check()


@pytest.mark.parametrize(
    "recorded",
    [
        None,
        "",
        '{"version": 1, "cgroups": ["/sys/fs/cgr',
        "[]",
        '{"shim_pid": 1, "cgroups": null, "socket": 7, "containers": "x"}',
        '{"shim_pid": 4194304, "shim_start_time": 5, "cgroups": ["/no/such/cgroup"], "socket": "/etc/hostname"}',
    ],
)
def test_delete_takes_any_state(ctr: Ctr, leftovers: Leftovers, tmp_path: Path, recorded: str | None) -> None:
    container_id = ctr.new_id()
    directory = Sandbox(ctr.containerd, container_id).directory
    if recorded is not None:
        (directory / "share/deep/er").mkdir(parents=True)
        (directory / "state.json").write_text(recorded)

    assert shim_delete(ctr.containerd, tmp_path, container_id).exit_status == KILLED

    assert Path("/etc/hostname").exists()
    leftovers.check()
