"""`make kvm-lab`: a command runs on a host with KVM, what it says and leaves comes back, and nothing outlives it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.containerd import REPOSITORY
from tests.framework.kvmlab import kernel
from tests.framework.kvmlab.lab import FILES, TIMED_OUT, emulator
from tests.framework.processes import MARK, processes_of
from tests.framework.waiting import until

BOOTS = 180
"""Seconds in which the lab boots and switches off, amply."""

FACTS = """
test -c /dev/kvm -a -c /dev/vhost-vsock && echo devices
grep -qw svm /proc/cpuinfo && echo svm
grep -q '^cgroup ' /proc/mounts || echo v2 alone
echo "$(nproc) CPUs, the first is $(cat /sys/fs/cgroup/first-cpu/cpuset.cpus.partition)"
pwd
echo "a  'quoted'  word" >&2
echo kept >build/lab/file
echo lost >tests/file
exit 7
"""


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid():
        pytest.skip("the lab needs root, whose files it shows")
    kernel.kernel()  # both fetched before the lab's output is looked at, and its time is taken
    emulator()


@pytest.fixture
def kept() -> Iterator[Path]:
    yield FILES / "file"
    (FILES / "file").unlink(missing_ok=True)


def argv(command: str, limit: float = BOOTS) -> list[str]:
    return [sys.executable, "-m", "tests.framework.kvmlab", "--limit", str(limit), "--", command]


def run(command: str, directory: Path, limit: float = BOOTS) -> subprocess.CompletedProcess[str]:
    """Run a command in the lab; `processes_of(directory)` are its processes here."""
    return subprocess.run(
        argv(command, limit),
        cwd=REPOSITORY,
        env={**os.environ, MARK: str(directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=BOOTS,
    )


def test_a_command_runs_on_a_host_with_kvm_and_its_exit_code_output_and_files_come_back(
    kept: Path, tmp_path: Path
) -> None:
    done = run(FACTS, tmp_path)

    assert done.stdout == f"devices\nsvm\nv2 alone\n2 CPUs, the first is isolated\n{REPOSITORY}\n", done.stderr
    assert (done.returncode, done.stderr) == (7, "a  'quoted'  word\n")
    assert kept.read_text() == "kept\n"
    assert not (REPOSITORY / "tests/file").exists()
    assert processes_of(tmp_path) == []


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    done = run("sleep 100000", tmp_path, 3)

    assert done.returncode == TIMED_OUT
    assert "not done after 3 s (LIMIT)" in done.stderr
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_the_lab_does_not_outlive_who_started_it(sent: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, MARK: str(tmp_path)}
    with subprocess.Popen(argv("sleep 100000"), cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL) as process:
        until(lambda: any("pymicro-kvm-lab" in each.command for each in processes_of(tmp_path)))
        process.send_signal(sent)
    assert process.returncode == (143 if sent == signal.SIGTERM else -sent)

    until(lambda: processes_of(tmp_path) == [], 10)


def test_a_shell_needs_a_terminal(tmp_path: Path) -> None:
    done = run("", tmp_path)

    assert done.returncode == 2
    assert 'make kvm-lab ARGS="uname -a"' in done.stderr
