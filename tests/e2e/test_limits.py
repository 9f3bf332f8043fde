"""What a container uses and what it may use: statistics of known loads, limits and their change, as with runc."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pymicro.shim import cgroup

from tests.framework.ctr import PYMICRO, RUNC, Container
from tests.framework.pod import Pod
from tests.framework.resources import HOG
from tests.framework.taskservice import TaskService
from tests.framework.waiting import seconds, until

MIB = 1 << 20
SLEEP = ("sleep", "100000")
TOLERANCE = 0.1
V2 = cgroup.is_v2()

CPU_SECONDS = 3
COUNT = "n=0; while [ $n -lt 1000 ]; do n=$((n + 1)); done; read -r line </proc/$$/stat; set -- $line"
ENOUGH = f"[ $((${{14}} + ${{15}})) -ge {CPU_SECONDS}00 ]"
BURN = ("sh", "-c", f"while {COUNT}; ! {ENOUGH}; do :; done; echo $((${{14}} + ${{15}}))")
"""Computes for so many seconds of CPU or a little more, and prints how long by its own count, in hundredths of a second
(proc(5), utime and stime).
"""
HELD_MIB = 32
HOLD = ("sh", "-c", f"dd if=/dev/zero bs={HELD_MIB}M count=1 | sleep 100000")
"""Holds memory: dd has read it and waits, since nobody takes it."""
FILE = ("dd", "if=/dev/zero", "of=/dev/shm/file", "bs=1M", f"count={HELD_MIB}")


@dataclass(frozen=True, slots=True)
class Statistics:
    """What `ctr task metrics` says of a container, whichever version of cgroups its host has. Sizes in bytes."""

    cpu: float
    """Seconds."""
    memory: float
    anonymous: float
    limit: float
    pids: float
    pids_limit: float
    oom_kills: float
    throttled: float

    @classmethod
    def of(cls, container: Container) -> "Statistics":
        done = container.ctr("tasks", "metrics", "--format", "json", container.id)
        said = json.loads(done.stdout)
        return cls(*(_v2(said) if V2 else _v1(said)))


def _v1(said: dict[str, Any]) -> Iterator[float]:  # JSON of containerd's message
    cpu, memory, pids = said["cpu"], said["memory"], said["pids"]
    yield cpu["usage"]["total"] / 1e9
    yield memory["usage"]["usage"]
    yield memory.get("total_rss", 0)
    yield memory["usage"]["limit"]
    yield pids.get("current", 0)
    yield pids.get("limit", 0)
    yield said.get("memory_oom_control", {}).get("oom_kill", 0)
    yield cpu.get("throttling", {}).get("throttled_periods", 0)


def _v2(said: dict[str, Any]) -> Iterator[float]:  # as above
    cpu, memory, pids = said["cpu"], said["memory"], said["pids"]
    yield cpu["usage_usec"] / 1e6
    yield memory["usage"]
    yield memory.get("anon", 0)
    yield memory["usage_limit"]
    yield pids.get("current", 0)
    yield pids.get("limit", 0)
    yield said.get("memory_events", {}).get("oom_kill", 0)
    yield cpu.get("nr_throttled", 0)


@pytest.fixture(params=[RUNC, PYMICRO], ids=["runc", "pymicro"])
def runtime(request: pytest.FixtureRequest) -> str:
    """Return runc's name and then ours: what a test says holds for both."""
    return str(request.param)


def started(pod: Pod, runtime: str, *options: str) -> Container:
    return pod.start(*SLEEP, runtime=runtime, options=options)


# -- a known load ------------------------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_cpu_and_memory_of_a_known_load_are_what_runc_says(pod: Pod, capsys: pytest.CaptureFixture[str]) -> None:
    """Each within a tenth of the load itself, and of what runc says."""
    used = {runtime: known_load(started(pod, runtime)) for runtime in (RUNC, PYMICRO)}

    with capsys.disabled():
        print(f"\n{HELD_MIB} MiB in a file, {HELD_MIB} MiB anonymous, and some seconds of CPU:")
        for runtime, (burnt, cpu, file, held) in used.items():
            print(f"  {runtime}: {file:.1f} MiB, {held:.1f} MiB, {cpu:.2f} s for {burnt:.2f} s")
    for burnt, *figures in used.values():
        assert burnt >= CPU_SECONDS
        assert figures == pytest.approx([burnt, HELD_MIB, HELD_MIB], rel=TOLERANCE)
    ours, theirs = ((cpu / burnt, file, held) for burnt, cpu, file, held in (used[PYMICRO], used[RUNC]))
    assert ours == pytest.approx(theirs, rel=TOLERANCE)


def known_load(container: Container) -> tuple[float, float, float, float]:
    """Return for how many seconds a load has computed, and what statistics say that it took: seconds of CPU, MiB of a
    file in memory, MiB of a process.
    """
    idle = Statistics.of(container)
    own = int(container.exec(*BURN).stdout) / 100
    burnt = Statistics.of(container)
    assert container.exec(*FILE).returncode == 0
    filled = Statistics.of(container)
    container.ctr("tasks", "exec", "--detach", "--exec-id", "hold", container.id, *HOLD)
    until(lambda: Statistics.of(container).anonymous > filled.anonymous + HELD_MIB * MIB * 0.9)
    held = Statistics.of(container)
    return own, burnt.cpu - idle.cpu, (filled.memory - burnt.memory) / MIB, (held.anonymous - filled.anonymous) / MIB


def test_statistics_can_be_had_until_the_task_is_deleted(pod: Pod, runtime: str) -> None:
    container = pod.start(*HOG, runtime=runtime, options=["--memory-limit", str(48 * MIB)])
    until(lambda: container.status == "STOPPED")

    found = Statistics.of(container)

    assert found.oom_kills == 1
    assert found.cpu > 0
    assert found.limit == 48 * MIB


# -- changed limits ----------------------------------------------------------------------------------------------------


def test_limits_are_shown_before_and_after_their_change(pod: Pod, runtime: str) -> None:
    container = started(pod, runtime, "--memory-limit", str(64 * MIB))
    task = TaskService.of(container)
    assert Statistics.of(container).limit == 64 * MIB

    task.update({"memory": {"limit": 80 * MIB}, "pids": {"limit": 17}})

    found = Statistics.of(container)
    assert (found.limit, found.pids_limit) == (80 * MIB, 17)


@pytest.mark.usefixtures("only_our_runtime")
def test_a_limit_that_the_vm_has_no_room_for_is_refused(pod: Pod) -> None:
    container = started(pod, pod.runtime, "--memory-limit", str(64 * MIB))
    with pytest.raises(Exception, match=r"a memory limit of 1048576 MiB: the VM has \d+ MiB and cannot grow"):
        TaskService.of(container).update({"memory": {"limit": 1 << 40}})
    assert Statistics.of(container).limit == 64 * MIB


@pytest.mark.kvm
def test_a_memory_limit_that_is_lowered_holds(pod: Pod, runtime: str) -> None:
    container = started(pod, runtime)
    task = TaskService.of(container)
    assert container.exec(*HOG).returncode == 0

    task.update({"memory": {"limit": 48 * MIB}})

    assert container.exec(*HOG).returncode == 137
    assert container.status == "RUNNING"
    task.update({"memory": {"limit": 160 * MIB}})
    assert container.exec(*HOG).returncode == 0


def test_a_limit_of_processes_that_is_lowered_holds(pod: Pod, runtime: str) -> None:
    container = started(pod, runtime)
    crowd = ("sh", "-c", "for n in 1 2 3 4 5 6 7 8; do sleep 2 & done; wait")
    assert container.exec(*crowd).returncode == 0

    TaskService.of(container).update({"pids": {"limit": 6}})

    assert "can't fork" in container.exec(*crowd).stderr


def test_a_limit_of_the_cpu_that_is_set_holds(pod: Pod, runtime: str) -> None:
    container = started(pod, runtime)
    TaskService.of(container).update({"cpu": {"quota": 20_000, "period": 100_000}})
    before = Statistics.of(container)

    begun = time.monotonic()
    container.exec("timeout", "4", "sh", "-c", "while :; do :; done")
    took = time.monotonic() - begun

    after = Statistics.of(container)
    assert after.cpu - before.cpu < 0.2 * took * 1.2
    assert after.throttled > before.throttled


def test_a_task_that_has_ended_takes_no_new_limits(pod: Pod, runtime: str) -> None:
    container = started(pod, runtime)
    task = TaskService.of(container)
    container.kill("SIGKILL")
    until(lambda: container.status == "STOPPED")

    with pytest.raises(Exception, match=r"(?i)stopped|not running|not created|no such process|not found"):
        task.update({"memory": {"limit": 48 * MIB}})


# -- processes ---------------------------------------------------------------------------------------------------------


def test_processes_are_listed_with_the_execs_that_they_are(pod: Pod, runtime: str) -> None:
    container = pod.start("sh", "-c", "sleep 4242 & exec sleep 100000", runtime=runtime)
    pod("tasks", "exec", "--detach", "--exec-id", "e1", container.id, *SLEEP)
    task = TaskService.of(container)
    until(lambda: len(task.pids()) == 3)

    found = task.pids()

    assert found[container.pid] in {"", container.id}
    assert max(found.values()) == "e1"
    assert list(found.values()).count("e1") == 1
    assert found[task.state("e1").pid] == "e1"
    if runtime != RUNC:
        strangers = {pid for pid in found if pid != container.pid and Path(f"/proc/{pid}").exists()}
        assert not strangers, "who looks for these pids on the host must not find other processes"


# -- at the same time --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_our_runtime")
def test_calls_on_one_task_at_the_same_time_are_all_answered(pod: Pod) -> None:
    """Some look, some freeze and thaw it, some run something, until one ends it: then every waiter knows how."""
    container = started(pod, PYMICRO)
    task = TaskService.of(container)
    with ThreadPoolExecutor(40) as pool:
        waiters = [pool.submit(task.wait) for _ in range(5)]
        looks: list[Future[Any]] = []  # of many types, and only their ends are of interest
        for number in range(4):
            looks += [pool.submit(task.pids), pool.submit(task.state), pool.submit(Statistics.of, container)]
            looks.append(pool.submit(task.update, {"pids": {"limit": 100 + number}}))
        runs = [pool.submit(container.exec, "sh", "-c", f"exit {n}") for n in range(4)]
        assert [run.result(seconds(60)).returncode for run in runs] == [0, 1, 2, 3]
        for call in looks:
            call.result(seconds(60))
        pauses = [pool.submit(container.ctr, "tasks", "pause", container.id, check=False) for _ in range(4)]
        codes = [pause.result(seconds(60)).returncode for pause in pauses]
        assert codes.count(0) == 1
        assert container.status == "PAUSED"
        pod("tasks", "resume", container.id)
        kills = [pool.submit(container.kill, "SIGKILL") for _ in range(4)]
        assert {waiter.result(seconds(60)) for waiter in waiters} == {137}
        said = [kill.result(seconds(60)) for kill in kills]
        assert all(done.returncode == 0 or "already finished" in done.stderr for done in said)
        removals = [pool.submit(pod, "tasks", "rm", container.id, check=False) for _ in range(4)]
        for removal in removals:
            removal.result(seconds(60))
    assert container.status == "GONE"
