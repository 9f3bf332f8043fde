"""The reaper: every exit reaches who waits for it, in any order. In a process of its own: it takes all children."""

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import os, sys, time
sys.path[:0] = PATHS
from pymicro.agent.concurrency import Event
from pymicro.agent.reaper import Reaper, exit_status
null = os.open("/dev/null", os.O_RDWR)
stdio = (null, null, null)
reaper = Reaper()
reaper.start()

def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
"""


def run(script: str) -> None:
    paths = [path for path in sys.path if path.endswith(("agent", "protos"))]
    program = PRELUDE.replace("PATHS", repr(paths)) + textwrap.dedent(script)
    subprocess.run([sys.executable, "-I", "-c", program], check=True, timeout=60)


def test_run_returns_the_status() -> None:
    run("""
        assert reaper.run(["/bin/sh", "-c", "exit 3"], stdio) == 3
        assert reaper.run(["/bin/sh", "-c", "kill -9 $$"], stdio) == 137
        time.sleep(0.1)  # nobody is left: the reaper waits for the next one
        assert reaper.run(["/bin/sh", "-c", "exit 4"], stdio) == 4
    """)


def test_many_at_once() -> None:
    run("""
        got = {}
        for n in range(50):
            reaper.spawn(["/bin/sh", "-c", f"exit {n}"], stdio, lambda status, n=n: got.update({n: status}))
        wait_for(lambda: len(got) == 50)
        assert got == {number: number for number in range(50)}
    """)


@pytest.mark.parametrize("delay", [0, 0.3])
def test_a_child_that_we_did_not_start(delay: float) -> None:
    """An exit before `watch` and one after it both arrive: crun's container may end before crun does."""
    run(f"""
        reaper.expect()
        helper = reaper.spawn(["/bin/sleep", "5"], stdio, lambda status: None)  # the reaper must be waiting
        pid = os.fork()
        if pid == 0:
            time.sleep(0.15)
            os._exit(7)
        time.sleep({delay})
        got = []
        reaper.watch(pid, got.append)
        reaper.forget()
        wait_for(lambda: got)
        assert got == [7]
        assert not reaper.send_signal(pid, 0)
        assert reaper.send_signal(helper, 9)
    """)


def test_unclaimed_exits_are_not_kept() -> None:
    run("""
        holder = reaper.spawn(["/bin/sleep", "30"], stdio, lambda status: None)
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
        reaper.expect()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        wait_for(lambda: pid in reaper._unclaimed)
        reaper.forget()
        assert not reaper._unclaimed
        reaper.send_signal(holder, 9)
    """)


def test_descriptors_and_signals_are_not_inherited() -> None:
    run("""
        read, write = os.pipe()
        script = "ls /proc/self/fd | wc -l; grep SigIgn /proc/self/status"
        assert reaper.run(["/bin/sh", "-c", script], (null, write, null)) == 0
        os.close(write)
        count, ignored = os.read(read, 1000).decode().split("\\n")[:2]
        assert int(count) == 4, count  # the three and the one that ls opens
        assert int(ignored.split()[1], 16) & (1 << 12) == 0, ignored
    """)
