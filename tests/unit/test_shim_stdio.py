"""Stdio relays: every byte arrives, ends are known by their count, nothing stays open."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pymicro.shim.channel import memory
from pymicro.shim.destination import open_output
from pymicro.shim.errors import InvalidRequest, StepTimeout, Unsupported
from pymicro.shim.input import Input
from pymicro.shim.logbinary import LogOwner
from pymicro.shim.requests import StdioPaths
from pymicro.shim.state import Record
from pymicro.shim.stdio import Stdio

from tests.framework.fakes import Fifo, asynchronous, no_descriptor_leaks, turns, until

SOON = 0.05


async def opened(paths: StdioPaths, limit: float) -> Stdio:
    """Return the streams of a process that no log binary serves."""
    return await Stdio.open(paths, limit, LogOwner("c1", "ns", Record("/nowhere")))


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "fifo")
    yield fifo
    fifo.close()


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * (1 << 20) + 17])
@asynchronous
async def test_output_arrives_byte_for_byte_and_ends(fifo: Fifo, size: int) -> None:
    data = os.urandom(size)
    fifo.open_reader()
    output = await open_output(fifo.path, 1)
    assert output
    guest, host = memory.pair()
    output.start(host)
    reading = asyncio.create_task(fifo.read_to_end())
    await guest.write(data)
    output.end_at(size)
    assert await reading == data
    await output.closed()
    assert await asyncio.get_running_loop().sock_recv(guest.socket, 1) == b"", "the guest's stream stays open"
    guest.close()
    output.close()


@asynchronous
async def test_end_known_before_the_bytes_come(fifo: Fifo) -> None:
    fifo.open_reader()
    output = await open_output(fifo.path, 1)
    assert output
    guest, host = memory.pair()
    output.end_at(5)
    output.start(host)
    await guest.write(b"hel")
    await turns()
    await guest.write(b"lo")
    assert await fifo.read_to_end() == b"hello"
    guest.close()
    output.close()


@asynchronous
async def test_end_before_the_stream_is_open(fifo: Fifo) -> None:
    """A process without output may be over before its stream's connection is taken."""
    fifo.open_reader()
    output = await open_output(fifo.path, 1)
    assert output
    output.end_at(0)
    assert await fifo.read_to_end() == b""
    guest, host = memory.pair()
    output.start(host)
    assert host.fileno() == -1, "a stream that comes too late is closed"
    guest.close()
    output.close()


@asynchronous
async def test_end_of_nothing_in_the_turn_of_the_start(fifo: Fifo) -> None:
    """The relay's task is cancelled before its first step, and must free everything all the same."""
    fifo.open_reader()
    output = await open_output(fifo.path, 1)
    assert output
    guest, host = memory.pair()
    output.start(host)
    output.end_at(0)
    await asyncio.wait_for(output.closed(), 1)
    assert await fifo.read_to_end() == b""
    guest.close()
    output.close()


@asynchronous
async def test_guest_that_dies_without_saying_its_count(fifo: Fifo) -> None:
    fifo.open_reader()
    output = await open_output(fifo.path, 1)
    assert output
    guest, host = memory.pair()
    output.start(host)
    await guest.write(b"last words")
    guest.close()
    assert await fifo.read_to_end() == b"last words"
    output.close()


@asynchronous
async def test_slow_reader_slows_the_writer_down(fifo: Fifo) -> None:
    fifo.open_reader()
    output = await open_output(fifo.path, 1)
    assert output
    guest, host = memory.pair()
    output.start(host)
    data = os.urandom(1 << 20) * 24
    writing = asyncio.create_task(guest.write(data))
    await asyncio.sleep(SOON)
    assert not writing.done(), "nothing holds the writer back: somebody buffers without limit"
    assert output.relayed < len(data) / 2
    received = await fifo.read(len(data))
    await writing
    output.end_at(len(data))
    assert received == data
    guest.close()
    await output.closed()
    output.close()


@asynchronous
async def test_client_that_goes_away_and_comes_back(fifo: Fifo) -> None:
    """Containerd may be restarted at any time: the process must not notice, and no byte is lost."""
    fifo.open_reader()
    output = await open_output(fifo.path, 1)
    assert output
    guest, host = memory.pair()
    output.start(host)
    await guest.write(b"before ")
    assert await fifo.read(7) == b"before "
    fifo.close()
    await guest.write(b"meanwhile ")
    await until(lambda: output.relayed == 17)
    fifo.open_reader()
    await guest.write(b"after")
    output.end_at(22)
    assert await fifo.read_to_end() == b"meanwhile after"
    guest.close()
    output.close()


@asynchronous
async def test_nobody_opens_the_fifo(fifo: Fifo) -> None:
    with pytest.raises(StepTimeout, match=r"nobody opened the FIFO '.*/fifo' for reading in 0\.02 s"):
        await open_output(fifo.path, 0.02)


@asynchronous
async def test_reader_that_opens_late(fifo: Fifo) -> None:
    opening = asyncio.create_task(open_output(fifo.path, 5))
    await asyncio.sleep(SOON)
    assert not opening.done()
    fifo.open_reader()
    output = await opening
    assert output
    output.close()


@asynchronous
async def test_second_output_fails_and_the_first_is_closed(tmp_path: Path, fifo: Fifo) -> None:
    fifo.open_reader()
    with pytest.raises(InvalidRequest, match="missing"):
        await opened(StdioPaths("", fifo.path, str(tmp_path / "missing"), terminal=False), 1)


@asynchronous
async def test_cancelled_while_waiting_for_a_reader(tmp_path: Path) -> None:
    stdin, stdout = Fifo(tmp_path / "in"), Fifo(tmp_path / "out")
    opening = asyncio.create_task(opened(StdioPaths(stdin.path, stdout.path, "", terminal=False), 5))
    await asyncio.sleep(SOON)
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()


@asynchronous
async def test_fifo_that_vanishes_between_the_two_opens(fifo: Fifo, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo.open_reader()
    real = os.open

    def vanishing(path: str, flags: int, mode: int = 0o777) -> int:
        fd = real(path, flags, mode)
        Path(path).unlink()
        return fd

    monkeypatch.setattr(os, "open", vanishing)
    with pytest.raises(InvalidRequest, match="No such file"):
        await open_output(fifo.path, 1)


def test_stdin_that_is_no_fifo(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot open the input"):
        Input(str(tmp_path)).open()
    with pytest.raises(InvalidRequest, match="there is no FIFO"):
        Input(str(tmp_path / "missing"))


@asynchronous
async def test_no_paths_mean_no_streams() -> None:
    stdio = await opened(StdioPaths("", "", "", terminal=False), 1)
    assert (stdio.stdin, stdio.stdout, stdio.stderr) == (None, None, None)
    await stdio.drain(10, 10, 1)
    await stdio.closed(1)
    stdio.close()


@asynchronous
async def test_terminal_has_no_stderr(tmp_path: Path, fifo: Fifo) -> None:
    """With a terminal containerd's clients create no reader for stderr: waiting for it would hang the start."""
    fifo.open_reader()
    unread = Fifo(tmp_path / "stderr")
    stdio = await opened(StdioPaths("", fifo.path, unread.path, terminal=True), 0.1)
    assert stdio.stderr is None
    stdio.close()


@asynchronous
async def test_file_uri_appends_for_both_streams(tmp_path: Path) -> None:
    log = tmp_path / "new directory" / "log"
    log.parent.mkdir()
    log.write_text("old ")
    uri = f"file://{tmp_path}/new%20directory/log"
    stdio = await opened(StdioPaths("", uri, uri, terminal=False), 1)
    assert stdio.stdout
    assert stdio.stderr
    for output, text in ((stdio.stdout, b"out "), (stdio.stderr, b"err")):
        guest, host = memory.pair()
        output.start(host)
        await guest.write(text)
        output.end_at(len(text))
        await output.closed()
        guest.close()
    assert log.read_text() == "old out err"


@asynchronous
async def test_file_uri_creates_its_directories(tmp_path: Path) -> None:
    output = await open_output(f"file://{tmp_path}/a/b/log", 1)
    assert output
    output.close()
    assert (tmp_path / "a/b/log").read_bytes() == b""


@pytest.mark.parametrize("uri", ["ttrpc+unix:///x?streaming_id=1", "http://x/"])
@asynchronous
async def test_other_uris_are_refused_by_name(uri: str) -> None:
    with pytest.raises(Unsupported, match=uri.split(":", maxsplit=1)[0].replace("+", r"\+")):
        await open_output(uri, 1)


@asynchronous
async def test_a_full_disk_costs_the_output_and_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    output = await open_output("file:///dev/full", 1)
    assert output
    guest, host = memory.pair()
    output.start(host)
    await asyncio.wait_for(guest.write(bytes(4 << 20)), 3)
    output.end_at(4 << 20)
    await asyncio.wait_for(output.closed(), 3)
    assert output.relayed == 4 << 20
    assert caplog.text.count("nobody takes it any more: No space left on device") == 1
    guest.close()


@asynchronous
async def test_a_log_file_that_is_a_fifo_does_not_hold_up_the_shim(tmp_path: Path) -> None:
    nobody = Fifo(tmp_path / "out")
    with pytest.raises(InvalidRequest, match="/out"):
        await open_output(f"file://{nobody.path}", 0.1)
    nobody.open_reader()
    output = await open_output(f"file://{nobody.path}", 1)
    assert output
    guest, host = memory.pair()
    output.start(host)
    writing = asyncio.create_task(guest.write(bytes(4 << 20)))
    await asyncio.wait_for(asyncio.sleep(0.05), 0.5)
    assert not writing.done()
    assert len(await nobody.read(3 << 20)) == 3 << 20
    writing.cancel()
    await asyncio.wait([writing])
    guest.close()
    output.close()
    await output.closed()
    nobody.close()


@asynchronous
async def test_large_output_to_a_file(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    output = await open_output(f"file://{tmp_path}/log", 1)
    assert output
    guest, host = memory.pair()
    output.start(host)
    await guest.write(data)
    output.end_at(len(data))
    await output.closed()
    assert (tmp_path / "log").read_bytes() == data
    guest.close()


@asynchronous
async def test_drain_returns_once_the_bytes_are_with_the_client(fifo: Fifo) -> None:
    """A background child may hold the stream open for ever; the exit is reported when the counted bytes are out."""
    fifo.open_reader()
    stdio = await opened(StdioPaths("", fifo.path, "", terminal=False), 1)
    assert stdio.stdout
    guest, host = memory.pair()
    stdio.stdout.start(host)
    draining = asyncio.create_task(stdio.drain(5, 0, 5))
    await turns()
    assert not draining.done()
    await guest.write(b"12345")
    await asyncio.sleep(SOON)
    assert not draining.done()  # the client has not read yet, and will not when it hears of the exit
    assert await fifo.read(5) == b"12345"
    await asyncio.wait_for(draining, 1)
    stdio.close()
    await stdio.closed(1)
    guest.close()


@pytest.mark.parametrize("ended", [True, False])
@asynchronous
async def test_drain_does_not_wait_for_a_client_that_has_gone(fifo: Fifo, ended: bool) -> None:
    fifo.open_reader()
    stdio = await opened(StdioPaths("", fifo.path, "", terminal=False), 1)
    assert stdio.stdout
    guest, host = memory.pair()
    stdio.stdout.start(host)
    await guest.write(b"12345")
    if ended:
        stdio.stdout.end_at(5)
        await stdio.stdout.closed()
    draining = asyncio.create_task(stdio.drain(5, 0, 5))
    await asyncio.sleep(SOON)
    assert not draining.done()

    fifo.close()

    await asyncio.wait_for(draining, 1)
    fifo.open_reader()
    assert await fifo.read(5) == b"12345", "who comes back finds nothing"
    stdio.close()
    await stdio.closed(1)
    guest.close()


@asynchronous
async def test_drain_gives_up_after_its_limit(fifo: Fifo) -> None:
    fifo.open_reader()
    stdio = await opened(StdioPaths("", fifo.path, "", terminal=False), 1)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await stdio.drain(1, 0, 0.05)
    await stdio.closed(0.05)
    assert 0.08 < loop.time() - begun < 2
    stdio.close()


@pytest.mark.parametrize("moment", ["before", "at once", "waiting", "blocked"])
@asynchronous
async def test_output_closed_at_any_time(fifo: Fifo, moment: str) -> None:
    fifo.open_reader()
    output = await open_output(fifo.path, 1)
    assert output
    guest, host = memory.pair()
    if moment == "before":
        host.close()
    else:
        output.start(host)
    writing = asyncio.create_task(guest.write(bytes(4 << 20 if moment == "blocked" else 0)))
    if moment in {"waiting", "blocked"}:
        await asyncio.sleep(SOON)
    output.close()
    output.close()
    await asyncio.wait_for(output.closed(), 1)
    output.close()
    with suppress(ConnectionError):
        await writing
    guest.close()


class Ended:
    """What Input calls at the end of file."""

    def __init__(self) -> None:
        self.count: int | None = None

    def __call__(self, count: int) -> None:
        self.count = count


@asynchronous
async def test_stdin_arrives_and_ends_with_the_client(fifo: Fifo) -> None:
    data = os.urandom(3 << 20)
    stdin, ended = Input(fifo.path), Ended()
    guest, host = memory.pair()
    stdin.connect(host, ended)
    stdin.open()
    fifo.open_writer()
    stdin.close_writer()
    reading = asyncio.create_task(guest.read_exactly(len(data)))
    await fifo.write(data)
    fifo.close()
    assert await reading == data
    await until(lambda: ended.count is not None)
    assert ended.count == len(data)
    assert host.fileno() >= 0, "our side must stay open until the guest has closed its own"
    guest.close()
    await until(lambda: host.fileno() < 0)


@pytest.mark.parametrize("first", ["the guest's stream", "the client's FIFO"])
@asynchronous
async def test_stdin_needs_both_ends_in_any_order(fifo: Fifo, first: str) -> None:
    stdin, ended = Input(fifo.path), Ended()
    guest, host = memory.pair()
    if first == "the guest's stream":
        stdin.connect(host, ended)
        stdin.open()
    else:
        stdin.open()
        await turns()
        stdin.connect(host, ended)
    fifo.open_writer()
    await fifo.write(b"hello")
    assert await guest.read_exactly(5) == b"hello"
    stdin.close()
    guest.close()
    await until(lambda: host.fileno() < 0)


def test_stdin_is_not_read_before_the_process_starts(fifo: Fifo) -> None:
    """`ctr` drops an end of file that it reads before its task exists; while nobody reads the FIFO it cannot."""
    stdin = Input(fifo.path)
    with pytest.raises(OSError, match="No such device or address"):
        fifo.open_writer()
    stdin.close()


@asynchronous
async def test_stdin_closed_by_the_client_before_the_start(fifo: Fifo) -> None:
    stdin, ended = Input(fifo.path), Ended()
    guest, host = memory.pair()
    stdin.connect(host, ended)
    stdin.close_writer()
    stdin.open()
    fifo.open_writer()
    await fifo.write(b"hi")
    fifo.close()
    await until(lambda: ended.count == 2)
    guest.close()
    await until(lambda: host.fileno() < 0)


@asynchronous
async def test_stdin_that_is_to_end_before_the_start_ends_though_nobody_ever_wrote(fifo: Fifo) -> None:
    stdin, ended = Input(fifo.path), Ended()
    guest, host = memory.pair()
    stdin.connect(host, ended)
    stdin.close_writer()
    stdin.open()
    await until(lambda: ended.count == 0)
    guest.close()
    await until(lambda: host.fileno() < 0)


@asynchronous
async def test_stdin_opened_again_for_a_second_start(fifo: Fifo) -> None:
    stdin = Input(fifo.path)
    stdin.open()
    stdin.open()
    stdin.close()


@asynchronous
async def test_stdin_outlives_a_client_that_has_not_said_close_io(fifo: Fifo) -> None:
    stdin, ended = Input(fifo.path), Ended()
    guest, host = memory.pair()
    stdin.connect(host, ended)
    stdin.open()
    for word in (b"one", b"two"):
        fifo.open_writer()
        await fifo.write(word)
        fifo.close()
        assert await guest.read_exactly(3) == word
    await asyncio.sleep(SOON)
    assert ended.count is None
    stdin.close_writer()
    stdin.close_writer()
    await until(lambda: ended.count == 6)
    guest.close()
    await until(lambda: host.fileno() < 0)


@asynchronous
async def test_stdin_of_a_process_that_reads_nothing(fifo: Fifo) -> None:
    """Back-pressure: the client is held back; and the process's end frees everything."""
    stdin, ended = Input(fifo.path), Ended()
    guest, host = memory.pair()
    stdin.connect(host, ended)
    stdin.open()
    fifo.open_writer()
    writing = asyncio.create_task(fifo.write(bytes(8 << 20)))
    await asyncio.sleep(SOON)
    assert not writing.done()
    writing.cancel()
    guest.close()
    await until(lambda: host.fileno() < 0)
    assert ended.count is not None


@pytest.mark.parametrize("moment", ["before", "connected", "opened", "at once", "waiting", "after its end"])
@asynchronous
async def test_stdin_closed_at_any_time(fifo: Fifo, moment: str) -> None:
    stdin = Input(fifo.path)
    guest, host = memory.pair()
    if moment in {"before", "opened"}:
        host.close()
    else:
        stdin.connect(host, Ended())
    if moment not in {"before", "connected"}:
        stdin.open()
    if moment == "after its end":
        fifo.open_writer()
        fifo.close()
        stdin.close_writer()
    if moment in {"waiting", "after its end"}:
        await asyncio.sleep(SOON)
    stdin.close()
    stdin.close()
    await until(lambda: host.fileno() < 0)
    guest.close()


@asynchronous
async def test_stream_that_comes_after_stdin_was_closed(fifo: Fifo) -> None:
    stdin = Input(fifo.path)
    stdin.close()
    guest, host = memory.pair()
    stdin.connect(host, Ended())
    await until(lambda: host.fileno() < 0)
    guest.close()


@asynchronous
async def test_guest_that_dies_before_it_opens_its_stream(fifo: Fifo) -> None:
    """Without this a client would wait for the end of an output that nobody ever writes to."""
    fifo.open_reader()
    stdio = await opened(StdioPaths("", fifo.path, "", terminal=False), 1)
    stdio.expect_no_streams()
    assert await asyncio.wait_for(fifo.read_to_end(), 1) == b""
    await stdio.closed(1)
    stdio.close()


@asynchronous
async def test_output_that_has_its_stream_when_the_guest_dies_is_delivered(fifo: Fifo) -> None:
    fifo.open_reader()
    stdio = await opened(StdioPaths("", fifo.path, "", terminal=False), 1)
    assert stdio.stdout
    guest, host = memory.pair()
    stdio.stdout.start(host)
    await guest.write(b"last words")
    guest.close()
    stdio.expect_no_streams()
    assert await asyncio.wait_for(fifo.read_to_end(), 1) == b"last words"
    stdio.close()
