"""Log binaries, as `nerdctl run -d` uses them: they get every byte, and their end is nobody else's trouble."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.framework.ctr import Completed, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.sandbox import SHIM, Sandbox, eventually

TAKES_BOTH = 'exec 5>&-; cat <&3 >"$2/out" & cat <&4 >"$2/err" & wait; echo "$CONTAINER_ID" > "$2/end"'


class LogBinary:
    """A log binary, a shell script that is given its directory, and containers that log to it."""

    def __init__(self, ctr: Ctr, directory: Path) -> None:
        self.ctr = ctr
        self.directory = directory

    def write(self, script: str) -> None:
        program = self.directory / "logger"
        program.write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\necho $$ > "$2/pid"\n{script}\n')
        program.chmod(0o755)

    def run(self, *command: str) -> tuple[str, Completed]:
        """Start a container in the background; return its id and what `ctr` said."""
        container_id = self.ctr.new_id()
        options = ["--detach", "--log-uri", f"binary://{self.directory}/logger?dir={self.directory}"]
        return container_id, self.ctr(*self.ctr.run_arguments(command, options, None, container_id), check=False)

    def file(self, name: str) -> str:
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    @property
    def ended(self) -> bool:
        return not Path(f"/proc/{self.file('pid').strip()}").exists()


@pytest.fixture
def logger(ctr: Ctr) -> Iterator[LogBinary]:
    with TemporaryDirectory(prefix="log-") as directory:
        yield LogBinary(ctr, Path(directory))


def stopped(ctr: Ctr, container_id: str) -> Callable[[], bool]:
    return lambda: ctr.tasks()[container_id] == "STOPPED"


@pytest.mark.every_containerd
def test_a_log_binary_gets_every_byte_of_both_outputs(logger: LogBinary) -> None:
    logger.write(TAKES_BOTH)

    container_id, done = logger.run("sh", "-c", "seq 1 100000; echo bad >&2; exit 3")

    assert done.returncode == 0, done.stderr
    eventually(stopped(logger.ctr, container_id), "the task ends", 60)
    logger.ctr("tasks", "rm", container_id, check=False)
    assert logger.file("out") == "".join(f"{number}\n" for number in range(1, 100_001))
    assert logger.file("err") == "bad\n"
    assert logger.file("end") == f"{container_id}\n"
    assert logger.ended


@pytest.mark.usefixtures("only_our_runtime")
def test_a_log_binary_that_fails_at_once_is_the_error(logger: LogBinary, leftovers: Leftovers) -> None:
    logger.write("echo no disk >&2; exit 3")

    _, done = logger.run("true")

    assert done.returncode != 0
    assert "ended before it was ready, exit status 3; it said: no disk" in done.stderr
    leftovers.check()


@pytest.mark.usefixtures("only_our_runtime")
def test_a_log_binary_that_dies_does_not_hold_up_the_container(logger: LogBinary) -> None:
    logger.write('exec 5>&-; head -n 1 <&3 > "$2/out"; exit 4')

    container_id, done = logger.run("sh", "-c", "seq 1 200000; sleep 1; seq 1 200000; exit 6")

    assert done.returncode == 0, done.stderr
    eventually(stopped(logger.ctr, container_id), "the task ends", 60)
    begun = time.monotonic()
    removed = logger.ctr("tasks", "rm", container_id, check=False)
    assert time.monotonic() - begun < 10
    assert "exit code 6" in removed.stderr
    assert logger.file("out") == "1\n"
    assert "while output may still come: that is lost" in logger.ctr.containerd.log_tail(200)


@pytest.mark.usefixtures("only_our_runtime")
def test_a_log_binary_keeps_what_it_got_when_the_shim_is_killed(logger: LogBinary, leftovers: Leftovers) -> None:
    logger.write(TAKES_BOTH)
    container_id, done = logger.run("sh", "-c", "echo before; sleep 100000")
    assert done.returncode == 0, done.stderr
    eventually(lambda: logger.file("out") == "before\n", "the output arrives", 20)

    Sandbox(logger.ctr.containerd, container_id).kill(SHIM)

    eventually(lambda: logger.ended, "the log binary ends", 10)
    assert logger.file("end") == f"{container_id}\n", "it was not left the time to write what it held"
    leftovers.check()
    logger.ctr("containers", "rm", container_id)
