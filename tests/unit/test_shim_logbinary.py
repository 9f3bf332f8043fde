"""Log binaries: what they get, when the process may start, and that they end, in bounded time, with all they hold."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from pymicro.shim import logbinary, state
from pymicro.shim.channel import memory
from pymicro.shim.errors import InvalidRequest, ShimError, StepTimeout
from pymicro.shim.logbinary import LogOwner, command
from pymicro.shim.output import Output
from pymicro.shim.requests import StdioPaths
from pymicro.shim.state import Record
from pymicro.shim.stdio import Stdio

from tests.framework.fakes import asynchronous, no_descriptor_leaks, until

FROM_BOTH = 'exec 5>&-; cat <&3 >"$1/out" & cat <&4 >"$1/err" & wait'


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


class Client:
    """Whoever wrote the log binary: a script in a directory, and the process whose output it takes."""

    def __init__(self, directory: Path, script: str) -> None:
        self.directory = directory
        self.record = Record(str(directory), namespace="ns")
        program = directory / "log binary"
        program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\necho $$ > {directory}/pid\n{script}\n")
        program.chmod(0o755)
        self.uri = f"binary://{quote(str(program))}?{quote(str(directory), safe='')}"

    async def open(self, stderr: str | None = None, limit: float = 5, *, terminal: bool = False) -> Stdio:
        paths = StdioPaths("", self.uri, self.uri if stderr is None else stderr, terminal)
        return await Stdio.open(paths, limit, LogOwner("c1", "ns", self.record))

    def file(self, name: str) -> str:
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    @property
    def recorded(self) -> list[str]:
        """The pids that `delete` would look for now."""
        return list(state.read(str(self.directory)).get("loggers", {}))

    @property
    def runs(self) -> bool:
        return bool(state.start_time(int(self.file("pid"))))


@asynccontextmanager
async def written(output: Output | None, data: bytes) -> AsyncIterator[None]:
    """Have a process write `data` and end."""
    assert output
    guest, host = memory.pair()
    output.start(host)
    await guest.write(data)
    output.end_at(len(data))
    yield
    guest.close()


async def ended(stdio: Stdio) -> None:
    stdio.expect_no_streams()  # what is not written is not waited for
    await stdio.closed(5)
    stdio.close()
    await stdio.end_log_binaries()


@asynchronous
async def test_both_outputs_arrive_each_on_its_own_descriptor(tmp_path: Path) -> None:
    client = Client(tmp_path, FROM_BOTH)
    stdio = await client.open()
    data = os.urandom(1 << 20)
    async with written(stdio.stdout, data), written(stdio.stderr, b"bad"):
        await ended(stdio)
    assert (tmp_path / "out").read_bytes() == data
    assert client.file("err") == "bad"
    assert not client.runs


def test_each_key_and_its_first_value_are_the_arguments() -> None:
    uri = "binary:///opt/log%20er?b=1&a=x%20y&empty&b=2"
    assert command(uri) == ["/opt/log er", "b", "1", "a", "x y", "empty", ""]


@asynchronous
async def test_it_knows_whom_it_serves_and_nothing_else(tmp_path: Path) -> None:
    client = Client(
        tmp_path, f"env | grep -v -e ^PWD= -e ^_= | sort > {tmp_path}/env; ls /proc/self/fd > {tmp_path}/fds"
    )
    await ended(await client.open())
    assert client.file("env").split() == ["CONTAINER_ID=c1", "CONTAINER_NAMESPACE=ns"]
    assert client.file("fds").split() == ["0", "1", "2", "3", "4", "5", "6"], "6 is the listing's own"


@pytest.mark.parametrize("sign", ["printf x >&5", "exec 5>&-"])
@asynchronous
async def test_the_process_starts_when_it_says_that_it_is_ready(tmp_path: Path, sign: str) -> None:
    client = Client(tmp_path, f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; {sign}; {FROM_BOTH}")
    opening = asyncio.create_task(client.open())
    await until(lambda: client.file("pid"))
    await asyncio.sleep(0.05)
    assert not opening.done()
    assert client.recorded, "a shim that is killed now must not leave it behind"
    (tmp_path / "go").touch()
    await ended(await opening)
    assert client.recorded == []


@asynchronous
async def test_one_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    client = Client(tmp_path, "echo thinking; sleep 60")
    with pytest.raises(StepTimeout, match=r"'.*/log binary' was not ready in 1 s .* it said: thinking"):
        await client.open(limit=1)
    assert not client.runs
    assert client.recorded == []


@asynchronous
async def test_one_that_dies_before_it_is_ready_is_named_with_what_it_said(tmp_path: Path) -> None:
    client = Client(tmp_path, "echo no disk >&2; exit 3")
    with pytest.raises(ShimError, match="ended before it was ready, exit status 3; it said: no disk"):
        await client.open()
    assert client.recorded == []


@asynchronous
async def test_the_second_version_must_say_that_it_is_ready(tmp_path: Path) -> None:
    client = Client(tmp_path, f"exec 5>&-; {FROM_BOTH}")
    client.uri = client.uri.replace("binary:", "binary-v2:")
    with pytest.raises(ShimError, match="closed its descriptor 5 without a word"):
        await client.open()


@asynchronous
async def test_one_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    client = Client(tmp_path, "")
    client.uri = "binary:///no/such/logger"
    with pytest.raises(InvalidRequest, match=r"'binary:///no/such/logger': cannot run '/no/such/logger': No such file"):
        await client.open()


@asynchronous
async def test_one_that_dies_loses_what_follows_and_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(tmp_path, "exec 5>&-; head -c 5 <&3 >/dev/null; echo disk full >&2; exit 4")
    stdio = await client.open()
    assert stdio.stdout
    guest, host = memory.pair()
    stdio.stdout.start(host)
    await guest.write(b"12345")
    await until(lambda: "ended, exit status 4, while output may still come: that is lost" in caplog.text)
    assert "it said: disk full" in caplog.text
    await guest.write(b"67890")
    await asyncio.wait_for(stdio.drain(10, 0, 5), 1)
    guest.close()
    stdio.close()
    await asyncio.wait_for(stdio.end_log_binaries(), 1)


@asynchronous
async def test_one_that_dies_while_its_pipe_is_full_holds_nobody_up(tmp_path: Path) -> None:
    client = Client(tmp_path, f"exec 5>&-; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done")
    stdio = await client.open()
    assert stdio.stdout
    guest, host = memory.pair()
    stdio.stdout.start(host)
    writing = asyncio.create_task(guest.write(bytes(8 << 20)))
    await asyncio.sleep(0.1)
    assert not writing.done(), "nothing holds the process back"
    (tmp_path / "go").touch()
    await asyncio.wait_for(writing, 3)
    stdio.stdout.end_at(8 << 20)
    await asyncio.wait_for(stdio.stdout.closed(), 3)
    assert stdio.stdout.relayed == 8 << 20
    guest.close()
    stdio.close()
    await stdio.end_log_binaries()


@asynchronous
async def test_what_it_holds_at_the_end_it_may_still_write(tmp_path: Path) -> None:
    client = Client(tmp_path, f"exec 5>&-; held=$(cat <&3); sleep 0.3; echo $held > {tmp_path}/out")
    stdio = await client.open()
    async with written(stdio.stdout, b"last words"):
        await ended(stdio)
    assert client.file("out") == "last words\n"


@asynchronous
async def test_one_that_does_not_end_is_asked_to_and_then_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logbinary, "_FAREWELL", 0.1)
    monkeypatch.setattr(logbinary, "_TERM_LIMIT", 0.3)
    stubborn = f"trap 'echo asked > {tmp_path}/out' TERM; exec 5>&-; while :; do sleep 0.02; done"
    client = Client(tmp_path, stubborn)
    stdio = await client.open()
    begun = time.monotonic()
    stdio.close()
    await asyncio.gather(stdio.end_log_binaries(), stdio.end_log_binaries())
    assert 0.4 <= time.monotonic() - begun < 3
    assert client.file("out") == "asked\n"
    assert not client.runs
    assert "does not end and is killed" in caplog.text
    assert client.recorded == []


@pytest.mark.parametrize("terminal", [True, False])
@asynchronous
async def test_without_stderr_it_sees_the_end_of_that_at_once(tmp_path: Path, *, terminal: bool) -> None:
    client = Client(tmp_path, f"exec 5>&-; cat <&4; echo end of stderr > {tmp_path}/err; cat <&3 > {tmp_path}/out")
    stdio = await client.open(stderr=None if terminal else "", terminal=terminal)
    assert stdio.stderr is None
    await until(lambda: client.file("err"))
    async with written(stdio.stdout, b"hello"):
        await ended(stdio)
    assert client.file("out") == "hello"


@asynchronous
async def test_two_log_binaries_serve_one_output_each(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = Client(tmp_path / "a", FROM_BOTH), Client(tmp_path / "b", FROM_BOTH)
    second.record = first.record
    stdio = await first.open(stderr=second.uri)
    assert len(first.recorded) == 2
    async with written(stdio.stdout, b"out"), written(stdio.stderr, b"err"):
        await ended(stdio)
    assert [client.file(name) for client in (first, second) for name in ("out", "err")] == ["out", "", "", "err"]
    assert first.recorded == []


@asynchronous
async def test_it_is_killed_when_another_stream_cannot_be_opened(tmp_path: Path) -> None:
    client = Client(tmp_path, FROM_BOTH)
    with pytest.raises(InvalidRequest, match="missing"):
        await client.open(stderr=str(tmp_path / "missing"))
    assert not client.runs
    assert client.recorded == []


@asynchronous
async def test_it_outlives_a_signal_to_the_shims_process_group(tmp_path: Path) -> None:
    client = Client(tmp_path, FROM_BOTH)
    stdio = await client.open()
    assert os.getpgid(int(client.file("pid"))) != os.getpgrp()
    await ended(stdio)
