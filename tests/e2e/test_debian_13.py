"""The VMM and virtiofsd of the other Debian: QEMU 10 and the Rust virtiofsd of Debian 13."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.ctr import Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.sandbox import Sandbox, eventually
from tests.framework.shimlog import ShimLog
from tests.framework.tools import tool

SLEEP = ("sleep", "100000")


@pytest.fixture(autouse=True)
def programs(ctr: Ctr, only_our_runtime: None, only_qemu: None) -> Iterator[Path]:
    """Have pods run with Debian 13's programs, and yield where these are."""
    directory = tool("vmm-trixie")
    paths = {"qemu": directory / "qemu-system-x86_64", "virtiofsd": directory / "virtiofsd"}
    ctr.containerd.write_settings(paths={key: str(path) for key, path in paths.items()})
    yield directory
    ctr.containerd.write_settings()


@pytest.mark.kvm
def test_a_pod_goes_on_from_a_template_of_this_qemu_and_loses_no_output(ctr: Ctr, leftovers: Leftovers) -> None:
    log, container_id = ShimLog(ctr.containerd), ctr.new_id()

    done = ctr.run(
        "sh", "-c", "seq 1 10000; exit 7",
        options=["--annotation", "io.pymicro.start=snapshot"], container_id=container_id,
    )  # fmt: skip

    everything = "".join(f"{number}\n" for number in range(1, 10001))
    assert (done.returncode, done.stdout, done.stderr) == (7, everything, "")
    assert log.cold([container_id]) == []
    assert log.warnings() == []
    leftovers.check()


def test_programs_that_come_and_go_are_never_mixed_up(ctr: Ctr, leftovers: Leftovers) -> None:
    """The guest's memory is written by virtiofsd as well: code of a page's former program must not be run."""
    each = "cp /bin/busybox /busybox$n; /busybox$n sha256sum /busybox$n | /busybox$n cut -c1-64; rm /busybox$n"

    done = ctr.run("sh", "-c", f"for n in $(seq 40); do {each}; done | sort | uniq -c | wc -l")

    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    leftovers.check()


def test_a_pod_boots_its_own_kernel_and_shares_a_directory(ctr: Ctr, leftovers: Leftovers, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("from outside\n")
    options = ["--mount", f"type=bind,src={tmp_path},dst=/mnt,options=rbind:rw"]
    log, container_id = ShimLog(ctr.containerd), ctr.new_id()

    done = ctr.run(
        "sh", "-c", "cat /mnt/outside; echo from inside >/mnt/inside",
        options=[*options, "--annotation", "io.pymicro.start=boot"], container_id=container_id,
    )  # fmt: skip

    assert (done.returncode, done.stdout, done.stderr) == (0, "from outside\n", "")
    assert (tmp_path / "inside").read_text() == "from inside\n"
    assert log.cold([container_id]) == [container_id]
    leftovers.check()


def test_a_qemu_that_is_killed_ends_the_container(ctr: Ctr, leftovers: Leftovers, programs: Path) -> None:
    container = ctr.start(*SLEEP)
    assert container.exec("cat", stdin="input").stdout == "input"
    sandbox = Sandbox(ctr.containerd, container.id)
    for kind in ("qemu", "virtiofsd"):
        pid = sandbox.find(kind)
        assert str(programs.parent) in Path(f"/proc/{pid}/cmdline").read_text()

    sandbox.kill("qemu")

    eventually(lambda: container.status == "STOPPED", "the task is STOPPED", 2)
    assert container.wait() == 137
    container.remove()
    leftovers.check()
