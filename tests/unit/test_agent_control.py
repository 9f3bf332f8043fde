"""Requests in, replies and events out: kinds of errors, order, the end of the connection."""

import _socket
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pymicro.agent import clock, concurrency, control, handlers
from pymicro.agent.container import Container
from pymicro.agent.control import Control
from pymicro.agent.devices import Ports
from pymicro.agent.errors import NotFound, RuntimeFailed
from pymicro.agent.handlers import Agent
from pymicro.agent.memory import Watcher
from pymicro.agent.process import Process
from pymicro.agent.reaper import Reaper
from pymicro.wire import frames, messages

Message = dict[str, Any]

EXEC = {"container": "c", "exec": "e"}


class Host:
    """The other end of a control connection that an agent serves in a thread."""

    def __init__(self) -> None:
        self.socket, guest = socket.socketpair()
        self.socket.settimeout(10)
        self._guest = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, guest.detach())
        self.control = Control(self._guest, 3)
        self.agent = Agent(self.control, Reaper(), Ports())
        self.thread = threading.Thread(target=self.control.serve, args=(self.agent,), daemon=True)
        self.thread.start()

    def send(self, message: Message) -> None:
        self.socket.sendall(frames.encode(message))

    def receive(self) -> Message:
        return frames.decode(self._exactly(frames.payload_size(self._exactly(frames.PREFIX_SIZE))))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, "the agent hung up"
            data += part
        return data

    def ask(self, method: str, params: Message) -> Message:
        self.send({"id": 1, "method": method, "params": params})
        return self.receive()

    def close(self) -> None:
        self.socket.close()
        self.thread.join(10)
        self._guest.close()
        assert not self.thread.is_alive()


def late(method: str) -> Callable[..., None]:
    """Return what starts threads, those of a method a little later than the others."""

    def run_apart(function: Callable[..., None], agent: Agent, request: Message, *more: object) -> None:
        delay = 0.1 if request["method"] == method else 0.0
        threading.Timer(delay, function, (agent, request, *more)).start()

    return run_apart


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def test_hello(host: Host) -> None:
    host.control.say_hello(12)
    hello = host.receive()
    assert hello["hello"] == "control"
    assert hello["version"] == messages.PROTOCOL_VERSION
    assert hello["kernel"] == os.uname().release
    assert hello["boot_ms"] == 12


def test_every_method_of_the_protocol_is_there() -> None:
    names = {"setup", "create", "start", "exec", "signal", "close_stdin", "resize", "pause", "resume", "update"}
    assert set(handlers.METHODS) == names | {"pids", "stats", "delete", "release"}
    assert set(handlers.METHODS) > handlers.INLINE


def test_the_clock_is_the_hosts_at_setup_and_never_set_back_later(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    followed = []
    monkeypatch.setattr(clock, "follow", lambda host_ns, *, back: followed.append((host_ns, back)))
    for number, method in enumerate(("setup", "start", "stats"), start=1):
        host.send({"id": number, "now_ns": number, "method": method, "params": {}})
        host.receive()
    assert followed == [(1, True), (2, False), (3, False)]


def test_unknown_container_is_not_found(host: Host) -> None:
    for method in ("start", "signal", "resize", "delete"):
        reply = host.ask(method, {"container": "c"})
        assert reply == {"id": 1, "error": {"kind": messages.NOT_FOUND, "message": "no container c"}}


def test_unknown_method_is_invalid(host: Host) -> None:
    assert host.ask("fly", {})["error"] == {"kind": messages.INVALID, "message": "no method 'fly'"}


@pytest.mark.parametrize("head", [{"method": {}}, {"method": None}, {"now_ns": "late"}, {"now_ns": 10**30}])
def test_a_head_that_makes_no_sense_ends_nothing(host: Host, head: Message) -> None:
    host.send({"id": 1, "method": "fly", "params": {}, **head})
    assert host.receive()["error"]["kind"] == messages.INVALID
    assert host.ask("fly", {})["error"]["kind"] == messages.INVALID


def test_defect_is_internal_and_told_in_one_line(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(agent: Agent, params: Message) -> Message:
        return {"x": params["missing"]}

    monkeypatch.setitem(handlers.METHODS, "pids", broken)
    error = host.ask("pids", {"container": "c"})["error"]
    assert error["kind"] == messages.INTERNAL
    assert error["message"].startswith("pids: KeyError: 'missing' (")
    assert "test_agent_control.py" in error["message"]
    assert "\n" not in error["message"]
    assert host.ask("start", {"container": "c"})["error"]["kind"] == messages.NOT_FOUND, "it goes on"


def test_slow_request_does_not_hold_up_others(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(agent: Agent, params: Message) -> Message:
        release.wait(10)
        return {}

    monkeypatch.setitem(handlers.METHODS, "pause", slow)
    host.send({"id": 1, "method": "pause", "params": {}})
    host.send({"id": 2, "method": "start", "params": {"container": "c"}})
    assert host.receive()["id"] == 2
    release.set()
    assert host.receive() == {"id": 1, "result": {}}


def test_a_delete_that_follows_an_exec_at_once_keeps_it_from_running(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that was held up reads both at once: one that timed out on the host must not run."""
    killed: list[int] = []

    def launch(process: Process, *_: object) -> None:
        process.pid = 5

    monkeypatch.setattr(concurrency.spare, "run_apart", late("exec"))
    monkeypatch.setattr(Process, "launch", launch)
    monkeypatch.setattr(Process, "watch", lambda *_: None)
    monkeypatch.setattr(Process, "send_signal", lambda process, _: killed.append(process.pid))
    monkeypatch.setattr("pymicro.agent.container.write_json", lambda *_: None)
    container = host.agent.containers["c"] = Container(host.control, Reaper(), Watcher(), "c", {})
    start = {**EXEC, "process": {"args": ["x"]}, "streams": {}, "terminal": False}
    host.send({"id": 1, "method": "exec", "params": start})
    host.send({"id": 2, "method": "delete", "params": {**EXEC, "kill": True}})
    assert host.receive() == {"id": 2, "result": {}}
    assert "given up" in host.receive()["error"]["message"]
    assert (killed, container.execs) == ([5], {})


def test_nobody_is_told_of_the_exit_of_an_exec_that_was_given_up(host: Host) -> None:
    """The host may have started another one of that id meanwhile."""
    process = Process(host.control, host.agent.reaper, "c", "e")
    process.unwanted = True
    process._report(137)
    assert process.reported.happened
    assert "no method" in host.ask("fly", {})["error"]["message"], "nothing else was said"


def test_a_delete_that_follows_a_create_at_once_waits_for_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Create that is given up: the container must not come into being after it was deleted."""
    done: list[str] = []

    monkeypatch.setattr(concurrency.spare, "run_apart", late("create"))
    monkeypatch.setattr(Container, "create", lambda *_: done.append("create"))
    monkeypatch.setattr(Container, "delete", lambda *_: done.append("delete"))
    host.send({"id": 1, "method": "create", "params": {"container": "c", "spec": {}, "streams": {}, "terminal": False}})
    host.send({"id": 2, "method": "delete", "params": {"container": "c"}})
    assert [host.receive()["id"] for _ in range(2)] == [1, 2]
    assert done == ["create", "delete"]


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a workload have taken all threads of the VM but the spare one."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    spare = concurrency.Spare()
    spare.start()
    monkeypatch.setattr(control, "spare", spare)
    monkeypatch.setattr("pymicro.agent.process.spare", spare)
    monkeypatch.setattr(concurrency, "start_new_thread", refuse)


@pytest.mark.usefixtures("no_threads")
def test_a_vm_without_threads_answers_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the loop that reads requests would be the VM's."""

    def fails(*_: object) -> None:
        raise RuntimeFailed("no more of anything")

    monkeypatch.setattr(Container, "create", fails)
    parameters = {"container": "c", "spec": {}, "streams": {}, "terminal": False}
    for _ in range(2):
        assert host.ask("create", parameters)["error"] == {"kind": messages.RUNTIME, "message": "no more of anything"}
    assert host.ask("stats", {"container": "c"})["error"]["kind"] == messages.NOT_FOUND


@pytest.mark.usefixtures("no_threads")
def test_a_vm_without_threads_tells_of_exits_and_goes_on_reaping(host: Host) -> None:
    processes = [Process(host.control, host.agent.reaper, name, None) for name in "ab"]
    processes[0].gate.acquire()  # its Start is being answered
    for process in processes:
        process._take_exit(7)  # in the reaper's thread, on which the answer may depend
    processes[0].gate.release()
    assert [host.receive()["container"] for _ in range(2)] == ["a", "b"]


def test_answers_that_the_host_would_not_take(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the VM for them."""

    def pids(agent: Agent, params: Message) -> Message:
        return {"pids": "x" * frames.MAX_FROM_GUEST}

    def start(agent: Agent, params: Message) -> Message:
        raise NotFound("x" * (2 << 20))

    monkeypatch.setitem(handlers.METHODS, "pids", pids)
    monkeypatch.setitem(handlers.METHODS, "start", start)
    error = host.ask("pids", {})["error"]
    assert error["kind"] == messages.INTERNAL
    assert str(frames.MAX_FROM_GUEST) in error["message"]
    error = host.ask("start", {})["error"]
    assert (error["kind"], len(error["message"])) == (messages.NOT_FOUND, control.LONGEST_MESSAGE)


@pytest.mark.parametrize("started", [True, False])
def test_an_exec_that_the_host_gives_up_does_not_run(
    host: Host, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    container = Container(host.control, Reaper(), Watcher(), "c", {})
    host.agent.containers["c"] = container
    launched, killed = threading.Event(), []

    def launch(process: Process, *_: object) -> None:
        launched.wait(10)
        process.pid = 1 << 30

    monkeypatch.setattr(Process, "launch", launch)
    monkeypatch.setattr(Process, "watch", lambda *_: None)
    monkeypatch.setattr(Process, "send_signal", lambda process, number: killed.append((process.pid, number)))
    monkeypatch.setattr("pymicro.agent.container.write_json", lambda *_: None)
    monkeypatch.setattr("pymicro.agent.container.EXEC_EXIT_LIMIT", 0.01)
    host.send(
        {"id": 1, "method": "exec", "params": {**EXEC, "process": {"args": ["x"]}, "streams": {}, "terminal": False}}
    )
    if started:
        launched.set()
        assert host.receive()["result"] == {"pid": 1 << 30}
    host.send({"id": 2, "method": "delete", "params": {**EXEC, "kill": True}})
    assert host.receive() == {"id": 2, "result": {}}
    launched.set()
    if not started:
        assert "given up" in host.receive()["error"]["message"]
    assert killed == [(1 << 30, 9)]
    assert container.execs == {}


def test_a_delete_that_fails_leaves_the_id_free(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def fail(*_: object, **__: object) -> None:
        raise RuntimeFailed("cannot fork")

    monkeypatch.setattr("pymicro.agent.crun.Crun.run", fail)
    monkeypatch.setattr(Process, "close", lambda process: closed.append(process.container))
    host.agent.containers["c"] = Container(host.control, Reaper(), Watcher(), "c", {})
    assert host.ask("delete", {"container": "c"})["error"] == {"kind": messages.RUNTIME, "message": "cannot fork"}
    assert closed == ["c"]
    assert host.agent.containers == {}


def test_what_follows_a_reply_comes_after_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(agent: Agent, params: Message) -> Any:
        return {"pid": 5}, lambda: agent.control.send({"event": "exit"})

    monkeypatch.setitem(handlers.METHODS, "create", create)
    assert host.ask("create", {}) == {"id": 1, "result": {"pid": 5}}
    assert host.receive() == {"event": "exit"}


def test_large_messages_from_many_threads_stay_whole(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def stats(agent: Agent, params: Message) -> Message:
        return {"files": {"x": params["container"] * 100_000}}

    monkeypatch.setitem(handlers.METHODS, "stats", stats)
    for number in range(10):
        host.send({"id": number, "method": "stats", "params": {"container": str(number)}})
    replies = {reply["id"]: reply for reply in (host.receive() for _ in range(10))}
    assert all(replies[n]["result"]["files"]["x"] == str(n) * 100_000 for n in range(10))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_ids_that_are_no_file_names(host: Host, name: str) -> None:
    params = {"container": name, "spec": {}, "terminal": False, "streams": {}}
    assert host.ask("create", params)["error"]["kind"] == messages.INVALID


def test_serve_returns_when_the_host_hangs_up() -> None:
    Host().close()


def test_not_found_is_an_error_of_its_kind() -> None:
    assert NotFound("x").kind == messages.NOT_FOUND
