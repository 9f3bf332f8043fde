"""stdin, stdout and stderr: every byte arrives, in order and once, and so does the end."""

import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from pymicro.ttrpc import StatusError

from tests.framework.ctr import Completed, Ctr
from tests.framework.pod import Pod
from tests.framework.resources import open_files, peak, pss
from tests.framework.sandbox import SHIM, Sandbox
from tests.framework.taskservice import TaskService
from tests.framework.waiting import seconds, until

MIB = 1 << 20
SEED = 20251123

# 64 KiB of which every line differs from the others
PRINT_64_KIB = ("seq", "1000000", "1008191")
LINES = "".join(f"{number}\n" for number in range(1000000, 1008192))


class Client:
    """`ctr` with a feeder and readers, so that no pipe of it ever blocks for ever."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.sent = hashlib.sha256()
        self.received = hashlib.sha256()
        self.received_bytes = 0
        self._end_input = threading.Event()

    def send(self, pieces: Iterator[bytes]) -> threading.Thread:
        """Begin to feed the client; its input ends with `end_input`."""
        feeder = threading.Thread(target=self._feed, args=(pieces,))
        feeder.start()
        return feeder

    def _feed(self, pieces: Iterator[bytes]) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError), self.process.stdin as pipe:
            for piece in pieces:
                self.sent.update(piece)
                pipe.write(piece)
            pipe.flush()
            self._end_input.wait()

    def receive(self, total: int | None = None) -> None:
        """Read `total` bytes of the client's output, or all of it."""
        assert self.process.stdout
        while total is None or self.received_bytes < total:
            piece = self.process.stdout.read1(MIB)  # type: ignore[attr-defined]  # Popen's pipes are BufferedReaders
            if not piece:
                return
            self.received.update(piece)
            self.received_bytes += len(piece)

    def end_input(self) -> None:
        self._end_input.set()


def random_pieces(total: int) -> Iterator[bytes]:
    """Yield `total` random bytes, the same ones each time, in pieces of many sizes."""
    source = random.Random(SEED)
    while total > 0:
        size = min(total, source.choice((1, 511, 4096, 65536, MIB)))
        total -= size
        yield source.randbytes(size)


def same_outcome(run: Callable[[int], Completed], times: int, at_once: int) -> Counter[str]:
    """Do the same thing `times` times, `at_once` at the same time; count the different outcomes."""

    def outcome(number: int) -> str:
        done = run(number)
        if done.stdout == LINES and done.returncode == 0 and not done.stderr:
            return "everything"
        return f"exit code {done.returncode}, {len(done.stdout)} bytes, {done.stderr}"

    with ThreadPoolExecutor(at_once) as pool:
        return Counter(pool.map(outcome, range(times)))


# -- input -------------------------------------------------------------------------------------------------------------


@pytest.mark.every_containerd
@pytest.mark.parametrize("start", [pytest.param("boot", marks=pytest.mark.kvm), "snapshot"])
def test_input_is_piped_and_ends_when_the_client_says_so(ctr: Ctr, start: str) -> None:
    """`(echo hi; sleep 2) | ctr run ... cat`, also where the start takes longer than the sleep."""
    options = ["--annotation", f"io.pymicro.start={start}"]

    done = ctr.run("sh", "-c", "cat; echo ended", options=options, stdin="hi\n")

    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\nended\n", "")


@pytest.mark.kvm
def test_a_program_that_does_not_read_its_input_ends_all_the_same(pod: Pod) -> None:
    client = Client(pod.popen("sh", "-c", "read line; echo got $line; exit 4"))
    client.send(iter([b"one\n", b"x" * MIB]))

    assert client.process.wait(seconds(30)) == 4
    client.end_input()


@pytest.mark.kvm
def test_input_that_comes_late_is_read(pod: Pod) -> None:
    client = pod.popen("cat")
    assert client.stdin
    assert client.stdout
    for number in range(3):
        client.stdin.write(b"%d\n" % number)
        client.stdin.flush()
        assert client.stdout.readline() == b"%d\n" % number
        time.sleep(0.5)
    client.stdin.close()
    assert client.wait(seconds(30)) == 0


@pytest.mark.kvm
def test_without_input_a_program_reads_its_end(pod: Pod) -> None:
    container = pod.start("sh", "-c", "cat; exit 5")

    assert container.wait() == 5


@pytest.mark.every_containerd
def test_100_mb_in_and_out_again_are_the_same(pod: Pod) -> None:
    total = 100 * MIB
    client = Client(pod.popen("cat"))
    feeder = client.send(random_pieces(total))

    client.receive(total)
    client.end_input()
    client.receive()

    feeder.join(seconds(30))
    assert client.process.wait(seconds(30)) == 0
    assert client.received_bytes == total
    assert client.received.digest() == client.sent.digest()


# -- output ------------------------------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_output_without_a_last_newline_and_of_any_bytes_is_kept(pod: Pod) -> None:
    client = pod.popen("sh", "-c", r"printf 'a\000b\r\n\377\376end'; printf '\001' >&2")

    out, err = client.communicate(timeout=seconds(60))

    assert (out, err) == (b"a\0b\r\n\xff\xfeend", b"\x01")


PIECE = random.Random(SEED).randbytes(1_000_000 - len("00000\n"))
FLAT = 2.0
"""MB by which a shim's memory may vary."""


def numbered_copies(count: int) -> bytes:
    """Return the SHA-256 of so many MB: PIECE again and again, a number after each copy."""
    whole = hashlib.sha256()
    for number in range(count):
        whole.update(PIECE + b"%05d\n" % number)
    return whole.digest()


@pytest.mark.usefixtures("only_our_runtime")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("megabytes", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_much_output_arrives_as_it_was_written_and_the_shims_memory_is_flat(
    pod: Pod, tmp_path: Path, megabytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "piece").write_bytes(PIECE)
    shim = Sandbox(pod.containerd, pod.id).find(SHIM)
    assert shim
    prints = rf"n=0; while [ $n -lt {megabytes} ]; do cat /mnt/piece; printf '%05d\n' $n; n=$((n + 1)); done"
    options = ["--mount", f"type=bind,src={tmp_path},dst=/mnt,options=rbind:ro"]
    before, begun = pss(shim), time.monotonic()

    with peak(shim) as watched:
        client = Client(pod.popen("sh", "-c", prints, options=options))
        client.receive()
        assert client.process.wait(seconds(30)) == 0

    took, after = time.monotonic() - begun, pss(shim)
    with capsys.disabled():
        figures = f"before {before:.1f}, at most {watched.pss:.1f}, after {after:.1f}"
        print(f"\n{megabytes} MB in {took:.1f} s; the shim's PSS in MB: {figures}")
    assert client.received_bytes == megabytes * 1_000_000
    assert client.received.digest() == numbered_copies(megabytes)
    assert watched.pss < before + FLAT
    assert after < before + FLAT


def test_two_full_outputs_do_not_hold_each_other_up(pod: Pod) -> None:
    script = "head -c 20000000 /dev/zero >&2 & head -c 10000000 /dev/zero; wait"
    client = pod.popen("sh", "-c", script)

    out, err = client.communicate(timeout=seconds(60))

    assert (len(out), len(err)) == (10_000_000, 20_000_000)


def test_a_slow_reader_slows_the_program_and_loses_nothing(pod: Pod) -> None:
    client = Client(pod.popen("sh", "-c", "seq 1 1000000; echo done >&2"))
    time.sleep(3)
    assert client.process.poll() is None

    client.receive()

    assert client.process.wait(seconds(30)) == 0
    assert client.received_bytes == sum(len(f"{number}\n") for number in range(1, 1_000_001))


def test_output_of_a_child_that_outlives_the_first_process_does_not_hold_up_its_end(pod: Pod) -> None:
    """PID 1's end ends its PID namespace: what the child has written by then arrives."""
    began = time.monotonic()
    done = pod.run("sh", "-c", "sleep 100000 & echo parent; exit 2")

    assert (done.returncode, done.stdout) == (2, "parent\n")
    assert time.monotonic() - began < seconds(10)


@pytest.mark.kvm
def test_output_goes_to_a_file_that_the_client_names(pod: Pod, tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("log") / "file"
    container_id = pod.new_id()
    options = ["--detach", "--log-uri", f"file://{log}"]

    pod(*pod.run_arguments(["sh", "-c", "echo out; echo err >&2; exit 3"], options, None, container_id))

    until(lambda: pod.tasks()[container_id] == "STOPPED")
    pod("tasks", "rm", container_id, check=False)
    assert sorted(log.read_text().splitlines()) == ["err", "out"]


def test_a_second_client_takes_over_from_one_that_was_killed(pod: Pod) -> None:
    container_id = pod.new_id()
    first = pod.popen("sh", "-c", "while read line; do echo got $line; done", container_id=container_id)
    assert first.stdin
    assert first.stdout
    first.stdin.write(b"one\n")
    first.stdin.flush()
    assert first.stdout.readline() == b"got one\n"
    first.kill()
    first.wait()

    second = pod.client("tasks", "attach", container_id)
    assert second.stdin
    assert second.stdout
    second.stdin.write(b"two\n")
    second.stdin.flush()
    assert second.stdout.readline() == b"got two\n"

    pod("tasks", "kill", "--signal", "SIGKILL", container_id)
    assert second.wait(30) == 137


def test_the_end_of_a_program_does_not_wait_long_for_a_client_that_reads_nothing(pod: Pod) -> None:
    """`timeouts.drain` for its exit, and Delete gives up after ten seconds."""
    container_id = pod.new_id()
    client = pod.popen("sh", "-c", "exec 2>&-; yes", container_id=container_id)
    until(lambda: pod.tasks().get(container_id) == "RUNNING")
    client.send_signal(signal.SIGSTOP)

    begun = time.monotonic()
    pod("tasks", "kill", "--signal", "SIGKILL", container_id)
    until(lambda: pod.tasks()[container_id] == "STOPPED")
    assert time.monotonic() - begun < 10

    pod("tasks", "rm", container_id)
    assert time.monotonic() - begun < 25
    client.send_signal(signal.SIGCONT)


@pytest.mark.usefixtures("only_our_runtime")
def test_a_fifo_that_nobody_opens_is_the_error_of_that_process_alone(ctr: Ctr, tmp_path: Path) -> None:
    """The limit is `timeouts.request`; what the attempt took is free again."""
    ctr.containerd.write_settings(timeouts={"request": seconds(3)})
    try:
        container = ctr.start("sleep", "100000")
    finally:
        ctr.containerd.write_settings()
    shim = Sandbox(ctr.containerd, container.id).find(SHIM)
    assert shim
    assert container.exec("true").returncode == 0
    files = open_files(shim)
    fifo, task = tmp_path / "stdout", TaskService.of(container)
    os.mkfifo(fifo)

    with pytest.raises(StatusError, match=f"nobody opened the FIFO '{fifo}' for reading in"):
        task.exec("unheard", "echo", "hello", stdout=str(fifo))

    assert "unheard" not in ctr("tasks", "ps", container.id).stdout
    task.delete("unheard")
    until(lambda: open_files(shim) == files)
    assert container.exec("echo", "well").stdout == "well\n"


# -- output just before the end ----------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
@pytest.mark.parametrize("runs", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_runs_of_a_program_that_prints_and_exits_lose_nothing(pod: Pod, runs: int) -> None:
    outcomes = same_outcome(lambda _: pod.run(*PRINT_64_KIB), times=runs, at_once=3)

    assert outcomes == {"everything": runs}


def test_50_execs_of_a_program_that_prints_and_exits_lose_nothing(pod: Pod) -> None:
    container = pod.start("sleep", "100000")

    outcomes = same_outcome(lambda _: container.exec(*PRINT_64_KIB), times=50, at_once=3)

    assert outcomes == {"everything": 50}


def test_10_runs_in_their_own_vms_lose_nothing(ctr: Ctr) -> None:
    assert same_outcome(lambda _: ctr.run(*PRINT_64_KIB), times=10, at_once=2) == {"everything": 10}


@pytest.mark.kvm
def test_what_was_printed_before_the_end_waits_for_a_reader_that_is_late(pod: Pod) -> None:
    """The exit must not be reported first: `ctr` reads nothing more once it knows of it, whatever the runtime."""
    client = Client(pod.popen("sh", "-c", "head -c 400000 /dev/zero; echo done >&2; exit 7"))
    assert client.process.stderr
    assert client.process.stderr.readline() == b"done\n"
    time.sleep(1)  # less than timeouts.drain

    client.receive()

    assert client.process.wait(seconds(30)) == 7
    assert client.received_bytes == 400_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_runs_in_their_own_vms_lose_nothing(ctr: Ctr) -> None:
    assert same_outcome(lambda _: ctr.run(*PRINT_64_KIB), times=200, at_once=2) == {"everything": 200}
