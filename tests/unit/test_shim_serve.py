"""The daemon from its first line to its last: served on its socket, and nothing left when Shutdown is answered."""

import asyncio
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty
from pymicro.protos import task_pb2, types_pb2
from pymicro.shim import cgroup, rootfs, serve, sockets, state
from pymicro.shim.daemon import Start, prepare
from pymicro.shim.hypervisor.fake import FakeGuest
from pymicro.shim.protocol import TTRPC
from pymicro.shim.service import SERVICES
from pymicro.shim.state import Record
from pymicro.shim.timeline import Timeline
from pymicro.ttrpc import Client, StatusError

from tests.framework.fakes import asynchronous, until
from tests.unit.sandbox_harness import SETTINGS, SPEC, Pod
from tests.unit.test_shim_events import Containerd

BOOT = '[vm]\nstart = "boot"\n'


@dataclass
class Daemon:
    """A shim's daemon in this process, and the containerd that its events go to."""

    pod: Pod
    containerd: Containerd
    begun: Start
    running: asyncio.Task[bool]

    @property
    def nothing_left(self) -> bool:
        return not os.path.exists(self.begun.socket_path) and not os.path.exists(self.begun.directory)

    async def connect(self) -> Client:
        return await Client.connect(self.begun.socket_path)

    async def create(self, client: Client) -> int:
        mount = types_pb2.Mount(type="bind", source="/somewhere", options=["rbind"])
        request = task_pb2.CreateTaskRequest(id="c1", bundle=self.begun.bundle, rootfs=[mount])
        return (await client.call(SERVICES[0], "Create", request, task_pb2.CreateTaskResponse)).pid


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose path leaves room in a socket's address."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@asynccontextmanager
async def daemon(
    directory: Path, *, config: str = BOOT, shim_cgroup: str = "", spoken: str = TTRPC
) -> AsyncIterator[Daemon]:
    (directory / "config.toml").write_text(config)
    containerd = Containerd(directory)
    await containerd.start()
    run = directory / "run"
    run.mkdir()
    pod = Pod(directory, FakeGuest(), SETTINGS)
    path = str(directory / "shim.sock")
    begun = Start(
        namespace="ns",
        sandbox_id="c1",
        bundle=pod.bundle("c1"),
        directory=str(run),
        socket_path=path,
        protocol=spoken,
        warning="",
        ttrpc_address=containerd.address,
        config_path=str(directory / "config.toml"),
        config_body=b"",
        shim_cgroup=shim_cgroup,
        debug=False,
        begun_ns=0,
    )
    listener = sockets.bind(path)
    assert listener is not None
    loop = asyncio.get_running_loop()
    with pytest.MonkeyPatch.context() as patch:
        pod.host.put_in_place(patch, pod.hypervisor, SPEC)
        patch.setattr(
            rootfs, "remove_tree", lambda path: shutil.rmtree(path) if path == str(run) else pod.host.remove_tree(path)
        )
        timeline, record = Timeline(0), Record(str(run), namespace="ns", sandbox="c1")
        prepared = prepare(begun, record, timeline)
        running = asyncio.create_task(serve.serve(begun, prepared, record, timeline, listener))
        try:
            yield Daemon(pod, containerd, begun, running)
        finally:
            running.cancel()
            await asyncio.wait([running])
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
            await containerd.stop()


@asynchronous
async def test_from_create_to_shutdown(directory: Path) -> None:
    async with daemon(directory) as d, await d.connect() as client:
        pid = await d.create(client)
        assert state.read(d.begun.directory)["shim_pid"] == os.getpid()
        task = SERVICES[0]
        started = await client.call(task, "Start", task_pb2.StartRequest(id="c1"), task_pb2.StartResponse)
        assert started.pid == pid
        await d.pod.guest.exit(5, "c1")
        waited = await client.call(task, "Wait", task_pb2.WaitRequest(id="c1"), task_pb2.WaitResponse)
        assert waited.exit_status == 5
        await client.call(task, "Delete", task_pb2.DeleteRequest(id="c1"), task_pb2.DeleteResponse)
        await client.call(task, "Shutdown", task_pb2.ShutdownRequest(id="c1"), Empty)
        assert d.containerd.topics == [f"/tasks/{word}" for word in ("create", "start", "exit", "delete")]
        assert d.nothing_left, "`delete` comes next"
        answer = (Path(d.begun.bundle) / "freed").read_bytes()
        assert task_pb2.DeleteResponse.FromString(answer).exit_status == 5, "what it will say"
        assert d.pod.host.nothing_left
        assert d.pod.hypervisor.running == 0
        assert await asyncio.wait_for(d.running, 5), "the guard need not come"


@asynchronous
async def test_what_no_signal_ends_is_left_to_the_guard_and_delete(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with daemon(directory) as d, await d.connect() as client:
        await d.create(client)
        (group, *_) = state.read(d.begun.directory)["cgroups"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cgroup, "processes", lambda groups: {41, 42} if group in groups else set())
            patch.setattr(cgroup, "remove", lambda groups: [each for each in groups if each == group])
            await client.call(SERVICES[0], "Delete", task_pb2.DeleteRequest(id="c1"), task_pb2.DeleteResponse)
            await client.call(SERVICES[0], "Shutdown", task_pb2.ShutdownRequest(id="c1"), Empty)
            assert not await asyncio.wait_for(d.running, 5)
        assert not (Path(d.begun.bundle) / "freed").exists()
        assert group in state.read(d.begun.directory)["cgroups"]
        assert not os.path.exists(d.begun.socket_path)
    assert f"the cgroup {group} cannot be removed; processes in it that do not end: 41, 42" in caplog.text


@asynchronous
async def test_events_wait_for_a_containerd_that_restarts(directory: Path) -> None:
    async with daemon(directory) as d, await d.connect() as client:
        await d.containerd.stop()
        await d.create(client)
        deleting = client.call(SERVICES[0], "Delete", task_pb2.DeleteRequest(id="c1"), task_pb2.DeleteResponse)
        await deleting
        shutting = asyncio.create_task(
            client.call(SERVICES[0], "Shutdown", task_pb2.ShutdownRequest(id="c1"), Empty, timeout=5)
        )
        await asyncio.sleep(0.05)
        assert not shutting.done()
        await d.containerd.start()
        await shutting
        assert d.containerd.topics == ["/tasks/create", "/tasks/delete"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@asynchronous
async def test_stray_signals_take_no_pod_down(directory: Path, number: signal.Signals) -> None:
    async with daemon(directory) as d, await d.connect() as client:
        await d.create(client)
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.02)
        assert not d.running.done()
        assert await client.call(SERVICES[1], "State", task_pb2.StateRequest(id="c1"), task_pb2.StateResponse)


@asynchronous
async def test_settings_that_make_no_sense_are_the_error_of_create(directory: Path) -> None:
    async with daemon(directory, config="[vm]\nmemory_mb = 64\n") as d, await d.connect() as client:
        with pytest.raises(StatusError, match="did you mean memory_mib"):
            await d.create(client)
        await client.call(SERVICES[0], "Shutdown", task_pb2.ShutdownRequest(id="c1"), Empty)
        assert d.nothing_left
        await asyncio.wait_for(d.running, 5)


@asynchronous
async def test_the_shim_joins_the_cgroup_of_runcs_options(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = directory / "memory/shims"
    group.mkdir(parents=True)
    monkeypatch.setattr(cgroup, "directories", lambda path: (str(directory / "memory" / path), "/nowhere"))
    async with daemon(directory, shim_cgroup="/shims") as d, await d.connect() as client:
        await d.create(client)
        assert (group / "cgroup.procs").read_text() == "0", "cgroups(7): the process that writes it"


@asynchronous
async def test_a_cgroup_of_runcs_options_that_is_not_there(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon(directory, shim_cgroup="/no/such") as d, await d.connect() as client:
        with pytest.raises(
            StatusError, match=r"cannot join the cgroup '/no/such' \(shim_cgroup\): no controller has it"
        ):
            await d.create(client)


@asynchronous
async def test_core_scheduling_is_left_out_and_said_to_be(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCHED_CORE", "1")
    caplog.set_level(logging.DEBUG)
    async with daemon(directory) as d, await d.connect() as client:
        await d.create(client)
    assert "core scheduling (SCHED_CORE)" in caplog.text


@asynchronous
async def test_other_users_are_turned_away(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon(directory) as d:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        client = await d.connect()
        with pytest.raises(Exception, match=r".*"):
            await client.call(SERVICES[0], "Connect", task_pb2.ConnectRequest(id="c1"), task_pb2.ConnectResponse)
        await client.close()
        monkeypatch.undo()
        async with await d.connect() as own:
            await own.call(SERVICES[0], "Connect", task_pb2.ConnectRequest(id="c1"), task_pb2.ConnectResponse)


@asynchronous
async def test_vm_boots_before_anybody_asks(directory: Path) -> None:
    """The boot is what takes long: it runs while containerd still prepares its Create."""
    async with daemon(directory) as d:
        await until(lambda: "setup" in d.pod.guest.methods())
