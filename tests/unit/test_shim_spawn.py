"""Helper programs and anchors: where they run, what is kept of their words, and that none outlives the shim."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pymicro.shim import anchor, helper, netns
from pymicro.shim.errors import HostMissing, InvalidRequest, ShimError, Unsupported
from pymicro.shim.helper import KEPT_LINES, Helper, LogTail, watched
from pymicro.shim.spawn import LONGEST_LINE, Place, spawn

from tests.framework.fakes import asynchronous, descriptors, needs_root, no_descriptor_leaks, turns, until


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def shell(script: str, place: Place) -> Helper:
    return Helper(spawn("helper", ["/bin/sh", "-c", script], place))


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@asynchronous
async def test_exit_status_for_any_number_of_waiters(place: Place) -> None:
    process = shell("exit 3", place)
    assert list(await asyncio.gather(process.wait(), process.wait())) == [3, 3]
    assert await process.wait() == 3
    assert not process.running
    assert repr(process).endswith("3>")


@asynchronous
async def test_cancelling_who_waits_leaves_the_process(place: Place) -> None:
    process = shell("exec sleep 60", place)
    waiting = asyncio.create_task(process.wait())
    await turns()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert process.running
    await process.kill()
    await process.kill()
    assert await process.wait() == -signal.SIGKILL
    process.send_signal(signal.SIGTERM)  # to nobody: the pid may be another's by now


@asynchronous
async def test_words_of_both_outputs_are_kept(place: Place) -> None:
    process = shell("echo to stdout; echo to stderr >&2; printf unfinished", place)
    await process.wait()
    assert process.logs[0].lines == ["to stdout", "unfinished"]
    assert process.logs[1].lines == ["to stderr"]
    assert process.last_lines == ["to stdout", "unfinished", "to stderr"]


@asynchronous
async def test_chatty_helper_fills_neither_memory_nor_its_pipe(place: Place) -> None:
    process = shell("i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; head -c 3000000 /dev/zero", place)
    await asyncio.wait_for(process.wait(), 8)
    lines = process.logs[0].lines
    assert len(lines) <= KEPT_LINES + 1
    assert all(len(line) <= LONGEST_LINE for line in lines)
    assert "line 4999" in lines


def tail_of(*pieces: bytes) -> list[str]:
    """Return the lines that are kept when `pieces` arrive one by one, and the last ones just before the end."""

    async def read() -> list[str]:
        source, sink = os.pipe()
        tail = LogTail("test", source)
        for piece in pieces[:-1]:
            os.write(sink, piece)
            await asyncio.sleep(0.002)
        os.write(sink, pieces[-1])
        os.close(sink)
        tail.close()
        tail.close()
        return tail.lines

    return asyncio.run(read())


def test_lines_that_come_in_pieces() -> None:
    assert tail_of(b"one\ntw", b"o\nthr", b"ee\n") == ["one", "two", "three"]


def test_line_that_is_finished_by_the_last_read() -> None:
    assert tail_of(b"Kernel pan", b"ic - not syncing\nend") == ["Kernel panic - not syncing", "end"]


def test_what_could_control_a_terminal_is_taken_out() -> None:
    assert tail_of(b"\x1b[31mred\x07\r\n\xff\xfe\n\n") == ["[31mred", "\ufffd\ufffd"]


@asynchronous
async def test_missing_program_is_named_and_leaves_nothing(place: Place) -> None:
    with (
        no_descriptor_leaks(),
        pytest.raises(HostMissing, match=r"cannot start qemu as '/no/such/qemu'.*pymicroctl check"),
    ):
        spawn("qemu", ["/no/such/qemu"], place).check()


@asynchronous
async def test_place_that_cannot_be_entered(tmp_path: Path) -> None:
    with no_descriptor_leaks(), pytest.raises(HostMissing, match="cannot start helper"):
        shell("true", Place(tmp_path, cgroups=(str(tmp_path / "no-such-cgroup"),)))


@asynchronous
async def test_only_what_is_passed_is_inherited(place: Place) -> None:
    stray, passed, *others = (fd for _ in range(2) for fd in os.pipe())
    os.set_inheritable(stray, True)  # as a library may leave it
    process = Helper(spawn("helper", ["/bin/ls", "/proc/self/fd"], place, (passed,)))
    await process.wait()
    assert {int(line) for line in process.logs[0].lines} == {0, 1, 2, passed, 3}, "3 is the listing's own"
    for fd in (stray, passed, *others):
        os.close(fd)


@pytest.mark.parametrize(("huge_pages", "enabled"), [(True, "1"), (False, "0")])
@asynchronous
async def test_huge_pages_are_for_those_who_gain_by_them(place: Place, *, huge_pages: bool, enabled: str) -> None:
    process = Helper(spawn("helper", ["/bin/cat", "/proc/self/status"], place, huge_pages=huge_pages))
    await process.wait()
    assert f"THP_enabled: {enabled}" in [" ".join(line.split()) for line in process.logs[0].lines]


def test_helpers_die_with_the_shim(tmp_path: Path) -> None:
    program = f"""
        import os, signal
        from pathlib import Path
        from pymicro.shim.spawn import Place, spawn

        print(spawn("helper", ["/bin/sleep", "60"], Place(Path({str(tmp_path)!r}))).pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    shim = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert shim.returncode == -signal.SIGKILL, shim.stderr
    deadline = time.monotonic() + 5
    while alive(int(shim.stdout)):
        assert time.monotonic() < deadline, "the helper outlives the shim"
        time.sleep(0.01)


@asynchronous
async def test_helper_that_nobody_watches_is_ended_too(place: Place) -> None:
    child = spawn("helper", ["/bin/sleep", "60"], place)
    child.end()
    child.end()
    assert not alive(child.pid)


@asynchronous
async def test_watched_helper_ends_with_its_watch(place: Place) -> None:
    child = spawn("helper", ["/bin/sh", "-c", "echo early; exec sleep 60"], place)
    async with watched(child) as helper:
        assert await helper.logs[0].says("early"), "what it said before anybody watched"
        child.end()  # it is not the child's any more
        assert helper.running
    assert not alive(child.pid)


@asynchronous
async def test_a_helper_that_sigkill_does_not_end_is_left_and_named(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As virtiofsd while it waits for a disk: who waits for the end of the watch reports the pod's exits."""
    monkeypatch.setattr(helper, "DEATH_LIMIT", 0.05)
    child = spawn("virtiofsd", ["/bin/sleep", "60"], place)
    with monkeypatch.context() as patch:
        patch.setattr(Helper, "send_signal", lambda *_: None)
        async with asyncio.timeout(2), watched(child) as process:
            pass
    assert process.running
    assert caplog.messages == [f"virtiofsd (pid {child.pid}) lives on 0.05 s after SIGKILL; it is left"]
    await process.kill()
    assert await process.wait() == -signal.SIGKILL, "it is reaped when it ends after all"


# --- network namespaces


def test_netns_that_does_not_exist(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidRequest, match="cannot open the network namespace"),
        netns.pod_netns(str(tmp_path / "no")),
    ):
        pass


@needs_root
def test_netns_of_the_host_is_refused() -> None:
    with pytest.raises(Unsupported, match="host's network namespace"), netns.pod_netns(f"/proc/{os.getpid()}/ns/net"):
        pass


def test_new_netns_is_not_ours_and_ours_is_kept() -> None:
    own = os.readlink("/proc/self/ns/net")
    with netns.pod_netns("") as fd:
        assert os.readlink(f"/proc/self/fd/{fd}") != own
        assert os.readlink("/proc/self/ns/net") == own


@needs_root
def test_named_netns_is_taken() -> None:
    with netns.pod_netns("") as named, netns.pod_netns(f"/proc/self/fd/{named}") as fd:
        assert fd != named
        assert os.readlink(f"/proc/self/fd/{fd}") == os.readlink(f"/proc/self/fd/{named}")


@needs_root
@asynchronous
async def test_helper_runs_in_the_pods_netns(tmp_path: Path) -> None:
    with netns.pod_netns("") as fd:
        process = Helper(spawn("helper", ["/bin/readlink", "/proc/self/ns/net"], Place(tmp_path, netns_fd=fd)))
        await process.wait()
        assert process.logs[0].lines == [os.readlink(f"/proc/self/fd/{fd}")]


# --- anchors


class Deaths:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@needs_root
@asynchronous
async def test_anchor_is_what_clients_look_for(tmp_path: Path) -> None:
    """In the pod's network namespace, rooted in the container's root, named, holding nothing open."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hostname").write_text("c1")
    with netns.pod_netns("") as fd:
        one = anchor.start(str(tmp_path), Place(tmp_path, netns_fd=fd), Deaths())
        await until(lambda: not os.listdir(f"/proc/{one.pid}/fd"))
        assert os.readlink(f"/proc/{one.pid}/ns/net") == os.readlink(f"/proc/self/fd/{fd}")
        assert Path(f"/proc/{one.pid}/root/etc/hostname").read_text() == "c1"
        assert Path(f"/proc/{one.pid}/comm").read_text().strip() == anchor.NAME
        assert repr(one) == f"<Anchor {one.pid} running>"
        one.end()


@needs_root
@asynchronous
async def test_anchor_that_is_ended_is_gone_at_once(tmp_path: Path) -> None:
    deaths = Deaths()
    one = anchor.start(str(tmp_path), Place(tmp_path), deaths)
    one.end()
    assert not Path(f"/proc/{one.pid}").exists(), "Wait returns now: the pid must not be seen any more"
    one.end()
    await turns()
    assert deaths.count == 0, "that was us"


@needs_root
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@asynchronous
async def test_anchor_that_somebody_kills(tmp_path: Path, number: signal.Signals) -> None:
    deaths = Deaths()
    one = anchor.start(str(tmp_path), Place(tmp_path), deaths)
    os.kill(one.pid, number)
    await until(lambda: deaths.count)
    assert not Path(f"/proc/{one.pid}").exists(), "a zombie is left"
    one.end()
    assert deaths.count == 1
    assert repr(one).endswith("ended>")


@needs_root
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (str(path / "missing"), Place(path)),
        lambda path: (str(path), Place(path, cgroups=(str(path / "no-such-cgroup"),))),
        lambda path: (str(path), Place(path, netns_fd=0)),
    ],
    ids=["root", "cgroup", "netns"],
)
@asynchronous
async def test_anchor_that_cannot_enter_its_place(tmp_path: Path, spoil: Callable[[Path], tuple[str, Place]]) -> None:
    before = len(descriptors())
    with pytest.raises(ShimError, match=r"anchor process could not start: .+"):
        anchor.start(*spoil(tmp_path), Deaths())
    assert len(descriptors()) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # noqa: ASYNC222  # does not block, and must find no child


@needs_root
def test_anchors_die_with_the_shim(tmp_path: Path) -> None:
    program = f"""
        import asyncio, os, signal
        from pathlib import Path
        from pymicro.shim import anchor
        from pymicro.shim.spawn import Place

        async def shim():
            print(anchor.start({str(tmp_path)!r}, Place(Path({str(tmp_path)!r})), lambda: None).pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(shim())
    """
    shim = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert shim.returncode == -signal.SIGKILL, shim.stderr
    deadline = time.monotonic() + 5
    while alive(int(shim.stdout)):
        assert time.monotonic() < deadline, "the anchor outlives the shim"
        time.sleep(0.01)
