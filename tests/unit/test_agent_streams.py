"""The pumps between pipes and connections: nothing lost, nothing twice, nobody blocked for ever."""

import _socket
import os
import pty
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from pymicro.agent import streams
from pymicro.agent.streams import InputPump, OutputPump, Pump


class Wire:
    """A connection whose far end the test holds."""

    def __init__(self) -> None:
        near, self.host = socket.socketpair()
        self._near = near.detach()
        self.host.settimeout(10)

    def dial(self, _given_up: object = None) -> _socket.socket:
        return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, self._near)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.host.close()


def started(pump: Pump) -> threading.Thread:
    thread = threading.Thread(target=pump.run, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part
        data += part
    return bytes(data)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
    os.close(fd)


def test_output_arrives_and_is_counted(wire: Wire) -> None:
    read, write = os.pipe()
    ends: list[int] = []
    pump = OutputPump(wire.dial, read, lives=None, on_end=ends.append)
    thread = started(pump)
    data = os.urandom(3_000_000)
    writer = threading.Thread(target=write_all, args=(write, data))
    writer.start()
    assert receive(wire.host, len(data)) == data
    writer.join()
    wait_for(lambda: ends == [len(data)])
    assert thread.is_alive(), "the guest closes after the host has"
    wire.host.close()
    thread.join(10)
    assert not thread.is_alive()
    assert pump.sent == len(data)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read)


def test_output_is_held_back_and_not_stored(wire: Wire) -> None:
    read, write = os.pipe()
    pump = OutputPump(wire.dial, read, lives=None, on_end=lambda _: None)
    started(pump)
    os.set_blocking(write, False)
    total = 0
    with pytest.raises(BlockingIOError):
        while True:
            total += os.write(write, bytes(65536))
            time.sleep(0.01)
    assert total < 2_000_000
    assert not pump.drained()
    os.close(write)
    assert len(receive(wire.host, total)) == total
    wait_for(pump.drained)
    assert pump.sent == total


def test_drained_means_counted(wire: Wire) -> None:
    read, write = os.pipe()
    pump = OutputPump(wire.dial, read, lives=None, on_end=lambda _: None)
    started(pump)
    for round_number in range(1, 200):
        os.write(write, b"x" * 100)
        wait_for(pump.drained)
        assert pump.sent == round_number * 100
        assert len(receive(wire.host, 100)) == 100
    os.close(write)


def test_output_goes_on_when_the_host_is_gone(wire: Wire) -> None:
    """The process must not block for ever on a pipe that nobody reads."""
    read, write = os.pipe()
    pump = OutputPump(wire.dial, read, lives=None, on_end=lambda _: None)
    thread = started(pump)
    wire.host.close()
    write_all(write, bytes(1_000_000))
    thread.join(10)
    assert not thread.is_alive()
    assert pump.drained()


def test_dial_that_fails_drops_the_output() -> None:
    def refuse(_given_up: object) -> _socket.socket:
        raise ConnectionRefusedError

    read, write = os.pipe()
    thread = started(OutputPump(refuse, read, lives=None, on_end=lambda _: None))
    write_all(write, bytes(1_000_000))
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("stuck", [False, True])
def test_abort_ends_an_output(wire: Wire, stuck: bool) -> None:
    read, write = os.pipe()
    pump = OutputPump(wire.dial, read, lives=None, on_end=lambda _: None)
    thread = started(pump)
    if stuck:
        os.set_blocking(write, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(write, bytes(65536))
                time.sleep(0.01)
    time.sleep(0.05)
    pump.abort()
    thread.join(10)
    assert not thread.is_alive()
    os.close(write)


def test_terminal_output(wire: Wire) -> None:
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    ends: list[int] = []
    alive = threading.Event()
    started(OutputPump(wire.dial, master, lives=alive.is_set, on_end=ends.append))
    os.write(slave, b"hello\n")
    assert receive(wire.host, 7) == b"hello\r\n"
    os.write(slave, b"x" * 3000)
    os.close(slave)
    assert receive(wire.host, 3000) == b"x" * 3000
    wait_for(lambda: ends == [3007])


@pytest.mark.parametrize("wanted", [True, False])
def test_a_terminal_that_its_process_closes_and_opens_again_goes_on(wire: Wire, wanted: bool) -> None:
    """As systemd does, and whatever writes to /dev/console now and then; unwanted output is read all the same."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    name = os.ttyname(slave)
    alive = threading.Event()
    alive.set()
    ends: list[int] = []
    pump = OutputPump(wire.dial if wanted else lambda _: None, master, lives=alive.is_set, on_end=ends.append)
    thread = started(pump)
    os.write(slave, b"one\n")
    os.close(slave)
    time.sleep(3 * streams.TERMINAL_PAUSE)
    slave = os.open(name, os.O_WRONLY | os.O_NOCTTY)
    write_all(slave, b"x" * 50_000)
    alive.clear()
    if wanted:
        assert receive(wire.host, 5 + 50_000) == b"one\r\n" + b"x" * 50_000
        wait_for(lambda: ends == [5 + 50_000])
        wire.host.close()
    thread.join(10)
    assert not thread.is_alive()


def test_input_ends_at_its_count_told_before(wire: Wire) -> None:
    read, write = os.pipe()
    pump = InputPump(wire.dial, write)
    pump.finish_at(5)
    thread = started(pump)
    wire.host.sendall(b"he")
    time.sleep(0.05)
    wire.host.sendall(b"llo")
    thread.join(10)
    assert os.read(read, 100) == b"hello"
    assert os.read(read, 100) == b""
    assert wire.host.recv(1) == b"", "the guest closes once it has everything"
    os.close(read)


@pytest.mark.parametrize("count", [0, 5])
def test_input_ends_at_its_count_told_after(wire: Wire, count: int) -> None:
    read, write = os.pipe()
    pump = InputPump(wire.dial, write)
    thread = started(pump)
    if count:
        wire.host.sendall(b"hello")
        assert os.read(read, 100) == b"hello"
    time.sleep(0.05)
    pump.finish_at(count)
    thread.join(10)
    assert not thread.is_alive()
    assert os.read(read, 100) == b""
    os.close(read)


def test_input_is_whole(wire: Wire) -> None:
    read, write = os.pipe()
    pump = InputPump(wire.dial, write)
    started(pump)
    data = os.urandom(2_000_000)
    sender = threading.Thread(target=wire.host.sendall, args=(data,))
    sender.start()
    received = bytearray()
    while len(received) < len(data):
        received += os.read(read, 50_000)
    sender.join()
    pump.finish_at(len(data))
    assert os.read(read, 1) == b""
    assert received == data
    os.close(read)


def test_input_that_nobody_reads_is_dropped(wire: Wire) -> None:
    read, write = os.pipe()
    pump = InputPump(wire.dial, write)
    thread = started(pump)
    os.close(read)
    wire.host.sendall(bytes(2_000_000))
    pump.finish_at(2_000_000)
    thread.join(10)
    assert not thread.is_alive()


def test_abort_ends_an_input_that_the_process_does_not_read(wire: Wire) -> None:
    read, write = os.pipe()
    pump = InputPump(wire.dial, write)
    thread = started(pump)
    wire.host.settimeout(0.2)
    with pytest.raises(TimeoutError):
        wire.host.sendall(bytes(10_000_000))
    pump.abort()
    thread.join(10)
    assert not thread.is_alive()
    os.close(read)
