"""One process of a container, its init or an exec: stdio, terminal, pid, exit."""

import posix
import time
from _struct import pack
from _thread import allocate_lock
from fcntl import ioctl

from pymicro.agent import console, files
from pymicro.agent.concurrency import Event, log, spare, start_thread
from pymicro.agent.errors import Invalid, NotFound
from pymicro.agent.streams import InputPump, OutputPump, Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Any

    from pymicro.agent.control import Control
    from pymicro.agent.reaper import Reaper
    from pymicro.wire.messages import Streams

CONSOLES = "/run/pymicro"
DRAIN_LIMIT = 2.0
"""Seconds that an exit event waits at most for the host to take what the process has written."""
DRAIN_STEP = 0.005
TIOCSWINSZ = 0x5414


class Process:
    """A process that crun starts for us; it holds its pumps and tells the host of its exit, once."""

    def __init__(self, control: "Control", reaper: "Reaper", container: str, exec_id: "str | None") -> None:
        self.container = container
        self.exec_id = exec_id
        self.pid = 0
        self.reported = Event()
        """The exit event has been sent."""
        self.gate = allocate_lock()
        """Held while a reply about this process is under way: its exit is reported after that."""
        self.exited = False
        self.unwanted = False
        """The host has given it up while it was being started."""
        self._control = control
        self._reaper = reaper
        self._stdin: InputPump | None = None
        self._outputs: dict[str, OutputPump] = {}
        self._console: int | None = None
        self._before_report: Callable[[], object] = bool

    def __repr__(self) -> str:
        name = self.container if self.exec_id is None else f"{self.container}/{self.exec_id}"
        return f"<Process {name} pid={self.pid} {'exited' if self.exited else 'alive'}>"

    def launch(self, streams: "Streams", terminal: bool, directory: str, command: "Callable[..., None]") -> None:
        """Run crun by `command(pid_file, console_socket, stdio)` with the process's stdio and read the pid.

        The streams are dialled when that has worked: what crun itself writes to stderr when it fails is not the
        process's. Nothing is left of it if that raises.
        """
        pid_file = f"{directory}/{'init' if self.exec_id is None else f'exec-{self.exec_id}'}.pid"
        try:
            if terminal:
                # not in the directory: two ids of 64 digits are longer than the name of a socket can be
                self._launch_terminal(streams, f"{CONSOLES}/{id(self):x}.tty", pid_file, command)
            else:
                self._launch_pipes(streams, pid_file, command)
            with open(pid_file, encoding="ascii") as file:
                self.pid = int(file.read())
        except BaseException:
            for pump in self._pumps():
                pump.discard()
            self.close()
            raise
        finally:
            files.unlink(pid_file)
        for pump in self._pumps():
            try:
                start_thread(pump.run)
            except RuntimeError as error:  # the process runs already, and goes on without
                log(f"{self!r} loses a stream: {error}")
                pump.discard()

    def _launch_pipes(self, streams: "Streams", pid_file: str, command: "Callable[..., None]") -> None:
        null = posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)
        theirs = [null]
        try:
            stdio = [null, null, null]
            if streams["stdin"]:
                stdio[0], ours = _pipe()
                theirs.append(stdio[0])
                self._add_input(streams["stdin"], ours)
            for number, stream in ((1, "stdout"), (2, "stderr")):
                token = streams[stream]  # type: ignore[literal-required]  # the two names are right above
                if token:
                    ours, stdio[number] = _pipe()
                    theirs.append(stdio[number])
                    self._add_output(stream, token, ours, terminal=False)
            command(pid_file, "", tuple(stdio))
        finally:
            for fd in theirs:
                posix.close(fd)

    def _launch_terminal(
        self, streams: "Streams", socket_path: str, pid_file: str, command: "Callable[..., None]"
    ) -> None:
        listener = console.listen(socket_path)
        try:
            command(pid_file, socket_path, None)
            master = console.receive(listener)
        finally:
            listener.close()
            files.unlink(socket_path)
        posix.set_blocking(master, False)
        self._console = master
        if streams["stdin"]:
            self._add_input(streams["stdin"], posix.dup(master))
        self._add_output("stdout", streams["stdout"], posix.dup(master), terminal=True)

    def _add_input(self, token: str, local: int) -> None:
        self._stdin = InputPump(lambda given_up: self._control.dial_stream(token, given_up), local)

    def _add_output(self, stream: str, token: "str | None", local: int, *, terminal: bool) -> None:
        def end(count: int) -> None:
            self._send_event("eof", stream=stream, bytes=count)

        def connect(given_up: "Callable[[], bool]") -> "socket | None":
            return self._control.dial_stream(token, given_up) if token else None

        def lives() -> bool:
            return not self.exited

        self._outputs[stream] = OutputPump(connect, local, lives if terminal else None, end)

    def _pumps(self) -> "list[Pump]":
        return [*([self._stdin] if self._stdin else ()), *self._outputs.values()]

    def watch(self, before_report: "Callable[[], object]") -> None:
        """Begin to wait for the exit. `before_report` is called before it is reported."""
        self._before_report = before_report
        self._reaper.watch(self.pid, self._take_exit)

    def _take_exit(self, status: int) -> None:
        self.exited = True
        spare.run_apart(self._report, status)

    def _report(self, status: int) -> None:
        with self.gate:
            pass
        self._before_report()
        deadline = time.monotonic() + DRAIN_LIMIT
        while not all(pump.drained() for pump in self._outputs.values()) and time.monotonic() < deadline:
            time.sleep(DRAIN_STEP)
        counts = {name: self._outputs[name].sent if name in self._outputs else 0 for name in ("stdout", "stderr")}
        if not self.unwanted:  # the host may have started another one of that id meanwhile
            self._send_event("exit", status=status, **counts)
        self.reported.set()

    def _send_event(self, event: str, **fields: "Any") -> None:  # the fields are those of the wire's events
        self._control.send({"event": event, "container": self.container, "exec": self.exec_id, **fields})

    def send_signal(self, number: int) -> None:
        """Raises NotFound if the process has exited, Invalid if the number is no signal's."""
        try:
            alive = self._reaper.send_signal(self.pid, number)
        except OSError as error:
            raise Invalid(f"signal {number} cannot be sent: {error}") from error
        if not alive:
            raise NotFound("process already finished")

    def finish_stdin(self, count: int) -> None:
        """End the process's stdin after `count` bytes; without a stdin there is nothing to end."""
        if self._stdin:
            self._stdin.finish_at(count)

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's size in characters; without a terminal there is nothing to set."""
        if self._console is not None:
            ioctl(self._console, TIOCSWINSZ, pack("HHHH", height, width, 0, 0))

    def close(self) -> None:
        """Cut the streams and close the terminal. Idempotent."""
        for pump in self._pumps():
            pump.abort()
        if self._console is not None:
            posix.close(self._console)
            self._console = None


def _pipe() -> "tuple[int, int]":
    return posix.pipe2(posix.O_CLOEXEC)
