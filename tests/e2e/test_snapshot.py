"""A clone is not its template: what a VM that goes on from a saved one shares with it, and what is its own."""

import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.framework.ctr import Completed, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.shimlog import ShimLog
from tests.framework.waiting import seconds

pytestmark = pytest.mark.usefixtures("only_our_runtime", "from_snapshots")

MIB = 1 << 20
CLOCK_ERROR = 0.1
"""Seconds by which a container's clock may differ from the host's."""
OWN_BOOT = ["--annotation", "io.pymicro.start=boot"]


@pytest.fixture
def from_snapshots(ctr: Ctr) -> Iterator[None]:
    """Have VMs start from templates, whatever the rest of the run does."""
    ctr.containerd.write_settings(vm={"start": "snapshot"})
    yield
    ctr.containerd.write_settings()


def run_at_once(ctr: Ctr, ids: Sequence[str], *command: str, options: Sequence[str] = ()) -> list[Completed]:
    """Run the command in a pod of its own for each id, all at the same time; each must succeed."""
    with ThreadPoolExecutor(len(ids)) as pool:
        runs = list(pool.map(lambda each: ctr.run(*command, options=options, container_id=each), ids))
    assert [(done.returncode, done.stderr) for done in runs] == [(0, "")] * len(ids)
    return runs


# -- randomness and names ----------------------------------------------------------------------------------------------

UUID = "/proc/sys/kernel/random/uuid"
MANY = f"cat $(yes {UUID} | head -n 100)"
"""Prints 100 numbers that one process draws in a row. Two generators in the same state show it even if one is ahead."""
RANDOM = rf"""
cat {UUID} /proc/sys/kernel/random/boot_id
head -c 32 /dev/urandom | xxd -p -c 32
dd if=/dev/random bs=32 count=1 2>/dev/null | xxd -p -c 32
sed -n 's/-.*\[stack\]$//p' /proc/self/maps
{MANY}
"""
"""The first reads, the boot's name, where a new process has its stack, and many reads more."""


def test_clones_draw_different_random_numbers_from_the_first_read_on(ctr: Ctr) -> None:
    log, ids = ShimLog(ctr.containerd), [ctr.new_id() for _ in range(3)]
    assert ctr.run("true").returncode == 0  # there is a template now

    runs = run_at_once(ctr, ids, "sh", "-c", RANDOM)

    drawn = [line for done in runs for line in done.stdout.splitlines()]
    assert len(drawn) == 105 * len(ids)
    assert len(set(drawn)) == len(drawn)
    assert log.cold(ids) == []


def test_each_clone_has_the_name_of_its_own_pod(ctr: Ctr) -> None:
    ids = [ctr.new_id("one"), ctr.new_id("other")]

    assert [done.stdout.strip() for done in run_at_once(ctr, ids, "uname", "-n")] == ids


# -- the clock ---------------------------------------------------------------------------------------------------------

TELL_TIME = "while read line; do adjtimex; done"
"""Answers each line with what the kernel knows of its wall clock."""
LAST_LINE = "return value:"


def clock_errors(client: "subprocess.Popen[bytes]", questions: int) -> Iterator[float]:
    """Ask a container that runs TELL_TIME; yield each time by how many seconds its clock is off at least.

    What it answers was read after the question was sent and before the answer came: outside these bounds it is wrong,
    within them nobody can tell.
    """
    assert client.stdin
    assert client.stdout
    for _ in range(questions):
        asked = time.time()
        client.stdin.write(b"?\n")
        client.stdin.flush()
        answer = "".join(iter(lambda: read_line(client), ""))
        answered = time.time()
        (seconds,), (microseconds,) = (re.findall(rf"time\.tv_{unit}: *(\d+)", answer) for unit in ("sec", "usec"))
        told = int(seconds) + int(microseconds) / 1e6
        yield max(asked - told, told - answered, 0.0)


def read_line(client: "subprocess.Popen[bytes]") -> str:
    """Return the next line of the answer, an empty one for its last."""
    assert client.stdout
    line = client.stdout.readline().decode()
    return "" if LAST_LINE in line else line


@pytest.mark.parametrize("age", [0, pytest.param(5, marks=pytest.mark.kvm)])
def test_a_clones_clock_is_right_however_old_its_template_is(ctr: Ctr, templates: Path, age: float) -> None:
    if age:
        assert ctr.run("true").returncode == 0  # this one makes the template
        time.sleep(age)
    log, container_id = ShimLog(ctr.containerd), ctr.new_id()

    client = ctr.popen("sh", "-c", TELL_TIME, container_id=container_id)
    errors = list(clock_errors(client, questions=5))

    client.communicate(timeout=seconds(30))
    assert client.returncode == 0
    assert max(errors) < CLOCK_ERROR
    assert log.cold([container_id]) == []
    assert list(templates.glob("*/"))


# -- sizes -------------------------------------------------------------------------------------------------------------

WISHES = {
    "no wish": ([], 1, 256),
    "limits": (["--memory-limit", str(320 * MIB), "--cpus", "1.5"], 2, 448),
    "annotations": (
        ["--annotation", "io.pymicro.memory_mib=192", "--annotation", "io.pymicro.vcpus=2"], 2, 192,
    ),
}  # fmt: skip
"""Options, and the CPUs and MiB that they give: the limit, and 128 MiB for kernel and agent."""
KERNELS_SHARE_MIB = 60
"""What a guest's MemTotal lacks at most; less than the distance between the sizes above."""


def test_a_pod_has_the_size_it_wants_whether_there_is_a_template_of_it_or_not(ctr: Ctr, templates: Path) -> None:
    def size(options: list[str]) -> tuple[str, tuple[int, int]]:
        container_id = ctr.new_id()
        done = ctr.run("sh", "-c", "nproc; grep MemTotal /proc/meminfo", options=options, container_id=container_id)
        cpus, _, kib, _ = done.stdout.split()
        return container_id, (int(cpus), int(kib) >> 10)

    for _ in ("each makes its template", "each goes on from it"):
        log = ShimLog(ctr.containerd)
        with ThreadPoolExecutor(len(WISHES)) as pool:
            sizes = list(pool.map(lambda wish: size(wish[0]), WISHES.values()))

        assert log.cold(container_id for container_id, _ in sizes) == []
        assert len(list(templates.glob("*/"))) == len(WISHES)
        for (_, cpus, mib), (_, (has_cpus, has_mib)) in zip(WISHES.values(), sizes, strict=True):
            assert has_cpus == min(cpus, len(os.sched_getaffinity(0)))
            assert mib - KERNELS_SHARE_MIB < has_mib < mib


# -- a boot of one's own -----------------------------------------------------------------------------------------------

KERNEL_LOG = ("sh", "-c", "dmesg | head -n 40")
READ_IT = ["--cap-add", "CAP_SYSLOG"]


def test_clones_remember_the_same_boot(ctr: Ctr) -> None:
    ids = [ctr.new_id(), ctr.new_id()]

    one, other = run_at_once(ctr, ids, *KERNEL_LOG, options=READ_IT)

    assert len(one.stdout.splitlines()) == 40
    assert one.stdout == other.stdout, "the microseconds of each message are the template's"


def test_an_annotation_gives_a_pod_a_boot_of_its_own(ctr: Ctr) -> None:
    log, ids = ShimLog(ctr.containerd), [ctr.new_id(), ctr.new_id()]

    one, other = run_at_once(ctr, ids, *KERNEL_LOG, options=[*READ_IT, *OWN_BOOT])

    assert log.cold(ids) == ids
    assert len(one.stdout.splitlines()) == 40
    assert one.stdout != other.stdout


# -- many at once ------------------------------------------------------------------------------------------------------


def test_20_pods_started_at_once_all_succeed_and_none_waits_long(ctr: Ctr, leftovers: Leftovers) -> None:
    assert ctr.run("true").returncode == 0  # there is a template now
    log, ids = ShimLog(ctr.containerd), [ctr.new_id() for _ in range(20)]

    def run(container_id: str) -> tuple[Completed, float]:
        begun = time.monotonic()
        return ctr.run("true", container_id=container_id), time.monotonic() - begun

    with ThreadPoolExecutor(len(ids)) as pool:
        runs = list(pool.map(run, ids))

    assert [(done.returncode, done.stderr) for done, _ in runs] == [(0, "")] * len(ids)
    seconds = sorted(round(each, 1) for _, each in runs)
    assert seconds[-1] <= 2 * statistics.median(seconds), f"the 99th percentile of 20 is the slowest: {seconds}"
    assert log.cold(ids) == []
    assert log.warnings() == []
    leftovers.check()


IDENTITY = f"head -c 32 /dev/urandom | xxd -p -c 32; {MANY}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_two_of_many_clones_are_alike(ctr: Ctr, leftovers: Leftovers, request: pytest.FixtureRequest) -> None:
    """1,000 clones unless `--clones` says otherwise. Also no eight bytes of one are any eight bytes of another."""
    clones = request.config.getoption("--clones")
    assert ctr.run("true").returncode == 0  # there is a template now
    log, ids = ShimLog(ctr.containerd), [ctr.new_id() for _ in range(clones)]

    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda each: ctr.run("sh", "-c", IDENTITY, container_id=each), ids))

    assert {(done.returncode, done.stderr) for done in runs} == {(0, "")}
    drawn = [done.stdout.split() for done in runs]
    assert {(len(first), len(uuids)) for first, *uuids in drawn} == {(64, 100)}
    assert len({first[at : at + 16] for first, *_ in drawn for at in range(0, 64, 16)}) == 4 * clones
    assert len({uuid for _, *uuids in drawn for uuid in uuids}) == 100 * clones
    assert log.cold(ids) == []
    leftovers.check()
