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


def test_a_delete_that_follows_a_create_at_once_waits_for_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Create that is given up: the container must not come into being after it was deleted."""
    done: list[str] = []

    def creating_late(function: Callable[..., None], agent: Agent, request: Message, *more: object) -> None:
        delay = 0.1 if request["method"] == "create" else 0.0
        threading.Timer(delay, function, (agent, request, *more)).start()

    monkeypatch.setattr(control, "run_apart", creating_late)
    monkeypatch.setattr(Container, "create", lambda *_: done.append("create"))
    monkeypatch.setattr(Container, "delete", lambda *_: done.append("delete"))
    host.send({"id": 1, "method": "create", "params": {"container": "c", "spec": {}, "streams": {}, "terminal": False}})
    host.send({"id": 2, "method": "delete", "params": {"container": "c"}})
    assert [host.receive()["id"] for _ in range(2)] == [1, 2]
    assert done == ["create", "delete"]


def test_a_vm_without_threads_answers_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workload may have taken them all; the end of this loop would be the VM's."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(concurrency, "start_new_thread", refuse)
    monkeypatch.setattr(Container, "create", refuse)
    parameters = {"container": "c", "spec": {}, "streams": {}, "terminal": False}
    for _ in range(2):
        assert "can't start new thread" in host.ask("create", parameters)["error"]["message"]
    assert host.ask("stats", {"container": "c"})["error"]["kind"] == messages.NOT_FOUND


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
