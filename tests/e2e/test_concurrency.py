"""Many containers at the same time: each in its own VM, and many in one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.framework.ctr import Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.pod import Pod
from tests.framework.waiting import until

AT_ONCE = 50

BOOT_ID = ("cat", "/proc/sys/kernel/random/boot_id")


def test_10_containers_started_at_the_same_time_have_a_vm_each(ctr: Ctr, leftovers: Leftovers) -> None:
    ids = [ctr.new_id() for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        runs = list(pool.map(lambda container_id: ctr.run(*BOOT_ID, container_id=container_id), ids))

    assert [(done.returncode, done.stderr) for done in runs] == [(0, "")] * 10
    assert len({done.stdout for done in runs}) == 10
    leftovers.check()


def test_10_containers_run_at_the_same_time_and_end_at_the_same_time(ctr: Ctr, leftovers: Leftovers) -> None:
    with ThreadPoolExecutor(10) as pool:
        containers = list(pool.map(lambda number: ctr.start("sleep", "100000", name=f"c{number}"), range(10)))
        assert set(ctr.tasks().values()) == {"RUNNING"}
        assert len({container.pid for container in containers}) == 10
        names = list(pool.map(lambda container: container.exec(*BOOT_ID).stdout, containers))
        assert len(set(names)) == 10

        for container in containers:
            container.kill()
        assert list(pool.map(lambda container: container.wait(), containers)) == [137] * 10
        for container in containers:
            ctr("containers", "rm", container.id)
    leftovers.check()


def test_10_containers_started_at_the_same_time_in_one_vm(pod: Pod) -> None:
    ids = [pod.new_id() for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        runs = list(pool.map(lambda container_id: pod.run(*BOOT_ID, container_id=container_id), ids))

    assert [(done.returncode, done.stderr) for done in runs] == [(0, "")] * 10
    assert {done.stdout for done in runs} == {pod.first.exec(*BOOT_ID).stdout}


def test_50_execs_at_the_same_time_in_one_container(pod: Pod) -> None:
    """Each one has its own output, on both streams, and its own exit code. None goes on before all of them run."""
    container = pod.start("sh", "-c", "mkfifo /gate && exec sleep 100000")
    arrived = Path(f"/proc/{container.pid}/root/arrived")

    def run(number: int) -> tuple[int, str, str]:
        prints = f"seq {number}00000 {number}09999; seq {number}50000 {number}50999 >&2"
        script = f"echo >>/arrived; cat /gate; {prints}; exit {number + 100}"
        done = container.exec("sh", "-c", script, exec_id=f"e{number}")
        return done.returncode, done.stdout, done.stderr

    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = pool.map(run, range(1, AT_ONCE + 1))
        until(lambda: arrived.exists() and arrived.stat().st_size == AT_ONCE, 120)
        container.exec("sh", "-c", "sleep 3 >/gate")

    for number, (code, out, err) in enumerate(outcomes, 1):
        assert code == number + 100
        assert out == lines(number * 100_000, 10_000)
        assert err == lines(number * 100_000 + 50_000, 1_000)


def lines(first: int, count: int) -> str:
    return "".join(f"{number}\n" for number in range(first, first + count))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_100_containers_one_after_the_other_leave_nothing(ctr: Ctr, leftovers: Leftovers) -> None:
    for number in range(100):
        assert ctr.run("echo", str(number)).stdout == f"{number}\n"
    leftovers.check()
