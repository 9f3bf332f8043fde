"""The test framework itself, tried with runc: what it reports about a known-good runtime must be right."""

import os
import signal

import pytest

from tests.framework.containerd import Containerd
from tests.framework.ctr import RUNC, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.shimlog import ShimLog

SLEEP = ("sleep", "100000")


@pytest.mark.every_containerd
def test_each_containerd_runs_a_container(ctr: Ctr) -> None:
    done = ctr.run("sh", "-c", "cat; echo problem >&2; exit 3", runtime=RUNC, stdin="input\n")

    assert (done.returncode, done.stdout, done.stderr) == (3, "input\n", "problem\n")
    assert ctr.containerd.version in ctr("version").stdout.partition("Server:")[2]


def test_a_background_container_can_be_driven(ctr: Ctr) -> None:
    container = ctr.start(*SLEEP, runtime=RUNC)
    assert container.status == "RUNNING"
    assert container.exec("sh", "-c", "echo $((6 * 7)); exit 5").stdout == "42\n"

    container.kill("SIGKILL")
    assert container.wait() == 137
    container.remove()
    assert container.status == "GONE"


def test_a_terminal_shows_what_is_typed_and_its_size(ctr: Ctr) -> None:
    terminal = ctr.terminal("sh", runtime=RUNC, rows=33, columns=101)
    terminal.expect("# ")
    waits = "until stty size | grep '{}'; do sleep 0.1; done"  # clients set a size when they have started the program
    terminal.send(f"{waits.format('33 101')}\n")
    terminal.expect("\n33 101")
    terminal.resize(20, 60)
    terminal.send(f"{waits.format('20 60')}; exit 4\n")
    terminal.expect("\n20 60")
    assert terminal.wait() == 4


def test_what_is_left_behind_is_found(ctr: Ctr, leftovers: Leftovers) -> None:
    leftovers.check(grace=0)
    container = ctr.start(*SLEEP, runtime=RUNC)

    found = "\n".join(leftovers.remaining())

    for kind in ("process", "mount", "directory", "socket", "cgroup"):
        assert f"{kind} " in found
    container.remove()
    leftovers.check()


@pytest.mark.usefixtures("only_our_runtime")
def test_vms_start_as_the_whole_run_was_asked_for_whatever_else_a_test_sets(
    ctr: Ctr, request: pytest.FixtureRequest
) -> None:
    log, container_id = ShimLog(ctr.containerd), ctr.new_id()
    ctr.containerd.write_settings(timeouts={"hello": 61})
    try:
        assert ctr.run("true", container_id=container_id).returncode == 0
    finally:
        ctr.containerd.write_settings()

    cold = request.config.getoption("--start") == "boot"
    assert log.cold([container_id]) == ([container_id] if cold else [])


def test_the_remains_of_a_killed_containerd_are_removed(ctr: Ctr, leftovers: Leftovers) -> None:
    containerd = ctr.containerd
    ctr.start(*SLEEP, runtime=RUNC)
    (daemon,) = containerd.daemons()
    os.kill(daemon.pid, signal.SIGKILL)

    containerd.start()

    leftovers.check()
    assert ctr.run("echo", "again", runtime=RUNC).stdout == "again\n"


def test_two_versions_run_side_by_side(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Containerd("1.6", tmp_path_factory.mktemp("a-directory-with-a-long-name-" + "x" * 60))
    try:
        other.start()
        assert other.responds()
        assert containerd.responds()
        assert "1.6" in other.ctr("version").stdout
    finally:
        other.stop()
    assert containerd.responds()
    assert not other.home.exists()
