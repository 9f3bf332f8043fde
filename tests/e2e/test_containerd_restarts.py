"""containerd is killed and started again: containers go on, whoever waits for them goes on waiting, nothing is lost.

Its clients are cut off, so what a test looks at is a log file, the stream of events, and the shim's own service.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.framework.containerd import Containerd
from tests.framework.ctr import Container, Ctr
from tests.framework.events import listening
from tests.framework.leftovers import Leftovers
from tests.framework.sandbox import SHIM, Sandbox
from tests.framework.taskservice import TaskService
from tests.framework.waiting import seconds, until

KILLS = 20
SLOW = 8.0
"""Seconds for which a containerd says nothing: longer than runc's shim waits for it."""
COUNT = "n=0; while [ ! -e /end ]; do n=$((n + 1)); echo $n; usleep 5000; done; exit 7"


def test_no_line_of_a_log_is_missing_when_containerd_is_killed_20_times(
    ctr: Ctr, daemon: Containerd, leftovers: Leftovers, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    container = Container(ctr, ctr.new_id())
    options = ["--detach", "--log-uri", f"file://{log}"]
    ctr(*ctr.run_arguments(["sh", "-c", COUNT], options, None, container.id))
    pid = container.pid

    for _ in range(KILLS):
        daemon.crash()
        _until_it_grows(log)
        daemon.revive()
        assert (container.status, container.pid) == ("RUNNING", pid)

    with listening(daemon) as events:
        assert container.exec("touch", "/end").returncode == 0
        until(lambda: container.status == "STOPPED")
        assert "7" in ctr("tasks", "rm", container.id, check=False).stderr
        events.until_told(container.id, f"delete {container.id}")
        events.synchronise()
    numbers = [int(line) for line in log.read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    init = [event for event in events.told(container.id) if event.endswith(container.id) or "exit" in event]
    assert init[-2:] == [f"exit {container.id} 7", f"delete {container.id}"]
    assert init.count(f"exit {container.id} 7") == 1
    ctr("containers", "rm", container.id)
    leftovers.check()


def _until_it_grows(file: Path) -> None:
    size = file.stat().st_size
    until(lambda: file.stat().st_size > size)


def test_who_waits_at_the_shim_goes_on_waiting(ctr: Ctr, daemon: Containerd) -> None:
    container = ctr.start("sh", "-c", "while [ ! -e /end ]; do sleep 0.2; done; exit 9")
    task, ended = TaskService.of(container), list[int]()
    waiting = threading.Thread(target=lambda: ended.append(task.wait()))
    waiting.start()

    for _ in range(2):
        daemon.crash()
        daemon.revive()
    assert not ended
    client = ctr.client("tasks", "attach", container.id)
    time.sleep(seconds(0.5))
    Path(f"/proc/{container.pid}/root/end").touch()

    waiting.join(seconds(30))
    assert ended == [9]
    assert client.wait(seconds(30)) == 9


@contextmanager
def events_held_back(daemon: Containerd, container: Container) -> Iterator[None]:
    """Keep a shim from reaching containerd: in its own mount namespace something else lies over the socket's folder.

    containerd reaches the shim all the same. So a test can listen before the first event comes.
    """
    shim = Sandbox(daemon, container.id).find(SHIM)
    enter = ["nsenter", "--target", str(shim), "--mount"]
    subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(daemon.home)], check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "umount", str(daemon.home)], check=True)


@pytest.mark.usefixtures("only_our_runtime")
def test_events_of_the_time_without_containerd_come_to_the_next_one_in_order_and_once(
    ctr: Ctr, daemon: Containerd
) -> None:
    container = ctr.start("sleep", "100000")
    root = Path(f"/proc/{container.pid}/root")
    names = [f"e{number}" for number in range(1, 6)]
    for code, name in enumerate(names, 1):
        waits = f"while [ ! -e /{name} ]; do sleep 0.1; done; touch /{name}.ended; exit {code}"
        ctr("tasks", "exec", "--detach", "--exec-id", name, container.id, "sh", "-c", waits)

    with ExitStack() as stack:
        with events_held_back(daemon, container):
            daemon.crash()
            for name in reversed(names):
                (root / name).touch()
                until((root / f"{name}.ended").exists)
                time.sleep(seconds(0.3))
            daemon.revive()
            events = stack.enter_context(listening(daemon))
        ended = [f"exit e{number} {number}" for number in (5, 4, 3, 2, 1)]
        events.until_told(container.id, ended[-1])
        container.kill("SIGKILL")
        events.until_told(container.id, f"exit {container.id} 137")
        container.remove()
        events.until_told(container.id, f"delete {container.id}")
        assert events.told(container.id) == [*ended, f"exit {container.id} 137", f"delete {container.id}"]


@pytest.mark.usefixtures("only_our_runtime")
def test_a_containerd_that_is_slow_is_told_each_event_once(ctr: Ctr, daemon: Containerd) -> None:
    """It takes an event when it goes on, long after the shim has sent it."""
    with listening(daemon) as events:
        container = ctr.start("sh", "-c", "while [ ! -e /end ]; do sleep 0.1; done; exit 5")
        end = Path(f"/proc/{container.pid}/root/end")
        (process,) = daemon.daemons()
        os.kill(process.pid, signal.SIGSTOP)
        try:
            end.touch()
            time.sleep(SLOW)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        events.until_told(container.id, f"exit {container.id} 5")
        container.remove()
        events.until_told(container.id, f"delete {container.id}")
        events.synchronise()

        told = [what for what in events.told(container.id) if what.startswith(("exit", "delete"))]
        assert told == [f"exit {container.id} 5", f"delete {container.id}"]
