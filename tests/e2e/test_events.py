"""The events of a task, as a subscriber of containerd's hears them: which, in which order, and each once."""

import threading
from collections.abc import Iterator

import pytest

from tests.framework.ctr import PYMICRO, RUNC, Container, Ctr
from tests.framework.events import EventStream, listening
from tests.framework.pod import Pod
from tests.framework.resources import HOG
from tests.framework.waiting import seconds, until

SLEEP = ("sleep", "100000")
EITHER = pytest.mark.parametrize("runtime", [RUNC, PYMICRO], ids=["runc", "pymicro"])


@pytest.fixture
def events(pod: Pod) -> Iterator[EventStream]:
    with listening(pod.containerd) as stream:
        yield stream


@pytest.mark.every_containerd
def test_the_events_of_a_run_come_in_order(ctr: Ctr) -> None:
    with listening(ctr.containerd) as events:
        assert ctr.run("sh", "-c", "exit 3").returncode == 3
        (name,) = ctr.ids
        events.until_told(name, f"delete {name}")
        events.synchronise()

    assert events.told(name) == [f"create {name}", f"start {name}", f"exit {name} 3", f"delete {name}"]
    create, start, ended, deleted = (event.content for event in events.of(name))
    assert create["pid"] == start["pid"] == ended["pid"] == deleted["pid"]
    assert deleted["exit_status"] == 3


@EITHER
def test_an_exec_is_added_started_and_ends(pod: Pod, events: EventStream, runtime: str) -> None:
    container = pod.start(*SLEEP, runtime=runtime)
    assert container.exec("sh", "-c", "exit 4", exec_id="e1").returncode == 4
    events.until_told(container.id, "exit e1 4")

    assert events.told(container.id)[2:] == ["exec-added e1", "exec-started e1", "exit e1 4"]
    pids = {event.content["pid"] for event in events.of(container.id)[3:]}
    assert len(pids) == 1


@EITHER
def test_an_exec_that_cannot_start_is_added_and_nothing_more(pod: Pod, events: EventStream, runtime: str) -> None:
    container = pod.start(*SLEEP, runtime=runtime)
    assert container.exec("nosuch", exec_id="e1").returncode != 0
    assert container.exec("true", exec_id="e2").returncode == 0
    events.until_told(container.id, "exit e2 0")

    assert events.told(container.id)[2:] == ["exec-added e1", "exec-added e2", "exec-started e2", "exit e2 0"]


def test_the_first_process_is_the_last_whose_exit_is_told(pod: Pod, events: EventStream) -> None:
    container = pod.start(*SLEEP)
    names = [f"e{number}" for number in range(5)]
    waiting = [threading.Thread(target=container.exec, args=SLEEP, kwargs={"exec_id": name}) for name in names]
    for thread in waiting:
        thread.start()
    events.until(lambda heard: sum("exec-started" in what for what in heard.told(container.id)) == len(names))

    container.kill("SIGKILL")
    for thread in waiting:
        thread.join(seconds(30))
    container.remove()
    events.until_told(container.id, f"delete {container.id}")

    *execs, init, deleted = events.told(container.id)[-7:]
    assert sorted(execs) == [f"exit {name} 137" for name in names]
    assert [init, deleted] == [f"exit {container.id} 137", f"delete {container.id}"]


@EITHER
def test_a_pause_and_a_resume_are_told(pod: Pod, events: EventStream, runtime: str) -> None:
    container = pod.start(*SLEEP, runtime=runtime)
    pod("tasks", "pause", container.id)
    pod("tasks", "resume", container.id)
    events.until_told(container.id, f"resumed {container.id}")

    assert events.told(container.id)[2:] == [f"paused {container.id}", f"resumed {container.id}"]


@pytest.mark.kvm
@EITHER
def test_want_of_memory_is_told_before_the_exit_that_it_causes(pod: Pod, events: EventStream, runtime: str) -> None:
    container = out_of_memory(pod, runtime)

    events.until_told(container.id, f"exit {container.id} 137")
    events.until_told(container.id, f"oom {container.id}")
    told = events.told(container.id)
    assert told.count(f"oom {container.id}") == 1
    if runtime == PYMICRO:  # runc's shim hears of the two on different ways
        assert told[2:] == [f"oom {container.id}", f"exit {container.id} 137"]


def test_want_of_memory_that_only_an_exec_feels_is_told_when_it_happens(pod: Pod, events: EventStream) -> None:
    container = pod.start(*SLEEP, options=["--memory-limit", str(48 << 20)])

    assert container.exec(*HOG, exec_id="hog").returncode == 137

    events.until_told(container.id, f"oom {container.id}")
    assert container.status == "RUNNING"
    assert events.told(container.id)[-2:] == [f"oom {container.id}", "exit hog 137"]


def out_of_memory(pod: Pod, runtime: str) -> Container:
    """Return a container that has wanted more memory than it may have."""
    wants = f"sleep 1; exec {' '.join(HOG)}"  # runc's shim begins to listen for it after the start
    container = pod.start("sh", "-c", wants, runtime=runtime, options=["--memory-limit", str(48 << 20)])
    until(lambda: container.status == "STOPPED")
    return container
