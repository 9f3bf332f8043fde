"""`ctr task ...`: what can be seen of a running container, and done to it, as with runc."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any  # what JSON holds

import pytest

from tests.framework.ctr import PYMICRO, RUNC, Container, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.pod import Pod
from tests.framework.waiting import seconds, until

SLEEP = ("sleep", "100000")
MIB = 1 << 20

# What differs from one container to the next: ids, pids, times.
CHANGING = re.compile(r"[\w-]*-[0-9a-f]{6}-\d+|\d+")


def shape(text: str) -> list[str]:
    """Return the words of a table without those that differ from one container to the next."""
    return CHANGING.sub("_", text).split()


@pytest.fixture(params=[RUNC, PYMICRO], ids=["runc", "pymicro"])
def container_of_either(pod: Pod, request: pytest.FixtureRequest) -> Container:
    """Return a sleeping container, of runc and then of ours: what a test says holds for both."""
    return pod.start(*SLEEP, runtime=request.param)


# -- with every containerd ---------------------------------------------------------------------------------------------


@pytest.mark.every_containerd
def test_a_detached_container_is_listed_paused_resumed_killed_and_removed(ctr: Ctr, leftovers: Leftovers) -> None:
    container = ctr.start(*SLEEP)
    assert container.status == "RUNNING"
    assert Path(f"/proc/{container.pid}").exists()

    ctr("tasks", "pause", container.id)
    assert container.status == "PAUSED"
    ctr("tasks", "resume", container.id)
    assert container.status == "RUNNING"
    assert container.exec("true").returncode == 0

    container.kill("SIGKILL")
    until(lambda: container.status == "STOPPED")
    assert "137" in ctr("tasks", "rm", container.id, check=False).stderr
    assert container.status == "GONE"
    ctr("containers", "rm", container.id)
    leftovers.check()


@pytest.mark.kvm
@pytest.mark.every_containerd
def test_statistics_and_processes_are_shown(pod: Pod) -> None:
    container = pod.start("sh", "-c", "sleep 4242 & exec sleep 100000")
    until(lambda: len(pod("tasks", "ps", container.id).stdout.splitlines()) == 3)

    metrics = pod("tasks", "metrics", container.id).stdout

    values = dict(line.split(maxsplit=1) for line in metrics.splitlines()[3:] if line.strip())
    assert int(values["pids.current"]) == 2
    usage = values.get("memory.usage_in_bytes") or values["memory.usage"]
    assert 0 < int(usage) < 64 * MIB
    assert any(key.startswith("cpu") for key in values)


# -- as with runc ------------------------------------------------------------------------------------------------------


def test_tables_look_as_with_runc(pod: Pod) -> None:
    ours, theirs = pod.start(*SLEEP), pod.start(*SLEEP, runtime=RUNC)

    for command in ("ps", "metrics"):
        assert shape(pod("tasks", command, ours.id).stdout)[:8] == shape(pod("tasks", command, theirs.id).stdout)[:8]
    rows = [line.split() for line in pod("tasks", "ls").stdout.splitlines() if line.split()[0] in {ours.id, theirs.id}]
    assert [len(row) for row in rows] == [3, 3]
    assert {row[2] for row in rows} == {"RUNNING"}


@pytest.mark.kvm
def test_metrics_have_the_fields_that_runc_has(pod: Pod) -> None:
    ours, theirs = pod.start(*SLEEP), pod.start(*SLEEP, runtime=RUNC)

    def names(container: Container) -> set[str]:
        lines = pod("tasks", "metrics", container.id).stdout.splitlines()
        return {line.split()[0] for line in lines if line.strip()} - {container.id}

    assert names(ours) == names(theirs)


@pytest.mark.kvm
def test_a_pause_freezes_and_a_resume_thaws(container_of_either: Container) -> None:
    container, ctr = container_of_either, container_of_either.ctr
    counting = "while true; do echo >>/lines; sleep 0.02; done"
    ctr("tasks", "exec", "--detach", "--exec-id", "counter", container.id, "sh", "-c", counting)
    lines = Path(f"/proc/{container.pid}/root/lines")
    until(lines.exists)

    ctr("tasks", "pause", container.id)
    paused_at = lines.stat().st_size
    time.sleep(0.5)
    assert lines.stat().st_size == paused_at
    ctr("tasks", "resume", container.id)

    until(lambda: lines.stat().st_size > paused_at)


def test_what_is_not_possible_in_a_state_is_refused(container_of_either: Container) -> None:
    container, ctr = container_of_either, container_of_either.ctr

    assert ctr("tasks", "rm", container.id, check=False).returncode != 0
    assert container.status == "RUNNING"
    assert ctr("tasks", "resume", container.id, check=False).returncode != 0
    assert ctr("containers", "rm", container.id, check=False).returncode != 0
    container.kill("SIGKILL")
    until(lambda: container.status == "STOPPED")
    assert "already finished" in container.kill("SIGTERM").stderr
    assert ctr("tasks", "pause", container.id, check=False).returncode != 0
    assert container.exec("true").returncode != 0
    assert container.status == "STOPPED"


def test_a_paused_container_can_be_killed(container_of_either: Container) -> None:
    container_of_either.ctr("tasks", "pause", container_of_either.id)

    container_of_either.kill("SIGKILL")

    until(lambda: container_of_either.status == "STOPPED")


def test_a_running_task_is_removed_by_force_alone(container_of_either: Container) -> None:
    container_of_either.ctr("tasks", "rm", "--force", container_of_either.id, check=False)

    assert container_of_either.status == "GONE"


def test_an_unknown_signal_is_refused(container_of_either: Container) -> None:
    assert container_of_either.kill("99").returncode != 0
    assert container_of_either.status == "RUNNING"


def test_the_second_container_of_an_id_is_refused(pod: Pod) -> None:
    container = pod.start(*SLEEP)

    done = pod.run("true", container_id=container.id)

    assert "already exists" in done.stderr
    assert container.exec("true").returncode == 0


def test_a_created_container_starts_later(pod: Pod) -> None:
    container_id = pod.new_id()
    options = ["--runtime", pod.runtime, "--"]  # ctr 1.6 would take -c for its own
    pod("containers", "create", *options, "localhost/busybox:latest", container_id, "sh", "-c", "exit 6")
    assert container_id not in pod.tasks()

    assert pod("tasks", "start", container_id, check=False).returncode == 6


@pytest.mark.kvm
def test_all_waiters_hear_of_the_end(pod: Pod) -> None:
    container_id = pod.new_id()
    client = pod.popen(*SLEEP, container_id=container_id)
    until(lambda: pod.tasks().get(container_id) == "RUNNING")
    attached = [pod.on_terminal("tasks", "attach", container_id) for _ in range(3)]

    until(lambda: pod("tasks", "kill", "--signal", "KILL", container_id, check=False).returncode == 0)

    assert client.wait(seconds(30)) == 137
    for terminal in attached:
        assert terminal.wait(30) in {137, 1}  # 1: ctr's own attempt to delete a task that another client deleted


@pytest.mark.kvm
def test_killing_the_tasks_host_pid_kills_the_container(pod: Pod) -> None:
    container = pod.start(*SLEEP)

    subprocess.run(["kill", "-KILL", str(container.pid)], check=True)

    assert container.wait() == 137


@pytest.mark.kvm
def test_the_tasks_host_pid_shows_the_containers_root(pod: Pod) -> None:
    container = pod.start(*SLEEP)
    container.exec("sh", "-c", "echo inside >/mark")

    assert Path(f"/proc/{container.pid}/root/mark").read_text() == "inside\n"


def test_the_end_of_one_container_leaves_the_others_of_its_vm_alone(pod: Pod) -> None:
    one, two = pod.start(*SLEEP), pod.start(*SLEEP)

    one.kill("SIGKILL")
    assert one.wait() == 137

    assert two.exec("echo", "alive").stdout == "alive\n"
    assert two.status == "RUNNING"


def test_a_start_is_logged_with_its_phases_in_milliseconds(ctr: Ctr) -> None:
    logged = logged_start(ctr)

    assert {"shim", "rootfs", "wait_for_vm", "create", "start"} <= logged["phases_ms"].keys()


def test_a_start_in_a_running_vm_is_logged_without_the_boot(pod: Pod) -> None:
    logged = logged_start(pod)

    assert logged["phases_ms"].keys() == {"rootfs", "wait_for_vm", "create", "start"}


def logged_start(ctr: Ctr) -> dict[str, Any]:
    """Start a container and return what the log says of it, once its times have been found to be possible."""
    began = time.monotonic()
    container = ctr.start(*SLEEP)
    took_ms = (time.monotonic() - began) * 1000
    lines = [line for line in ctr.containerd.log.read_text().splitlines() if f'"container": "{container.id}"' in line]
    (logged,) = (json.loads(line.partition(" msg=")[2]) for line in lines)
    assert all(phase >= 0 for phase in logged["phases_ms"].values())
    assert 0 < logged["total_ms"] < took_ms
    return dict(logged)
