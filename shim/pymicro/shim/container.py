"""A container: its init process, its execs, and what the host holds for it (mounts, cgroup, anchor, stdio)."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec.structs import replace
from pymicro.shim import answer, cgroup, guestmessages
from pymicro.shim.agent import AgentClient
from pymicro.shim.anchor import Anchor
from pymicro.shim.answer import KILLED
from pymicro.shim.containerhooks import ContainerHooks
from pymicro.shim.errors import AlreadyExists, NotFound, SandboxDied, ShimError, StepTimeout, WrongState
from pymicro.shim.events import Publisher
from pymicro.shim.guestmessages import result_of
from pymicro.shim.guestspec import Limits, guest_process, guest_resources, limits_of, require_room
from pymicro.shim.hypervisor.base import VmSpec
from pymicro.shim.process import Process, Status, seen_from_host
from pymicro.shim.requests import Deleted, ExecProcess, ProcessInfo
from pymicro.shim.streams import Streams
from pymicro.shim.unbroken import Turns

logger = logging.getLogger(__name__)

QUICKER = 6
"""How many times sooner than other requests to the guest Pids and Stats are given up: containerd asks one task of the
host after the other, and a guest that hangs is not to hold up the others.
"""
IO_LIMIT = 10.0
"""Seconds that Delete waits for outputs to end: a background child may hold a pipe for ever (shim contract, Delete)."""


class Pod(Protocol):
    """What a container needs of the sandbox it lives in."""

    streams: Streams
    events: Publisher
    drain_limit: float
    vm: VmSpec

    async def agent(self) -> AgentClient: ...  # raises why the sandbox could not start, or SandboxDied
    async def open_stdio(self, process: Process) -> dict[str, str | None]: ...
    def spawn(self, work: Coroutine[Any, Any, object]) -> None: ...


@dataclass
class Container:
    """One container. Operations that clients may call at the same time are safe against each other."""

    id: str
    bundle: str
    init: Process
    pod: Pod
    resources: AsyncExitStack
    hooks: ContainerHooks
    anchor: Anchor = field(init=False)
    cgroups: tuple[str, ...] = ()
    guest_pid: int = 0
    limits: Limits = field(default_factory=Limits)
    """Those that it was created with; the period is the latest."""
    execs: dict[str, Process] = field(default_factory=dict)
    _exec_specs: dict[str, dict[str, Any]] = field(default_factory=dict)
    _deletion: asyncio.Task[Deleted] | None = None
    _dying: bool = False
    _turns: Turns = field(default_factory=Turns)

    @property
    def processes(self) -> Sequence[Process]:
        """All processes, the init last: that is the order in which exits are reported."""
        return (*self.execs.values(), self.init)

    def state(self, process: Process) -> Status:
        """Return what State tells of one of its processes: with the container all that runs in it is paused."""
        paused = process.status is Status.RUNNING and self.init.status is Status.PAUSED
        return Status.PAUSED if paused else process.status

    def process(self, exec_id: str) -> Process:
        """Return the init for "", else the exec. Raises NotFound."""
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFound(f"container {self.id!r} has no exec {exec_id!r}") from None

    async def start(self, exec_id: str) -> int:
        """Start the init or an added exec and return its pid. Raises WrongState, NotFound, GuestError, SandboxDied."""
        process = self.process(exec_id)
        process.require(Status.CREATED)
        self._refuse_starting(process)
        process.starting = True
        process.forget_failure()
        try:
            await (self._start_exec(process) if exec_id else self._start_init())
        finally:
            process.starting = False
            process.gate.set()
        return process.pid

    @staticmethod
    def _refuse_starting(process: Process) -> None:
        if process.starting:
            raise WrongState(f"{process!r} is being started")

    async def _start_init(self) -> None:
        agent = await self.pod.agent()
        self.init.open_stdin()
        self.init.gate.clear()
        await agent.call("start", {"container": self.id})
        self.init.started(self.anchor.pid)
        self.pod.events.started(self.id, self.init.pid)
        try:
            await self.hooks.started(self.init.pid)
        except ShimError:
            await self._stop(agent)
            raise

    async def _stop(self, agent: AgentClient) -> None:
        """End a container that must not run on: a poststart hook has failed (runtime-spec, lifecycle)."""
        with suppress(SandboxDied, WrongState, NotFound, StepTimeout):
            await self._signal(agent, {**self.init.guest_id, "signal": signal.SIGKILL, "all": True})
        self.init.gate.set()
        with suppress(TimeoutError):  # a guest that does not report it is another story, which others tell
            async with asyncio.timeout(IO_LIMIT):
                await self.init.wait()

    async def _start_exec(self, process: Process) -> None:
        try:
            self.init.require(Status.CREATED, Status.RUNNING)
            agent = await self.pod.agent()
            tokens = await self.pod.open_stdio(process)
            process.open_stdin()
            await self._turns.nobodys()  # one that is frozen half way would never have been started
            self.init.require(Status.CREATED, Status.RUNNING)
            process.gate.clear()
            started = await self._start_exec_in_guest(agent, process, tokens)
        except BaseException:
            await process.close(self.pod.streams, 0)
            process.failed_to_start()
            raise
        process.started(seen_from_host(started.pid))
        self.pod.events.exec_started(self.id, process.exec_id, process.pid)

    async def _start_exec_in_guest(
        self, agent: AgentClient, process: Process, streams: dict[str, str | None]
    ) -> guestmessages.Started:
        exec_ = {"container": self.id, "exec": process.exec_id}
        terminal = process.paths.terminal
        # the request decides: clients pass the container's own process on, as with containerd's runc shim
        # (cmd/containerd-shim-runc-v2/process/init.go)
        wanted = {**guest_process(self._exec_specs[process.exec_id]), "terminal": terminal}
        try:
            reply = await agent.call("exec", {**exec_, "process": wanted, "terminal": terminal, "streams": streams})
        except StepTimeout:  # it must not run later, when nobody knows of it
            self.pod.spawn(_quietly(agent.call("delete", {**exec_, "kill": True})))
            raise
        return result_of("exec", reply, guestmessages.Started)

    def add_exec(self, request: ExecProcess) -> None:
        """Register an exec, to be started later. Raises AlreadyExists, and WrongState, as in a paused container."""
        if request.exec_id in self.execs:
            raise AlreadyExists(f"container {self.id!r} has an exec {request.exec_id!r} already")
        self.init.require(Status.CREATED, Status.RUNNING)
        self.execs[request.exec_id] = Process(self.id, request.exec_id, request.stdio)
        self._exec_specs[request.exec_id] = request.spec
        self.pod.events.exec_added(self.id, request.exec_id)

    async def exited(self, process: Process, event: guestmessages.Exit) -> None:
        """Take the agent's exit event: output first, then TaskExit, then the waiters."""
        await process.drain(event, self.pod.drain_limit)
        if process is self.init:
            for other in list(self.execs.values()):  # clients may add and delete some meanwhile
                if other.guest_status is None:
                    await self._report_exit(other, KILLED)
                else:
                    await other.wait()  # its own last output is on the way
        await self._report_exit(process, event.status)

    async def lost(self) -> None:
        """The VM is gone, and every process of the container with it. What they wrote arrives before their exits."""
        await asyncio.gather(*(process.guest_gone(self.pod.drain_limit) for process in self.processes))
        for process in self.processes:
            await self._report_exit(process, KILLED)

    async def _report_exit(self, process: Process, status: int) -> None:
        await process.gate.wait()
        if process.status is Status.STOPPED:
            return
        if process.exec_id and process.status is Status.CREATED:
            process.failed_to_start()
            return
        if process is self.init:
            self.anchor.end()
        process.ended(status if process.guest_status is None else process.guest_status)
        assert process.exit is not None
        pid = process.pid or self.anchor.pid
        if process is self.init:
            answer.leave_exit(self.bundle, process.exit.status, process.exit.at_ns, pid)
        self.pod.events.exited(self.id, process.exec_id, pid, process.exit)

    async def kill(self, exec_id: str, number: int, *, everything: bool) -> None:
        """Send a signal. Raises NotFound when the process has exited, WrongState for an unstarted exec.

        A process that is being created or started gets it afterwards: half made, it might never hear of it.
        """
        process = self.process(exec_id)
        await process.gate.wait()
        if process.status is Status.STOPPED:
            raise NotFound(f"process already finished: {process!r}")
        if exec_id:
            process.require(Status.RUNNING)
        params = {**process.guest_id, "signal": number, "all": everything and not exec_id}
        try:
            agent = await self.pod.agent()
            await self._signal(agent, params)
        except WrongState as error:  # it has exited, and its exit event is on the way
            raise NotFound(f"process already finished: {error}") from error
        except SandboxDied as error:  # it is dead with its VM: who kills waits for the exit, which is being reported
            logger.debug("%r: no signal %d: %s", process, number, error)

    async def _signal(self, agent: AgentClient, params: dict[str, Any]) -> None:
        """Have the guest send a signal. A guest that does not take a SIGKILL for its container, or says that it did and
        tells of no exit, loses its VM.
        """
        deadly = params["signal"] == signal.SIGKILL and not params["exec"]
        if deadly and not self._dying:
            self._dying = True
            self.pod.spawn(self._must_end(agent))
        try:
            await agent.call("signal", params)
        except StepTimeout as error:
            if not deadly:
                raise
            logger.error("%s hangs, its VM is ended: %s", self.id, error)  # noqa: TRY400  # the message says it all
            await agent.close()

    async def _must_end(self, agent: AgentClient) -> None:
        """End the VM unless the guest tells of the init's exit in the time that it has for an answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(agent.timeout + self.pod.drain_limit):
                await self.init.wait()
                return
        logger.error("%s was killed %g s ago and has not ended, its VM is ended", self.id, agent.timeout)
        await agent.close()

    async def pause(self) -> None:
        """Freeze every process. Raises WrongState."""
        await self._turns.take(self._pause)

    async def _pause(self) -> None:
        self.init.require(Status.RUNNING)
        for process in list(self.execs.values()):  # those that are being started
            await process.gate.wait()
        await (await self.pod.agent()).call("pause", {"container": self.id})
        if self.init.status is Status.RUNNING:  # it may have been killed meanwhile
            self.init.status = Status.PAUSED
        self.pod.events.paused(self.id)

    async def resume(self) -> None:
        """Thaw every process. Raises WrongState."""
        await self._turns.take(self._resume)

    async def _resume(self) -> None:
        self.init.require(Status.PAUSED)
        await (await self.pod.agent()).call("resume", {"container": self.id})
        if self.init.status is Status.PAUSED:
            self.init.status = Status.RUNNING
        self.pod.events.resumed(self.id)

    async def pids(self) -> list[ProcessInfo]:
        """Return all processes: the init by its anchor's pid, others by pids that no process of the host can have."""
        if self.init.status is Status.STOPPED:
            return []
        try:
            reply = await self._ask("pids")
        except StepTimeout:  # containerd 2.1 and 2.2 forget a task that does not answer this when they start
            return [ProcessInfo(self.anchor.pid)]
        found = result_of("pids", reply, guestmessages.Pids)
        execs = {pid: exec_id for exec_id, pid in found.execs.items()}
        others = [ProcessInfo(seen_from_host(pid), execs.get(pid, "")) for pid in found.pids if pid != found.init]
        return [ProcessInfo(self.anchor.pid), *others]

    async def resize(self, exec_id: str, width: int, height: int) -> None:
        """Set a terminal's size; without a terminal nothing happens, nor to an init that has stopped: clients resize
        right after Start, and it may have been quick. Raises WrongState for a stopped exec.
        """
        process = self.process(exec_id)
        if exec_id:
            process.require(Status.CREATED, Status.RUNNING)
        running = process.status is Status.RUNNING or (process is self.init and process.status is not Status.STOPPED)
        if process.paths.terminal and running:
            await (await self.pod.agent()).call("resize", {**process.guest_id, "width": width, "height": height})

    async def update(self, resources: dict[str, Any]) -> None:
        """Apply new limits, those of the latest call last. Raises WrongState for a stopped container, Unsupported where
        the VM is too small.
        """
        await self._turns.take(lambda: self._update(resources))

    async def _update(self, resources: dict[str, Any]) -> None:
        self.init.require(Status.CREATED, Status.RUNNING, Status.PAUSED)
        wanted = limits_of(resources, self.limits)
        require_room(wanted, self.limits, self.pod.vm)
        params = {"container": self.id, "resources": guest_resources(resources)}
        await (await self.pod.agent()).call("update", params)
        cgroup.write_limits(self.cgroups, resources)
        self.limits = replace(self.limits, period=wanted.period)

    async def stats(self) -> dict[str, str]:
        """Return the texts of the container's cgroup files in the guest, by name."""
        return result_of("stats", await self._ask("stats"), guestmessages.Stats).files

    async def _ask(self, method: str) -> dict[str, Any]:
        """Ask the guest what others are waiting behind: see QUICKER."""
        agent = await self.pod.agent()
        return await agent.call(method, {"container": self.id}, agent.timeout / QUICKER)

    async def delete_exec(self, exec_id: str) -> Deleted:
        """Forget a stopped or never started exec. Raises WrongState while it runs."""
        process = self.process(exec_id)
        process.require(Status.STOPPED, Status.CREATED)
        self._refuse_starting(process)
        started = process.pid != 0
        await process.close(self.pod.streams, IO_LIMIT if started else 0)
        if started:
            with suppress(ShimError):  # the guest forgets it with its container, at the latest
                await (await self.pod.agent()).call("delete", {"container": self.id, "exec": exec_id})
        process.ended(0)
        self.execs.pop(exec_id, None)
        self._exec_specs.pop(exec_id, None)
        return Deleted(process.pid, process.exit if started else None)

    async def delete(self) -> Deleted:
        """Free everything the container has, once: a second call answers the same. Raises WrongState while it runs."""
        if self._deletion is None:
            self.init.require(Status.STOPPED, Status.CREATED)
            self._refuse_starting(self.init)
            self._deletion = asyncio.create_task(self._delete(), name=f"delete {self.id}")
        return await asyncio.shield(self._deletion)

    async def _delete(self) -> Deleted:
        created = self.init.status is Status.CREATED
        self.init.ended(0)  # from now on nothing can be started in it
        for exec_id in list(self.execs):
            with suppress(NotFound, WrongState):
                await self.delete_exec(exec_id)
        await self.init.close(self.pod.streams, 0 if created else IO_LIMIT)
        deleted = Deleted(self.init.pid or self.anchor.pid, self.init.exit if not created else None)
        try:
            await self.resources.aclose()
        finally:
            for process in list(self.execs.values()):  # those of a container that was never started ran until now
                await self._report_exit(process, KILLED)
                await process.close(self.pod.streams, 0)
            self.pod.events.deleted(self.id, deleted.pid, deleted.exit)
        return deleted

    async def free(self) -> None:
        """Free what it has at the end of its sandbox, unless Delete is doing that: then return when it has."""
        if self._deletion is not None:
            await asyncio.wait([self._deletion])
        await self.resources.aclose()

    def anchor_died(self) -> None:
        """Somebody killed the task's host pid: that means the container."""
        logger.warning("the anchor of %s was killed; killing the container", self.id)
        if self.init.status is not Status.STOPPED:
            self.pod.spawn(self.kill("", signal.SIGKILL, everything=True))


async def _quietly(call: Awaitable[object]) -> None:
    """Await what matters only if the guest can do it."""
    with suppress(ShimError):
        await call
