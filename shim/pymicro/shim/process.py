"""One process of a container, its init or an exec, as containerd sees it: state, stdio, exit."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from enum import IntEnum

from pymicro.shim import guestmessages
from pymicro.shim.agent import AgentClient
from pymicro.shim.answer import KILLED
from pymicro.shim.channel.base import Channel
from pymicro.shim.errors import NotFound, SandboxDied, WrongState
from pymicro.shim.logbinary import LogOwner
from pymicro.shim.requests import Exit, StdioPaths
from pymicro.shim.state import Record
from pymicro.shim.stdio import Stdio
from pymicro.shim.streams import Streams

_PID_MAX = 1 << 22
"""No process has a pid that high (PID_MAX_LIMIT in the kernel's linux/threads.h)."""


def seen_from_host(guest_pid: int) -> int:
    """Return the pid that clients are told of a process in the guest. They may look for it on the host, as `docker top`
    does: they must not find another process.
    """
    return _PID_MAX + guest_pid


class Status(IntEnum):
    """containerd.v1.types.Status."""

    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4


class Process:
    """A process with its stdio. `exec_id` is "" for the init."""

    def __init__(self, container_id: str, exec_id: str, paths: StdioPaths) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.paths = paths
        self.status = Status.CREATED
        self.pid = 0
        self.exit: Exit | None = None
        self.starting = False
        """Whether a Start is under way."""
        self.gate = asyncio.Event()
        """Closed while the guest creates or starts it: an exit is not reported before that has been."""
        self.gate.set()
        self.guest_status: int | None = None
        """The exit status that the guest reported, kept while its last output is on the way."""
        self._exited = asyncio.Event()
        self._stdio: Stdio | None = None
        self._stdin_closed = False
        self._tokens: dict[str, str | None] = {}

    def __repr__(self) -> str:
        return f"<Process {self.container_id}/{self.exec_id or 'init'} {self.status.name} pid={self.pid}>"

    @property
    def guest_id(self) -> dict[str, str | None]:
        """How the agent names it."""
        return {"container": self.container_id, "exec": self.exec_id or None}

    async def open_stdio(
        self, streams: Streams, agent: asyncio.Future[AgentClient], timeout: float, record: Record
    ) -> dict[str, str | None]:
        """Open the client's side and return the tokens for the guest's. Raises as Stdio.open()."""
        owner = LogOwner(self.exec_id or self.container_id, record.facts["namespace"], record)
        stdio = self._stdio = await Stdio.open(self.paths, timeout, owner)
        if self._stdin_closed:
            self.close_stdin_writer()

        def take_stdin(channel: Channel) -> None:
            assert stdio.stdin is not None
            stdio.stdin.connect(channel, lambda count: self._stdin_ended(count, agent))

        self._tokens = {
            "stdin": streams.expect(take_stdin if stdio.stdin else None),
            "stdout": streams.expect(stdio.stdout.start if stdio.stdout else None),
            "stderr": streams.expect(stdio.stderr.start if stdio.stderr else None),
        }
        return self._tokens

    def open_stdin(self) -> None:
        """Begin to read the client's stdin: the process is about to run. Raises InvalidRequest."""
        if self._stdio and self._stdio.stdin:
            self._stdio.stdin.open()

    def _stdin_ended(self, count: int, agent: asyncio.Future[AgentClient]) -> None:
        async def tell() -> None:
            with suppress(NotFound, WrongState, SandboxDied):  # the process has ended meanwhile
                await agent.result().call("close_stdin", {**self.guest_id, "bytes": count})

        if not self._exited.is_set() and agent.done():
            self._closing_stdin = asyncio.create_task(tell(), name="close-stdin")

    def eof(self, stream: str, count: int) -> None:
        """The guest's `stream` ends after `count` bytes."""
        output = (self._stdio.stdout if stream == "stdout" else self._stdio.stderr) if self._stdio else None
        if output is not None:
            output.end_at(count)

    def close_stdin_writer(self) -> None:
        """Close the shim's own writer of stdin's FIFO, also before there is one."""
        self._stdin_closed = True
        if self._stdio and self._stdio.stdin:
            self._stdio.stdin.close_writer()

    async def drain(self, exited: guestmessages.Exit, limit: float) -> None:
        """Bring what the process wrote before its exit to the client, in at most `limit` seconds."""
        if self._stdio is not None:
            await self._stdio.drain(exited.stdout, exited.stderr, limit)

    async def guest_gone(self, limit: float) -> None:
        """The VM is gone: bring what is left of the outputs to the client, in at most `limit` seconds."""
        if self._stdio is not None:
            await self._stdio.drain_rest(limit)

    def forget_failure(self) -> None:
        """Forget an earlier attempt to start it that failed."""
        self.exit = None
        self.guest_status = None
        self._exited.clear()

    def started(self, pid: int) -> None:
        self.pid = pid
        if self.status is Status.CREATED:
            self.status = Status.RUNNING

    def ended(self, status: int) -> None:
        """Record the exit and release the waiters. The first call counts."""
        if self.exit is None:
            self.exit = Exit(status, datetime.now(UTC))
            self.status = Status.STOPPED
            self._exited.set()

    def failed_to_start(self) -> None:
        """Release the waiters of an exec that could not be started; it stays created."""
        self.exit = self.exit or Exit(KILLED, datetime.now(UTC))
        self._exited.set()

    def abandon(self) -> None:
        """It could not be created, or it has been deleted: no exit of it is reported any more."""
        self.status = Status.STOPPED
        self.gate.set()

    async def wait(self) -> Exit:
        """Return how it ended, once it has."""
        await self._exited.wait()
        assert self.exit is not None
        return self.exit

    async def close(self, streams: Streams, limit: float) -> None:
        """Let the outputs end, at most `limit` seconds, then close all stdio and end log binaries. Idempotent."""
        if (stdio := self._stdio) is not None:
            await stdio.closed(limit)
        streams.forget(self._tokens.values())
        if stdio is not None:
            stdio.close()
            await stdio.end_log_binaries()
            self._stdio = None

    def require(self, *wanted: Status) -> None:
        """Raise WrongState unless the process is in one of the states `wanted`."""
        if self.status not in wanted:
            states = " or ".join(status.name.lower() for status in wanted)
            raise WrongState(f"{self._name} is {self.status.name.lower()}, not {states}")

    @property
    def _name(self) -> str:
        return f"exec {self.exec_id!r} of {self.container_id!r}" if self.exec_id else f"task {self.container_id!r}"
