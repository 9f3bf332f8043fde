"""The Task service as containerd calls it: over ttrpc, with its messages and its status codes."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from pymicro.protos import runc_pb2, task_pb2, types_pb2
from pymicro.shim import errors, serve, translate
from pymicro.shim import service as service_module
from pymicro.shim.errors import HostMissing, InvalidRequest
from pymicro.shim.hypervisor.fake import Refused
from pymicro.shim.service import SERVICES, TaskService
from pymicro.ttrpc import Client, Code, Method, Server, StatusError
from pymicro.wire import messages

from tests.framework.fakes import asynchronous, until
from tests.unit.sandbox_harness import Json, Pod, pod

M = TypeVar("M", bound=Message)

PROCESS = {"args": ["ps"], "cwd": "/", "terminal": False}
STATUS = {"CREATED": 1, "RUNNING": 2, "STOPPED": 3, "PAUSED": 4}


class Containerd:
    """A client of the shim, as containerd is one."""

    def __init__(self, client: Client, service: str) -> None:
        self.client = client
        self.service = service

    async def call(self, method: str, request: Message, response: type[M]) -> M:
        return await self.client.call(self.service, method, request, response, timeout=5)

    async def create(self, p: Pod, container_id: str = "c1") -> task_pb2.CreateTaskResponse:
        mount = types_pb2.Mount(type="bind", source="/somewhere", options=["rbind"])
        request = task_pb2.CreateTaskRequest(id=container_id, bundle=p.bundle(container_id), rootfs=[mount])
        return await self.call("Create", request, task_pb2.CreateTaskResponse)

    async def start(self, container_id: str = "c1", exec_id: str = "") -> int:
        request = task_pb2.StartRequest(id=container_id, exec_id=exec_id)
        return (await self.call("Start", request, task_pb2.StartResponse)).pid

    async def exec(self, exec_id: str = "e1", spec: object = PROCESS) -> None:
        packed = AnyMessage(type_url="types.containerd.io/x/Process", value=json.dumps(spec).encode())
        await self.call("Exec", task_pb2.ExecProcessRequest(id="c1", exec_id=exec_id, spec=packed), Empty)

    async def state(self, exec_id: str = "") -> task_pb2.StateResponse:
        return await self.call("State", task_pb2.StateRequest(id="c1", exec_id=exec_id), task_pb2.StateResponse)

    async def wait(self, exec_id: str = "") -> task_pb2.WaitResponse:
        return await self.call("Wait", task_pb2.WaitRequest(id="c1", exec_id=exec_id), task_pb2.WaitResponse)

    async def kill(self, number: int = 9, exec_id: str = "", *, everything: bool = False) -> None:
        await self.call("Kill", task_pb2.KillRequest(id="c1", exec_id=exec_id, signal=number, all=everything), Empty)

    async def delete(self, exec_id: str = "") -> task_pb2.DeleteResponse:
        return await self.call("Delete", task_pb2.DeleteRequest(id="c1", exec_id=exec_id), task_pb2.DeleteResponse)


@asynccontextmanager
async def connected(service: TaskService, version: str = SERVICES[0]) -> AsyncIterator[Containerd]:
    ours, theirs = socket.socketpair()
    methods = {name: Method(handler, request) for name, (request, handler) in service.methods().items()}
    server = Server(dict.fromkeys(SERVICES, methods), status_of=serve._status_of)
    path = f"\0pymicro-test-{os.getpid()}-{id(service)}"
    ours.close()
    theirs.close()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    serving = asyncio.create_task(server.serve(listener))
    try:
        async with await Client.connect(path) as client:
            yield Containerd(client, version)
    finally:
        await server.close()
        await serving


@asynccontextmanager
async def shim(tmp_path: Path, version: str = SERVICES[0]) -> AsyncIterator[tuple[Pod, Containerd, TaskService]]:
    async with pod(tmp_path) as p:
        service = TaskService(p.sandbox)
        async with connected(service, version) as containerd:
            yield p, containerd, service


def code(error: StatusError) -> Code:
    return Code(error.code)


@pytest.mark.parametrize("version", SERVICES)
@asynchronous
async def test_life_of_a_task(tmp_path: Path, version: str) -> None:
    async with shim(tmp_path, version) as (p, containerd, _):
        pid = (await containerd.create(p)).pid
        assert pid > 0
        state = await containerd.state()
        assert (state.id, state.pid, state.status, state.bundle) == ("c1", pid, STATUS["CREATED"], p.bundle("c1"))
        assert not state.HasField("exited_at")
        assert await containerd.start() == pid
        assert (await containerd.state()).status == STATUS["RUNNING"]
        waiting = [asyncio.create_task(containerd.wait()) for _ in range(3)]
        await p.guest.exit(7, "c1")
        waits = [await task for task in waiting]
        assert [wait.exit_status for wait in waits] == [7, 7, 7]
        state = await containerd.state()
        assert (state.status, state.exit_status, state.exited_at) == (STATUS["STOPPED"], 7, waits[0].exited_at)
        deleted = await containerd.delete()
        assert (deleted.pid, deleted.exit_status, deleted.exited_at) == (pid, 7, waits[0].exited_at)
        with pytest.raises(StatusError) as caught:
            await containerd.state()
        assert code(caught.value) is Code.NOT_FOUND


@asynchronous
async def test_state_tells_the_stdio_that_create_named(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, _):
        log = f"file://{tmp_path}/log"
        bundle = p.bundle("c1", process={"args": ["sh"], "cwd": "/", "terminal": True})
        request = task_pb2.CreateTaskRequest(id="c1", bundle=bundle, stdout=log, stderr=log, terminal=True)
        request.rootfs.add(type="bind", source="/somewhere")
        await containerd.call("Create", request, task_pb2.CreateTaskResponse)
        state = await containerd.state()
        assert (state.stdin, state.stdout, state.stderr, state.terminal) == ("", log, log, True)


@asynchronous
async def test_life_of_an_exec(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, _):
        await containerd.create(p)
        await containerd.start()
        await containerd.exec()
        state = await containerd.state("e1")
        assert (state.id, state.exec_id, state.pid, state.status) == ("e1", "e1", 0, STATUS["CREATED"])
        pid = await containerd.start(exec_id="e1")
        assert pid == (await containerd.state("e1")).pid > 0
        pids = await containerd.call("Pids", task_pb2.PidsRequest(id="c1"), task_pb2.PidsResponse)
        assert [info.pid for info in pids.processes] == [p.sandbox.container("c1").anchor.pid, pid]
        details = pids.processes[1].info
        assert details.type_url == "containerd.runc.v1.ProcessDetails"
        assert runc_pb2.ProcessDetails.FromString(details.value).exec_id == "e1"
        await p.guest.exit(3, "c1", "e1")
        assert (await containerd.wait("e1")).exit_status == 3
        assert (await containerd.delete("e1")).exit_status == 3
        assert (await containerd.state()).status == STATUS["RUNNING"]


@asynchronous
async def test_status_codes(tmp_path: Path) -> None:
    """Containerd and its clients go by these numbers (shim contract, Task service)."""
    async with shim(tmp_path) as (p, containerd, _):
        await containerd.create(p)

        async def expect(wanted: Code, call: object) -> None:
            with pytest.raises(StatusError) as caught:
                await call  # type: ignore[misc]  # any awaitable
            assert code(caught.value) is wanted, caught.value

        await expect(Code.ALREADY_EXISTS, containerd.create(p))
        await expect(Code.NOT_FOUND, containerd.start("c9"))
        await expect(Code.NOT_FOUND, containerd.start(exec_id="e9"))
        await containerd.exec("e1")
        await expect(Code.ALREADY_EXISTS, containerd.exec("e1"))
        await expect(Code.INVALID_ARGUMENT, containerd.exec("e2", spec=[1]))
        await expect(Code.FAILED_PRECONDITION, containerd.kill(exec_id="e1"))
        await containerd.start()
        await expect(Code.FAILED_PRECONDITION, containerd.start())
        await expect(Code.FAILED_PRECONDITION, containerd.delete())
        checkpoint = task_pb2.CheckpointTaskRequest(id="c1")
        await expect(Code.UNIMPLEMENTED, containerd.call("Checkpoint", checkpoint, Empty))
        await expect(Code.UNIMPLEMENTED, containerd.call("Invented", checkpoint, Empty))
        await containerd.kill(everything=True)
        assert (await containerd.wait()).exit_status == 137
        await expect(Code.NOT_FOUND, containerd.kill())
        await expect(Code.FAILED_PRECONDITION, containerd.exec("e3"))
        await expect(Code.FAILED_PRECONDITION, containerd.start(exec_id="e1"))
        restore = task_pb2.CreateTaskRequest(id="c3", bundle=p.bundle("c3"), checkpoint="/var/lib/checkpoint")
        await expect(Code.INVALID_ARGUMENT, containerd.call("Create", restore, task_pb2.CreateTaskResponse))
        await containerd.delete()
        await expect(Code.NOT_FOUND, containerd.delete())


@asynchronous
async def test_message_of_the_guests_runtime_reaches_the_client(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, _):

        async def refuses(_params: Json) -> None:
            raise Refused(messages.RUNTIME, "executable file `nope` not found in $PATH: No such file or directory")

        p.guest.answers["create"] = refuses
        with pytest.raises(StatusError, match="executable file `nope` not found"):
            await containerd.create(p)
        with pytest.raises(StatusError) as caught:
            await containerd.delete()
        assert code(caught.value) is Code.NOT_FOUND, "containerd accepts that after a failed Create, and nothing else"


@asynchronous
async def test_death_of_the_vm_ends_a_wait_and_refuses_later_calls(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, _):
        await containerd.create(p)
        await containerd.start()
        waiting = asyncio.create_task(containerd.wait())
        await asyncio.sleep(0.01)
        p.vm.die(-11)
        assert (await waiting).exit_status == 137
        with pytest.raises(StatusError) as caught:
            await containerd.create(p, "c2")
        assert code(caught.value) is Code.UNAVAILABLE
        assert (await containerd.delete()).exit_status == 137


@asynchronous
async def test_client_that_goes_away_in_the_middle_of_start(tmp_path: Path) -> None:
    """Containerd may be restarted at any time: what it has begun is brought to its end, and told by events."""
    async with pod(tmp_path) as p:
        service = TaskService(p.sandbox)
        go = asyncio.Event()
        async with connected(service) as containerd:
            await containerd.create(p)

            async def slow(_params: Json) -> None:
                await go.wait()

            p.guest.answers["start"] = slow
            starting = asyncio.create_task(containerd.start())
            await until(lambda: "start" in p.guest.methods())
        with pytest.raises(Exception, match=r".*"):
            await starting
        go.set()
        await p.until_logged("start c1")
        async with connected(TaskService(p.sandbox)) as containerd:
            assert (await containerd.state()).status == STATUS["RUNNING"]


@asynchronous
async def test_wait_of_a_client_that_went_away_is_forgotten(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        service = TaskService(p.sandbox)
        async with connected(service) as containerd:
            await containerd.create(p)
            waiting = asyncio.create_task(containerd.wait())
            await asyncio.sleep(0.01)
        with pytest.raises(Exception, match=r".*"):
            await waiting
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in others if "wait" in repr(task.get_coro()) and "Process" in repr(task)]


@asynchronous
async def test_update_reaches_guest_and_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shim(tmp_path) as (p, containerd, _):
        await containerd.create(p)
        written: list[object] = []
        monkeypatch.setattr("pymicro.shim.cgroup.write_limits", lambda groups, limits: written.append((groups, limits)))
        limits = {"memory": {"limit": 64 << 20}}
        value = AnyMessage(type_url="types.containerd.io/x/LinuxResources", value=json.dumps(limits).encode())
        await containerd.call("Update", task_pb2.UpdateTaskRequest(id="c1", resources=value), Empty)
        assert p.guest.requests[-1][0] == "update"
        assert p.guest.requests[-1][1]["resources"]["memory"]["limit"] == 64 << 20
        assert written == [(p.sandbox.container("c1").cgroups, limits)], "clients read the anchor's cgroup"


@asynchronous
async def test_updates_are_done_one_by_one_and_those_of_clients_that_went_away_before_their_turn_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pod(tmp_path) as p:
        service = TaskService(p.sandbox)
        go = asyncio.Event()
        written: list[object] = []
        monkeypatch.setattr("pymicro.shim.cgroup.write_limits", lambda _, limits: written.append(limits.get("number")))

        async def slow(_params: Json) -> None:
            await go.wait()

        def update(number: int) -> asyncio.Task[Empty]:
            value = AnyMessage(type_url="types.containerd.io/x/LinuxResources", value=b'{"number":%d}' % number)
            request = task_pb2.UpdateTaskRequest(id="c1", resources=value)
            return asyncio.create_task(containerd.call("Update", request, Empty))

        async with connected(service) as containerd:
            await containerd.create(p)
            p.guest.answers["update"] = slow
            written.clear()
            given_up = [update(number) for number in range(5)]
            await until(lambda: "update" in p.guest.methods())
            await asyncio.sleep(0.02)
            assert p.guest.methods().count("update") == 1
        await asyncio.gather(*given_up, return_exceptions=True)
        async with connected(service) as containerd:
            last = update(5)
            await asyncio.sleep(0.02)
            go.set()
            await last
        assert written == [0, 5]


@asynchronous
async def test_stats_are_packed_for_this_host(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, _):
        await containerd.create(p)
        response = await containerd.call("Stats", task_pb2.StatsRequest(id="c1"), task_pb2.StatsResponse)
        assert response.stats.type_url in {"io.containerd.cgroups.v1.Metrics", "io.containerd.cgroups.v2.Metrics"}
        await containerd.kill()
        await containerd.wait()
        again = await containerd.call("Stats", task_pb2.StatsRequest(id="c1"), task_pb2.StatsResponse)
        assert again.stats.value, "CRI reads the counter of memory kills after the exit"


@asynchronous
async def test_pause_resume_close_io_and_resize(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, _):
        await containerd.create(p)
        await containerd.start()
        await containerd.call("Pause", task_pb2.PauseRequest(id="c1"), Empty)
        assert (await containerd.state()).status == STATUS["PAUSED"]
        await containerd.call("Resume", task_pb2.ResumeRequest(id="c1"), Empty)
        await containerd.call("CloseIO", task_pb2.CloseIORequest(id="c1", stdin=True), Empty)
        await containerd.call("ResizePty", task_pb2.ResizePtyRequest(id="c1", width=80, height=25), Empty)
        assert (await containerd.state()).status == STATUS["RUNNING"]


@asynchronous
async def test_connect_never_fails(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, _):
        request = task_pb2.ConnectRequest(id="c1")
        response = await containerd.call("Connect", request, task_pb2.ConnectResponse)
        assert (response.shim_pid, response.task_pid) == (os.getpid(), 0)
        pid = (await containerd.create(p)).pid
        assert (await containerd.call("Connect", request, task_pb2.ConnectResponse)).task_pid == pid


@asynchronous
async def test_a_shim_that_never_has_a_container_is_unused(tmp_path: Path) -> None:
    async with shim(tmp_path) as (_, _, service):
        await asyncio.wait_for(service.unused(0.1), 2)

    await asyncio.wait_for(TaskService(HostMissing("no QEMU")).unused(0.1), 2)


@asynchronous
async def test_a_shim_is_unused_when_its_container_has_been_gone_for_a_while_and_not_before(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, service):
        unused = asyncio.create_task(service.unused(0.2))
        await containerd.create(p)
        await asyncio.sleep(0.5)
        assert not unused.done()

        await containerd.kill()
        await containerd.wait()
        await containerd.delete()
        await asyncio.sleep(0.1)
        assert not unused.done()
        await asyncio.wait_for(unused, 2)


@asynchronous
async def test_a_wish_for_a_container_that_fails_begins_the_time_anew() -> None:
    service = TaskService(HostMissing("no QEMU"))
    unused = asyncio.create_task(service.unused(0.2))

    for _ in range(8):
        await asyncio.sleep(0.09)
        with pytest.raises(HostMissing):
            await service.create(task_pb2.CreateTaskRequest(id="c1"))
    assert not unused.done()

    await asyncio.wait_for(unused, 2)


@asynchronous
async def test_shutdown_while_containers_remain_does_nothing(tmp_path: Path) -> None:
    async with shim(tmp_path) as (p, containerd, service):
        await containerd.create(p)
        await containerd.call("Shutdown", task_pb2.ShutdownRequest(id="c1"), Empty)
        assert not service.shutdown_requested.is_set()
        await containerd.delete()
        shutting = asyncio.create_task(containerd.call("Shutdown", task_pb2.ShutdownRequest(id="c1"), Empty))
        await until(service.shutdown_requested.is_set)
        assert not shutting.done(), "`delete` comes next and must find everything freed"
        service.cleaned_up.set()
        await shutting


@asynchronous
async def test_shutdown_answers_before_containerd_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM with much memory takes its time to end; the `delete` that follows finishes that."""
    monkeypatch.setattr(service_module, "SHUTDOWN_LIMIT", 0.1)
    async with shim(tmp_path) as (_, containerd, service):
        await containerd.call("Shutdown", task_pb2.ShutdownRequest(id="c1"), Empty)
        assert service.shutdown_requested.is_set()


@asynchronous
async def test_sandbox_that_cannot_exist_says_why_at_create(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        service = TaskService(HostMissing("there is no kernel at /x; make kernel"))
        async with connected(service) as containerd:
            with pytest.raises(StatusError, match="there is no kernel at /x; make kernel") as caught:
                await containerd.create(p)
            assert code(caught.value) is Code.FAILED_PRECONDITION
            with pytest.raises(StatusError) as caught:
                await containerd.delete()
            assert code(caught.value) is Code.NOT_FOUND
            request = task_pb2.ConnectRequest(id="c1")
            assert (await containerd.call("Connect", request, task_pb2.ConnectResponse)).task_pid == 0
            service.cleaned_up.set()
            await containerd.call("Shutdown", task_pb2.ShutdownRequest(id="c1"), Empty)
            assert service.shutdown_requested.is_set()


# --- translation and status codes


def test_every_error_has_a_code_and_subclasses_come_first() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.ShimError) and kind is not errors.ShimError:
            assert errors.status_code(kind("x")) != errors.UNKNOWN or kind in {errors.GuestError, errors.HookFailed}
    kinds = [kind for kind, _ in errors.STATUS]
    for index, kind in enumerate(kinds):
        assert not any(issubclass(kind, earlier) for earlier in kinds[:index])
    assert errors.status_code(RuntimeError()) == errors.UNKNOWN
    assert {number for _, number in errors.STATUS} <= {int(code) for code in Code}


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_json_that_makes_no_sense_is_refused(value: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the process"):
        translate.json_value(AnyMessage(type_url="x", value=value), "the process")
