"""A shim holds no more after many execs, attaches, pauses and failures than after the first ones."""

from collections import Counter

import pytest

from tests.framework.ctr import Container
from tests.framework.pod import Pod
from tests.framework.resources import open_files, pss, threads
from tests.framework.sandbox import SHIM, Sandbox
from tests.framework.waiting import seconds, until

pytestmark = pytest.mark.usefixtures("only_our_runtime")

ROUNDS = 8
MEMORY = 2.0
"""MB."""


def one_of_each(pod: Pod, container: Container) -> None:
    """Have the shim do what takes descriptors, threads or memory: all of it has ended when this returns."""
    assert container.exec("sh", "-c", "cat; echo err >&2; exit 3", stdin="input\n").returncode == 3
    assert container.exec("nosuch").returncode != 0
    terminal = pod.on_terminal("tasks", "exec", "--tty", "--exec-id", "tty", container.id, "sh", "-c", "exit 4")
    assert terminal.wait() == 4
    killed = pod.client("tasks", "exec", "--exec-id", "killed", container.id, "sleep", "4242")
    until(lambda: "killed" in pod("tasks", "ps", container.id).stdout)
    container.kill("SIGKILL", "--exec-id", "killed")
    assert killed.wait(seconds(30)) == 137
    attached = [pod.client("tasks", "attach", container.id) for _ in range(2)]
    pod("tasks", "metrics", container.id)
    pod("tasks", "pause", container.id)
    pod("tasks", "resume", container.id)
    for client in attached:
        client.kill()
        client.wait()
    assert pod.run("echo", "hello").stdout == "hello\n"


@pytest.mark.timeout(600)
def test_many_execs_attaches_and_containers_leave_no_thread_file_or_memory(
    pod: Pod, capsys: pytest.CaptureFixture[str]
) -> None:
    shim = Sandbox(pod.containerd, pod.id).find(SHIM)
    assert shim
    container = pod.start("sleep", "100000")
    for _ in range(2):  # what is imported and cached at first use
        one_of_each(pod, container)
    files, count, memory = open_files(shim), threads(shim), pss(shim)

    for _ in range(ROUNDS):
        one_of_each(pod, container)

    until(lambda: len(open_files(shim)) <= len(files))
    with capsys.disabled():
        now = f"{len(open_files(shim))} files, {threads(shim)} threads, {pss(shim):.1f} MB"
        print(f"\nafter {ROUNDS} rounds: {now}; before {len(files)}, {count}, {memory:.1f}")
    assert Counter(open_files(shim)) == Counter(files)
    assert threads(shim) <= count
    assert pss(shim) < memory + MEMORY
