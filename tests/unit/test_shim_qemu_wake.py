"""Waking QEMU: the order of what it is told, and an error that names the cause for everything that can go wrong."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pymicro.shim.errors import HostMissing, SandboxDied, StepTimeout
from pymicro.shim.hypervisor.base import Boot, Origin, Template
from pymicro.shim.hypervisor.qemu.memory import Filling
from pymicro.shim.hypervisor.qemu.monitor import Monitor, Refused
from pymicro.shim.hypervisor.qemu.vsock import VsockBackend
from pymicro.shim.hypervisor.qemu.wake import Waking
from pymicro.shim.spawn import Child, Place, spawn

from tests.framework.fakes import no_descriptor_leaks

Json = dict[str, Any]
Answers = dict[str, Json | None]
"""By a command's name: QEMU's answer in place of an empty return; None for an end without one."""


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


class Peer:
    """Speaks QEMU's half of the protocol. `commands` are those that came."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.commands: list[str] = []
        self.fds = 0
        self.arguments: dict[str, Json] = {}

    def serve(self, connected: socket.socket) -> None:
        with closing(connected):
            _send(connected, {"event": "BEFORE", "data": {}}, {"QMP": {"version": {}}})
            unread = b""
            while True:
                data, fds, _, _ = socket.recv_fds(connected, 65536, 4)
                self.fds += len(fds)
                for fd in fds:
                    os.close(fd)
                if not data:
                    return
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    self.commands.append(request["execute"])
                    self.arguments[request["execute"]] = request["arguments"]
                    answer = self.answers.get(request["execute"], {"return": {}})
                    if answer is None:
                        return
                    _send(connected, {"event": "MEANWHILE"}, answer)


def _send(connected: socket.socket, *messages: Json) -> None:
    connected.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


@contextmanager
def monitor(answers: Answers, timeout: float = 2) -> Iterator[tuple[Monitor, Peer]]:
    ours, theirs = socket.socketpair()
    peer = Peer(answers)
    thread = threading.Thread(target=peer.serve, args=(theirs,))
    thread.start()
    with closing(Monitor(ours, timeout)) as connected:
        yield connected, peer
    thread.join()


class Nothing(Filling):
    """No template's pages, or an error of copying them."""

    def __init__(self, error: OSError | None = None) -> None:
        self._failure = error

    def wait(self) -> None:
        if self._failure:
            raise self._failure


@contextmanager
def program(script: str, directory: Path, name: str = "qemu") -> Iterator[Child]:
    child = spawn(name, ["/bin/sh", "-c", script], Place(directory))
    try:
        yield child
    finally:
        child.end()


class NoListener:
    """Nobody connects in these tests."""

    def close(self) -> None: ...


def kernel_vsock() -> VsockBackend:
    return VsockBackend(NoListener(), {"driver": "vhost-vsock-pci", "guest-cid": 7})  # type: ignore[arg-type]


def wake(
    directory: Path,
    answers: Answers,
    origin: Origin = Boot(),  # noqa: B008  # frozen
    *,
    script: str = "exec sleep 60",
    vsock: Callable[[Path], VsockBackend] = lambda _: kernel_vsock(),
    filling: Filling | None = None,
    timeout: float = 2,
) -> Peer:
    """Wake a QEMU that is a shell script, over a monitor that answers by `answers`."""
    with program(script, directory) as qemu, monitor(answers, timeout) as (connected, peer):
        Waking(qemu, connected, vsock(directory), timeout).run(origin, filling or Nothing())
    return peer


def template(directory: Path) -> Template:
    (directory / "state").write_bytes(b"state")
    return Template(directory / "memory", directory / "state")


DONE: Answers = {"query-migrate": {"return": {"status": "completed"}}}


def test_the_guest_runs_after_it_has_all(tmp_path: Path) -> None:
    assert wake(tmp_path, {}).commands == ["qmp_capabilities", "device_add", "cont"]
    restored = wake(tmp_path, DONE, template(tmp_path))
    assert restored.commands[1:] == [
        "migrate-set-capabilities",
        "getfd",
        "migrate-incoming",
        "query-migrate",
        "device_add",
        "cont",
    ]
    assert restored.fds == 1
    assert restored.arguments["device_add"]["guest-cid"] == 7


def test_refused_step_is_named(tmp_path: Path) -> None:
    refusal = {"error": {"class": "GenericError", "desc": "no such port"}}
    with pytest.raises(SandboxDied, match="QEMU refused device_add: no such port"):
        wake(tmp_path, {"device_add": refusal})


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_state_that_cannot_be_loaded(tmp_path: Path, status: str) -> None:
    with pytest.raises(SandboxDied, match=rf"could not move the VM's state.*{status}"):
        wake(tmp_path, {"query-migrate": {"return": {"status": status}}}, template(tmp_path))


def test_state_that_is_never_there(tmp_path: Path) -> None:
    answers: Answers = {"query-migrate": {"return": {"status": "active"}}}
    with pytest.raises(StepTimeout, match=r"did not load the VM's state in 0.1 s \(timeouts.vmm\)"):
        wake(tmp_path, answers, template(tmp_path), timeout=0.1)


def test_pages_that_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk on fire"):
        wake(tmp_path, DONE, template(tmp_path), filling=Nothing(OSError("disk on fire")))


def test_qemu_that_ends_says_why(tmp_path: Path) -> None:
    script = "echo no such machine >&2; exit 1"
    with pytest.raises(SandboxDied, match=r"qemu ended with status 1; its last lines: no such machine \(at cont\)"):
        wake(tmp_path, {"cont": None}, script=script)


def test_qemu_that_hangs(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with (
        theirs,
        closing(Monitor(ours, 0.5)) as silent,
        program("echo busy >&2; exec sleep 60", tmp_path) as qemu,
        pytest.raises(StepTimeout, match=r"did not answer its monitor in 0.5 s \(timeouts.vmm\); .*busy"),
    ):
        Waking(qemu, silent, None, 0.5).run(Boot(), Nothing())


def test_qemu_that_is_missing(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    qemu = spawn("qemu", ["/no/such/qemu"], Place(tmp_path))
    with closing(Monitor(ours, 2)) as gone, pytest.raises(HostMissing, match="cannot start qemu as '/no/such/qemu'"):
        Waking(qemu, gone, None, 2).run(Boot(), Nothing())


def test_vsock_program_that_ends_is_named(tmp_path: Path) -> None:
    with (
        program("echo bad cid >&2; exit 3", tmp_path, "vhost-device-vsock") as helper,
        pytest.raises(SandboxDied, match="vhost-device-vsock ended with status 3; its last lines: bad cid"),
    ):
        wake(tmp_path, {}, vsock=lambda home: VsockBackend(NoListener(), {}, helper, home / "never"))  # type: ignore[arg-type]


def test_vsock_program_that_never_listens(tmp_path: Path) -> None:
    with (
        program("exec sleep 60", tmp_path, "vhost-device-vsock") as helper,
        pytest.raises(StepTimeout, match=r"vhost-device-vsock did not create .*/never in 0.1 s \(timeouts.vmm\)"),
    ):
        wake(
            tmp_path,
            {},
            vsock=lambda home: VsockBackend(NoListener(), {}, helper, home / "never"),  # type: ignore[arg-type]
            timeout=0.1,
        )


def test_dead_vsock_program_is_why_qemu_refuses(tmp_path: Path) -> None:
    refusal = {"error": {"class": "GenericError", "desc": "Connection refused"}}
    (tmp_path / "socket").touch()
    with (
        program("exit 4", tmp_path, "vhost-device-vsock") as helper,
        pytest.raises(SandboxDied, match=r"vhost-device-vsock ended with status 4 \(QEMU refused chardev-add: Conn"),
    ):
        wake(
            tmp_path,
            {"chardev-add": refusal},
            vsock=lambda home: VsockBackend(NoListener(), {}, helper, home / "socket"),  # type: ignore[arg-type]
        )


def test_monitor_takes_messages_in_any_pieces() -> None:
    ours, theirs = socket.socketpair()
    with theirs, closing(Monitor(ours, 2)) as connected:
        text = b'{"QMP": {}}\r\n{"return": {}}\r\n{"event": "X"}\r\n{"return": [1, 2]}\r\n'
        sender = threading.Thread(target=lambda: [theirs.send(text[n : n + 1]) for n in range(len(text))])
        sender.start()
        connected.greet()
        assert connected.execute("query") == [1, 2]
        sender.join()


def test_monitor_tells_a_refusal_from_an_end() -> None:
    with monitor({"a": {"error": {"class": "GenericError", "desc": "why not"}}, "b": None}) as (connected, _):
        connected.greet()
        with pytest.raises(Refused, match="why not"):
            connected.execute("a")
        with pytest.raises(EOFError):
            connected.execute("b")
