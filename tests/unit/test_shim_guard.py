"""The guard: what a killed daemon leaves is freed, what ends by itself is not touched, and waiting costs little."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pymicro.shim import state

START = """
import os, sys, time
from pymicro.shim import guard, state
directory = sys.argv[1]
ended, end = os.pipe()
daemon = os.fork()
if daemon == 0:
    state.write(directory, {"shim_pid": os.getpid()})
    os.read(0, 1)
    os.write(end, guard.GOOD_END)
    os._exit(0)
print(daemon, flush=True)
guard.become_guard(ended, directory, daemon)
"""


class Guarded:
    """A daemon that lives until it is told to end, and its guard."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        words = [sys.executable, "-c", START, str(directory)]
        self.guard = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.guard.stdout
        self.daemon = int(self.guard.stdout.readline())
        deadline = time.monotonic() + 5
        while not state.read(str(directory)):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_for_shell(self) -> None:
        """Return when the guard is what it is to be."""
        command = Path(f"/proc/{self.guard.pid}/cmdline")
        deadline = time.monotonic() + 5
        while not command.read_bytes().startswith(b"pymicro-guard"):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill_daemon(self) -> None:
        os.kill(self.daemon, signal.SIGKILL)
        self.guard.communicate(timeout=10)

    def end_daemon(self) -> None:
        self.guard.communicate(b"x", timeout=10)


def test_what_a_killed_daemon_leaves_is_freed(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "run")
    guarded.kill_daemon()
    assert not guarded.directory.exists()
    assert guarded.guard.returncode == 0


def test_a_daemon_that_ends_by_itself_is_believed(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "run")
    guarded.end_daemon()
    assert guarded.directory.exists()


@pytest.mark.parametrize("record", [{}, {"shim_pid": 1}], ids=["not yet written", "written"])
def test_a_new_sandbox_of_the_same_name_is_left(tmp_path: Path, record: dict[str, int]) -> None:
    """`delete` has freed the old one by now."""
    guarded = Guarded(tmp_path / "run")
    guarded.wait_for_shell()
    shutil.rmtree(guarded.directory)
    guarded.directory.mkdir()
    if record:
        state.write(str(guarded.directory), record)
    guarded.kill_daemon()
    assert guarded.directory.exists()


def test_waiting_takes_less_than_a_megabyte(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "run")
    guarded.wait_for_shell()
    time.sleep(0.05)
    rollup = Path(f"/proc/{guarded.guard.pid}/smaps_rollup").read_text(encoding="ascii")
    private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private"))
    fds = Path(f"/proc/{guarded.guard.pid}/fd")
    opened = {os.readlink(fds / fd).partition(":")[0] for fd in os.listdir(fds)}
    guarded.end_daemon()
    assert private < 1024, "kB"
    assert opened == {"/dev/null", "pipe", str(guarded.directory)}, "and nothing of the daemon's"
