"""`ctr` as tests use it: one object that runs commands and containers, and cleans up what a test started."""

import itertools
import os
import re
import secrets
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import pytest

from tests.framework.busybox import NAME as BUSYBOX
from tests.framework.containerd import VERSIONS, Containerd
from tests.framework.terminal import Terminal

PYMICRO = "io.containerd.pymicro.v1"
RUNC = "io.containerd.runc.v2"

# A VM boots in seconds, under emulation on a busy host in tens of seconds.
TIMEOUT = 120.0

EOF_DELAY = 2.0

UNKNOWN_FLAG = re.compile(r"flag provided but not defined: (-\S+)")

Completed = subprocess.CompletedProcess[str]


class Ctr:
    """A client of one containerd. Every method that starts a container takes the runtime, ours by default."""

    def __init__(self, containerd: Containerd, runtime: str = PYMICRO) -> None:
        self.containerd = containerd
        self.runtime = runtime
        self.ids: list[str] = []
        """The ids of all containers that this client named."""
        self._clients: list[subprocess.Popen[bytes]] = []
        self._numbers = itertools.count(1)
        self._prefix = secrets.token_hex(3)

    def __call__(self, *arguments: str, timeout: float = TIMEOUT, check: bool = True) -> Completed:
        """Run `ctr arguments...` without input. Raises ContainerdError (with `check`) and TimeoutExpired."""
        return self.containerd.ctr(*arguments, timeout=timeout, check=check)

    def new_id(self, name: str = "c") -> str:
        """Return an id that no other test uses."""
        self.ids.append(f"{name}-{self._prefix}-{next(self._numbers)}")
        return self.ids[-1]

    def run_arguments(
        self, command: Sequence[str], options: Sequence[str], runtime: str | None, container_id: str | None
    ) -> list[str]:
        """Return the arguments of `ctr` that run the command in a container of the busybox image."""
        return ["run", "--runtime", runtime or self.runtime, *options, BUSYBOX, container_id or self.new_id(), *command]

    def run(
        self,
        *command: str,
        options: Sequence[str] = (),
        runtime: str | None = None,
        stdin: str | None = None,
        timeout: float = TIMEOUT,
        container_id: str | None = None,
    ) -> Completed:
        """Run a container in the foreground, `ctr run --rm`, and return its exit code and output.

        `stdin` ends a moment after its last character: `ctr` loses an EOF that comes before the task exists. A test is
        skipped where the options are newer than this `ctr`.
        """
        arguments = self.run_arguments(command, ["--rm", *options], runtime, container_id)
        done = self.fed(*arguments, stdin=stdin, timeout=timeout)
        if self.containerd.version == VERSIONS[0] and (unknown := UNKNOWN_FLAG.search(done.stderr)):
            pytest.skip(f"ctr run of containerd {VERSIONS[0]} has no -{unknown[1]}")
        return done

    def start(
        self, *command: str, options: Sequence[str] = (), runtime: str | None = None, name: str = "c"
    ) -> "Container":
        """Start a container in the background, without stdio, and return it running."""
        container_id = self.new_id(name)
        self(*self.run_arguments(command, ["--detach", "--null-io", *options], runtime, container_id))
        return Container(self, container_id)

    def popen(
        self, *command: str, options: Sequence[str] = (), runtime: str | None = None, container_id: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `ctr run --rm` with all three streams piped; it is killed after the test if it still runs."""
        return self.client(*self.run_arguments(command, ["--rm", *options], runtime, container_id))

    def client(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `ctr arguments...` with all three streams piped; it is killed after the test if it still runs."""
        client = subprocess.Popen(
            self._argv(*arguments),
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._clients.append(client)
        return client

    def terminal(
        self,
        *command: str,
        options: Sequence[str] = (),
        runtime: str | None = None,
        rows: int = 24,
        columns: int = 80,
        container_id: str | None = None,
    ) -> Terminal:
        """Start `ctr run --rm -t` on a terminal of our own."""
        arguments = self.run_arguments(command, ["--rm", "--tty", *options], runtime, container_id)
        return self.on_terminal(*arguments, rows=rows, columns=columns)

    def on_terminal(self, *arguments: str, rows: int = 24, columns: int = 80) -> Terminal:
        """Start `ctr arguments...` on a terminal of our own."""
        terminal = Terminal(self._argv(*arguments), self._environment(), rows=rows, columns=columns)
        self._clients.append(terminal.process)
        return terminal

    def same_as_runc(self, *command: str, options: Sequence[str] = (), stdin: str | None = None) -> Completed:
        """Run the command with runc and with our runtime, assert that exit code and output agree, and return ours."""
        reference = self.run(*command, options=options, runtime=RUNC, stdin=stdin)
        ours = self.run(*command, options=options, stdin=stdin)
        got = (ours.returncode, ours.stdout, ours.stderr)
        expected = (reference.returncode, reference.stdout, reference.stderr)
        assert got == expected, f"pymicro and runc differ:\n{got}\n{expected}"
        return ours

    def tasks(self) -> dict[str, str]:
        """Return the status of each task by container id, as `ctr task ls` shows it: `RUNNING`, `STOPPED`, ..."""
        rows = [line.split() for line in self("tasks", "ls").stdout.splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    def clean_up(self) -> None:
        """End the clients and everything in the namespace."""
        self.end_clients()
        self.containerd.end_containers()

    def end_clients(self) -> None:
        """End the `ctr` processes that still run."""
        for client in self._clients:
            if client.poll() is None:
                client.kill()
            client.wait()
            for pipe in filter(None, (client.stdin, client.stdout, client.stderr)):
                with suppress(BrokenPipeError):
                    pipe.close()
        self._clients.clear()

    def fed(self, *arguments: str, stdin: str | None, timeout: float = TIMEOUT) -> Completed:
        """Run `ctr` with `stdin` as its input, which ends EOF_DELAY later."""
        if stdin is None:
            return self(*arguments, timeout=timeout, check=False)
        reader, writer = os.pipe()
        ended = threading.Event()

        def feed() -> None:
            with suppress(BrokenPipeError), os.fdopen(writer, "w") as pipe:
                pipe.write(stdin)
                pipe.flush()
                ended.wait(EOF_DELAY)

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            return self.containerd.ctr(*arguments, timeout=timeout, check=False, stdin=reader)
        finally:
            os.close(reader)
            ended.set()
            feeder.join()

    def _argv(self, *arguments: str) -> list[str]:
        return [str(self.containerd.bin / "ctr"), *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.containerd.client_environment}


@dataclass(frozen=True, slots=True)
class Container:
    """A container that was started in the background."""

    ctr: Ctr
    id: str

    @property
    def pid(self) -> int:
        """The task's pid on the host."""
        rows = [line.split() for line in self.ctr("tasks", "ls").stdout.splitlines()[1:]]
        return next(int(row[1]) for row in rows if row[0] == self.id)

    @property
    def status(self) -> str:
        """RUNNING, STOPPED, PAUSED, CREATED, or GONE if containerd knows no task of it."""
        return self.ctr.tasks().get(self.id, "GONE")

    def exec(
        self, *command: str, options: Sequence[str] = (), stdin: str | None = None, exec_id: str = ""
    ) -> Completed:
        """Run a command in it and wait for its end."""
        arguments = ["--exec-id", exec_id or f"x{secrets.token_hex(4)}", *options, self.id, *command]
        return self.ctr.fed("tasks", "exec", *arguments, stdin=stdin)

    def kill(self, signal: str = "SIGKILL", *options: str) -> Completed:
        """Send its first process a signal."""
        return self.ctr("tasks", "kill", "--signal", signal, *options, self.id, check=False)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait until its task ends and return the exit code that `ctr task attach` gives, 128 + n for a signal."""
        return self.ctr("tasks", "attach", self.id, check=False, timeout=timeout).returncode

    def remove(self) -> None:
        """Delete the task, killing it if need be, and the container."""
        self.ctr("tasks", "rm", "--force", self.id, check=False)
        self.ctr("containers", "rm", self.id)
