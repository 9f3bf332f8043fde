"""Mutated messages between shim and guest: each side answers with errors, or ends the connection, and holds nothing.

The shim's side is a whole sandbox on a fake VM, the guest's the agent's control loop on a socket pair. The shim's own
port is in tests/e2e/test_fuzz_port.py.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from pymicro.agent import clock, concurrency, handlers
from pymicro.agent.control import Control
from pymicro.agent.devices import Ports
from pymicro.agent.reaper import Reaper
from pymicro.shim.agent import AgentClient
from pymicro.shim.boot import MOST_GREETINGS
from pymicro.shim.channel import memory
from pymicro.shim.errors import SandboxDied, ShimError
from pymicro.shim.process import Status
from pymicro.wire import frames
from pymicro.wire.messages import PROTOCOL_VERSION

from tests.framework.fakes import asynchronous, no_descriptor_leaks, until
from tests.framework.fuzz import mutated
from tests.unit.sandbox_harness import Json, pod

SEED = 20251125
SHARE, ALL = 200_000, 10_000_000
"""Bytes in the usual run and in the slow one."""
PER_CONNECTION = 5
LONGEST = 3600.0
"""Seconds."""
VOLUME = pytest.mark.parametrize(
    "total", [SHARE, pytest.param(ALL, marks=[pytest.mark.slow, pytest.mark.timeout(LONGEST)])]
)

long = partial(asynchronous, limit=LONGEST)

TARGET: Json = {"container": "c1", "exec": None}
REPLIES: list[Json] = [
    {"id": 1, "result": {"pid": 42}},
    {"id": 2, "result": {"pids": [1, 2, 3], "init": 1, "execs": {"e1": 2}}},
    {"id": 3, "result": {"files": {"cpu.stat": "usage_usec 1\n"}}},
    {"id": 4, "error": {"kind": "not_found", "message": "no such container"}},
]
EVENTS: list[Json] = [
    {"event": "exit", **TARGET, "status": 0, "stdout": 0, "stderr": 0},
    {"event": "exit", "container": "c1", "exec": "e1", "status": 137, "stdout": 10, "stderr": 9},
    {"event": "eof", **TARGET, "stream": "stdout", "bytes": 0},
    {"event": "oom", "container": "c1"},
]
PARAMETERS: dict[str, Json] = {
    "signal": {"signal": 15, "all": True},
    "close_stdin": {"bytes": 10},
    "resize": {"width": 80, "height": 24},
    "update": {"resources": {"pids": {"limit": 5}}},
    **{name: {} for name in ("start", "pause", "resume", "pids", "stats", "delete", "no such method")},
}
FROM_GUEST = [frames.encode(message) for message in (*REPLIES, *EVENTS)]
TO_GUEST = [
    frames.encode({"id": 1, "now_ns": 10**18, "method": method, "params": {**TARGET, **more}})
    for method, more in PARAMETERS.items()
]
HELLOS = [
    frames.encode({"hello": "stream", "token": "0" * 32}),
    frames.encode({"hello": "control", "version": PROTOCOL_VERSION}),
]


def framed(originals: list[bytes], total: int, seed: int) -> Iterator[bytes]:
    """Yield mutated messages, most of them with the length that they now have: else a connection would end with it."""
    for number, message in enumerate(mutated(originals, total, seed)):
        payload = message[frames.PREFIX_SIZE :]
        yield message if number % 16 == 0 else len(payload).to_bytes(frames.PREFIX_SIZE) + payload


@pytest.fixture
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if something was logged that nobody has foreseen, with its traceback."""
    with caplog.at_level(logging.WARNING):
        yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


@VOLUME
@pytest.mark.usefixtures("no_defects")
@long
async def test_the_control_connections_end_in_the_shim(total: int) -> None:
    """Each connection lives until the first message that makes no sense; then every call on it has an error."""
    messages = framed(FROM_GUEST, total, SEED)
    lives = 0
    with no_descriptor_leaks():
        while batch := list(islice(messages, PER_CONNECTION)):
            guest, host = memory.pair()
            client = AgentClient(host, lambda _event: None, timeout=60)
            calls = [asyncio.create_task(client.call("stats", {})) for _ in range(2)]
            await asyncio.sleep(0)
            with suppress(OSError):
                await guest.write(b"".join(batch))
            guest.close()
            await client.wait_closed()
            assert client.ended
            for ended in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(ended, dict | ShimError)
            lives += 1
    assert lives > total / 1_000_000


@pytest.mark.usefixtures("no_defects")
@pytest.mark.parametrize("seed", range(10))
@asynchronous
async def test_a_sandbox_whose_guest_talks_nonsense(tmp_path: Path, seed: int) -> None:
    """Its containers are reported as ended, once, whoever waits is released, and nothing of it is left."""
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        assert p.guest._control
        for message in framed(FROM_GUEST, 20_000, SEED + seed):
            with suppress(OSError):
                await p.guest._control.write(message)
        p.guest.stop()
        await container.init.wait()
        await until(lambda: container.init.status is Status.STOPPED)
        with pytest.raises(SandboxDied):
            await p.sandbox.agent()
        assert sum(entry.startswith("exit c1 ") for entry in p.log) == 1
        assert sum(entry.startswith("exit e1 ") for entry in p.log) == 1


@VOLUME
@pytest.mark.usefixtures("no_defects")
@long
async def test_connections_that_a_container_opens_to_the_shim(tmp_path: Path, total: int) -> None:
    """They get nothing, and the pod's own streams come through all the same."""
    async with pod(tmp_path) as p:
        container = await p.running()
        silent = [p.guest._dial() for _ in range(MOST_GREETINGS - 1)]
        for hello in framed(HELLOS, total, SEED):
            connection = p.guest._dial()
            with suppress(OSError):
                await connection.write(hello)
            connection.close()
            while p.vm._incoming.qsize() > MOST_GREETINGS:  # as a socket's queue would, let it wait
                await asyncio.sleep(0.001)
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        assert container.init.status is Status.RUNNING
        for connection in silent:
            connection.close()
        await until(lambda: not [task for task in asyncio.all_tasks() if "_greet" in repr(task.get_coro())])


@VOLUME
def test_the_control_connections_end_in_the_guest(
    total: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every request that can be read is answered; one that cannot ends the connection, and with it the VM."""
    for name in ("setup", "create", "exec"):  # these would change this host
        monkeypatch.delitem(handlers.METHODS, name)
    requests = Requests()
    monkeypatch.setattr(concurrency.spare, "run_apart", requests.start)
    monkeypatch.setattr(clock, "follow", lambda _host_ns, *, back: None)  # as would this
    messages = framed(TO_GUEST, total, SEED)
    answers = 0
    with no_descriptor_leaks():
        while batch := list(islice(messages, PER_CONNECTION)):
            answers += requests.served(b"".join(batch))
    assert answers > total / 5_000
    capfd.readouterr()


class Requests:
    """Has each request answered in a thread, as the agent does, and waits for them."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, function: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments))
        self._threads[-1].start()

    def served(self, data: bytes) -> int:
        """Have the agent serve a connection on which `data` comes; return how many answers it has given."""
        host, guest = socket.socketpair()
        with host:
            with guest:
                connection = Control(guest, 0)
                host.sendall(data)
                host.shutdown(socket.SHUT_WR)
                with suppress(frames.FrameError):
                    connection.serve(handlers.Agent(connection, Reaper(), Ports()))
                while self._threads:
                    self._threads.pop().join()
            return _all_of(host).count(b'"id":')


def _all_of(connection: socket.socket) -> bytes:
    parts = []
    with suppress(OSError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_the_same_seed_gives_the_same_messages() -> None:
    assert list(mutated(FROM_GUEST, 5_000, 1)) == list(mutated(FROM_GUEST, 5_000, 1))
    assert list(mutated(FROM_GUEST, 5_000, 1)) != list(mutated(FROM_GUEST, 5_000, 2))
