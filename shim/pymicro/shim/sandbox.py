"""A sandbox: one VM with its helpers, and the containers in it."""

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack, closing, suppress
from typing import Any

from msgspec.structs import replace
from pymicro.shim import anchor, cgroup, guestmessages, guestspec
from pymicro.shim.agent import AgentClient
from pymicro.shim.boot import Booted, boot, setup_message
from pymicro.shim.bundle import Bundle
from pymicro.shim.container import Container
from pymicro.shim.containerhooks import ContainerHooks
from pymicro.shim.errors import AlreadyExists, InvalidRequest, NotFound, SandboxDied, ShimError
from pymicro.shim.events import Publisher
from pymicro.shim.folder import Folder
from pymicro.shim.guestmessages import result_of
from pymicro.shim.ignition import Ignition
from pymicro.shim.mounting import has_device
from pymicro.shim.process import KILLED, Process
from pymicro.shim.requests import CreateContainer, Deleted
from pymicro.shim.state import Record
from pymicro.shim.streams import Streams
from pymicro.shim.timeline import Timeline

logger = logging.getLogger(__name__)

_VM_ENDS = 1.0
"""Seconds in which a VM ends whose agent's connection has broken because of that."""
_AUTOPSY = 3.0
"""Seconds that an error waits for the cause of the VM's death."""


class Sandbox:
    """One pod. Its VM is on its way already, while containerd still prepares its Create request."""

    def __init__(
        self, sandbox_id: str, ignition: Ignition, record: Record, events: Publisher, timeline: Timeline
    ) -> None:
        """Bring up the VM that `ignition` has started; the place and the record are this sandbox's from now on."""
        self.id = sandbox_id
        self.settings = settings = ignition.plan.settings
        self.events = events
        self.streams = Streams()
        self.drain_limit = settings.timeouts.drain
        self.containers: dict[str, Container] = {}
        self._creating: dict[str, asyncio.Task[Container]] = {}
        self._undoing: set[str] = set()
        """Of those the ones that have failed or were given up: nobody disturbs what they undo."""
        self._folders = itertools.count(1)
        self._timeline = timeline
        self._timelines: dict[str, Timeline] = {}
        self._agent: asyncio.Future[AgentClient] = asyncio.get_running_loop().create_future()
        self._death: SandboxDied | None = None
        self._died = asyncio.Event()
        self._guest_runs = asyncio.Event()
        self._tasks: set[asyncio.Task[object]] = set()
        self._record = record
        self._ending = False
        self._place = ignition.place
        self._life = asyncio.create_task(self._live(ignition), name="sandbox")
        # not only in the task: one that is cancelled before its first step frees nothing
        self._life.add_done_callback(lambda _: ignition.close())

    def __repr__(self) -> str:
        condition = "dead" if self._death else "up" if self._agent.done() else "booting"
        return f"<Sandbox {self.id} {condition} containers={list(self.containers)}>"

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Run `work` beside everything else; a failure is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("%s failed", task.get_coro(), exc_info=error)

    async def agent(self) -> AgentClient:
        """Return the agent once the VM is up. Raises why it could not start, or SandboxDied."""
        agent = await asyncio.shield(self._agent)
        if self._death is not None:
            raise self._death
        return agent

    async def guest_runs(self, limit: float) -> None:
        """Return when the guest runs, or never will, or after `limit` seconds: then there is time for more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._guest_runs.wait()

    async def open_stdio(self, process: Process) -> dict[str, str | None]:
        """Open the stdio of `process`; return its stream tokens. Raises as Stdio.open()."""
        return await process.open_stdio(self.streams, self._agent, self.settings.timeouts.request, self._record)

    # --- the VM's life

    async def _live(self, ignition: Ignition) -> None:
        """Boot, watch, and take the VM down; in every case nobody waits for it afterwards."""
        reason: ShimError = SandboxDied(f"sandbox {self.id!r} was stopped")
        try:
            with closing(ignition):
                runs = self._guest_runs.set
                async with boot(ignition, self.streams.claim, self._note, self._timeline, runs) as booted:
                    reason = await self._run(booted, ignition.plan.bundle)
                    logger.error("sandbox %s: %s", self.id, reason)
        except ShimError as error:
            reason = error
            logger.error("sandbox %s cannot run: %s", self.id, reason)  # noqa: TRY400  # the message says it all
        except asyncio.CancelledError:
            pass
        except Exception as error:
            logger.exception("sandbox %s failed", self.id)
            reason = ShimError(f"{type(error).__name__}: {error}")
        finally:
            self._death = reason if isinstance(reason, SandboxDied) else SandboxDied(str(reason))
            self._died.set()
            self._guest_runs.set()
            if not self._agent.done():
                self._agent.set_exception(reason)
                self._agent.exception()  # it may be that nobody asks
        await asyncio.gather(*(container.lost() for container in self.containers.values()))

    async def _run(self, booted: Booted, bundle: Bundle) -> SandboxDied:
        """Take the VM into use; return why it is dead."""
        agent = AgentClient(booted.control, self._on_event, self.settings.timeouts.request)
        try:
            hostname = str(bundle.spec.get("hostname") or self.id)[:64]
            begun = time.monotonic_ns()
            try:
                await agent.call("setup", setup_message(hostname), self.settings.timeouts.hello)
                self._timeline.span("setup", begun)
            except SandboxDied:
                raise await self._watch(booted, agent) from None
            self._agent.set_result(agent)
            return await self._watch(booted, agent)
        finally:
            await agent.close()

    async def _watch(self, booted: Booted, agent: AgentClient) -> SandboxDied:
        """Return why the sandbox is dead: whichever piece went first."""
        waits = [asyncio.create_task(wait) for wait in (booted.gone(), agent.wait_closed())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not waits[0].done():  # a dead VM breaks the agent's connection too, and its last words say more
                await asyncio.wait(waits[:1], timeout=_VM_ENDS)
            if waits[0].done():
                return SandboxDied(str(waits[0].result()))
            last_said = " | ".join(booted.vm.console()[-5:]) or "none"
            return SandboxDied(f"{agent.ended}, but its VM goes on; the console's last lines: {last_said}")
        finally:
            for wait in waits:
                wait.cancel()

    def _note(self, **facts: Any) -> None:
        """Record facts in the run directory, before they are true."""
        self._record.note(**facts, containers=sorted({*self.containers, *self._creating}))

    def _on_event(self, event: guestmessages.Event) -> None:
        container = self.containers.get(event.container)
        if container is None:
            logger.debug("an event of an unknown container: %s", event)
            return
        if not isinstance(event, guestmessages.Exit | guestmessages.Eof):
            self.events.out_of_memory(container.id)
            return
        try:
            process = container.process(event.exec or "")
        except NotFound:
            logger.debug("an event of an unknown exec: %s", event)
            return
        if isinstance(event, guestmessages.Eof):
            process.eof(event.stream, event.bytes)
        elif process.guest_status is None:  # it ends once
            process.guest_status = event.status
            self.spawn(container.exited(process, event))

    # --- containers

    @property
    def idle(self) -> bool:
        """Whether no container is left, nor one on its way."""
        return not self.containers and not self._creating

    def container(self, container_id: str) -> Container:
        """Return a container. Raises NotFound."""
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFound(f"no container {container_id!r} in sandbox {self.id!r}") from None

    async def create_container(self, request: CreateContainer) -> Container:
        """Create a container up to the point where its process waits to be started; on failure nothing of it is
        left.
        """
        if request.id in self.containers or request.id in self._creating:
            raise AlreadyExists(f"container {request.id!r} exists already")
        creation = asyncio.create_task(self._create(request, time.monotonic_ns()), name=f"create {request.id}")
        self._creating[request.id] = creation
        creation.add_done_callback(lambda _: self._created(request.id))
        try:
            return await creation
        except SandboxDied as error:
            raise await self._cause(error) from error
        except asyncio.CancelledError:
            if creation.cancelled() and (task := asyncio.current_task()) and not task.cancelling():
                raise NotFound(f"container {request.id!r} was deleted while it was created") from None
            raise

    async def _cause(self, error: SandboxDied) -> SandboxDied:
        """Return why the VM died, which is known a moment after the agent's connection has broken; else `error`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_AUTOPSY):
                await self._died.wait()
        return self._death or error

    async def _create(self, request: CreateContainer, begun: int) -> Container:
        stack = AsyncExitStack()
        try:
            return await self._build(request, Bundle.load(request.bundle), stack, begun)
        except BaseException:
            self._undoing.add(request.id)
            await stack.aclose()
            raise

    def _created(self, container_id: str) -> None:
        del self._creating[container_id]
        self._undoing.discard(container_id)

    async def _give_up_creating(self, *container_ids: str) -> None:
        """Return when the creations of these containers are undone."""
        creations = [self._creating[each] for each in container_ids]
        for container_id in container_ids:
            if container_id not in self._undoing:
                self._undoing.add(container_id)
                self._creating[container_id].cancel()
        if creations:
            await asyncio.wait(creations)

    async def _build(self, request: CreateContainer, bundle: Bundle, stack: AsyncExitStack, begun: int) -> Container:
        # never used twice: for a second the guest remembers what an earlier container of this id had there
        number = next(self._folders)
        name = f"{number}-{request.id}"
        limit = self.settings.timeouts.hook
        plan = guestspec.build(
            bundle.spec,
            request.id,
            self._guest_pids(),
            folder=name,
            hook_limit=limit,
            host_pid=self.settings.vm.host_pid,
        )
        if plan.terminal != request.stdio.terminal:
            asked = "a terminal" if request.stdio.terminal else "no terminal"
            raise InvalidRequest(
                f"{asked} is asked for, but process.terminal in the spec is {str(plan.terminal).lower()}"
            )
        if plan.dropped:
            logger.debug("%s: left out of the spec: %s", request.id, ", ".join(plan.dropped))
        hooks = ContainerHooks(request.id, bundle, plan.hooks, self._record, limit)
        stack.callback(self.containers.pop, request.id, None)  # the last thing: who deletes it meanwhile waits for that
        stack.push_async_callback(hooks.deleted)  # then nothing of the container is left
        process = Process(request.id, "", request.stdio)
        process.gate.clear()
        stack.callback(process.abandon)
        stack.callback(process.ended, KILLED)  # who waits for what is given up; one that is deleted has its exit
        streams = await self.open_stdio(process)
        stack.push_async_callback(process.close, self.streams, 0)
        if self._death is not None:  # the place is gone, and its descriptors may be other files by now
            await self.agent()  # raises why
        groups = self._make_cgroup(request.id, bundle, stack)
        folder = Folder(str(self._place.directory / "share" / name))
        stack.callback(folder.remove)
        if any(has_device(mount) for mount in request.rootfs):
            stack.push_async_callback(self._let_go, request.id, folder, plan.spec["root"]["path"])
        folder.mount(request, plan)
        timeline = self._timeline if number == 1 else Timeline(begun)  # only the first one's start includes the VM's
        self._timelines[request.id] = timeline
        stack.callback(self._timelines.pop, request.id)
        mounted = timeline.span("rootfs", begun)

        container = Container(request.id, request.bundle, process, self, stack, hooks, cgroups=groups)
        container.anchor = anchor.start(folder.root, replace(self._place, cgroups=groups), container.anchor_died)
        stack.callback(container.anchor.end)
        self.containers[request.id] = container

        await hooks.creating(container.anchor.pid)
        mounted = timeline.span("hooks", mounted) if plan.hooks != guestspec.HostHooks() else mounted
        agent = await self.agent()
        up = timeline.span("wait_for_vm", mounted)
        stack.push_async_callback(self._delete_in_guest, request.id)
        terminal = request.stdio.terminal
        params = {"container": request.id, "spec": plan.spec, "terminal": terminal, "streams": streams}
        container.guest_pid = result_of("create", await agent.call("create", params), guestmessages.Started).pid
        timeline.span("create", up)
        self.events.created(request, container.anchor.pid)
        process.gate.set()
        return container

    def _guest_pids(self) -> dict[int, int]:
        """By task pid (an anchor's, on the host) the pid of the container's init in the guest."""
        return {
            container.anchor.pid: container.guest_pid for container in self.containers.values() if container.guest_pid
        }

    def _make_cgroup(self, container_id: str, bundle: Bundle, stack: AsyncExitStack) -> tuple[str, ...]:
        groups = cgroup.directories(cgroup.relative_path(bundle.cgroups_path, f"pymicro/{container_id}"))
        self._note(container_cgroups=sorted({*self._record.facts.get("container_cgroups", ()), *groups}))
        stack.callback(self._remove_cgroup, groups)
        cgroup.create(groups)
        cgroup.write_limits(groups, bundle.resources)
        return groups

    def _remove_cgroup(self, groups: tuple[str, ...]) -> None:
        gone = set(groups).difference(cgroup.remove(groups))
        self._record.forget(container_cgroups=sorted(set(self._record.facts["container_cgroups"]) - gone))

    def _ends_with(self, container_id: str) -> bool:
        """Take the VM down if this container, which is being deleted, is the last: that is quicker than crun. Tell
        whether it is.
        """
        if self.containers.keys() != {container_id} or self._creating:
            return False
        self._end()
        return True

    async def _let_go(self, container_id: str, folder: Folder, in_guest: str) -> None:
        """Unmount a file system that is the container's alone before Delete answers: clients may mount it elsewhere
        then, and it must not be mounted twice. A guest that remembers files keeps it.
        """
        if not self._ends_with(container_id) and self._agent.done():
            with suppress(ShimError):
                await (await self.agent()).call("release", {"path": in_guest})
        await folder.let_go()

    async def _delete_in_guest(self, container_id: str) -> None:
        if self._ends_with(container_id):
            return
        with suppress(ShimError):  # whatever the guest says, the host's part is freed
            await (await self.agent()).call("delete", {"container": container_id})

    async def start(self, container_id: str, exec_id: str) -> int:
        """Start a container's init or exec; return its pid."""
        begun = time.monotonic_ns()
        container, timeline = self.container(container_id), self._timelines[container_id]
        try:
            pid = await container.start(exec_id)
        except SandboxDied as error:
            raise await self._cause(error) from error
        if not exec_id:
            timeline.span("start", begun)
            timeline.log(container_id, sandbox=self.id)
        return pid

    async def delete_container(self, container_id: str) -> Deleted:
        """Free a container; the VM begins to go down with the last one. One that is being created is given up, which
        is NotFound: a client that did not wait for Create's answer asks for that (shim contract, Create).
        """
        if container_id in self._creating:
            await self._give_up_creating(container_id)
            self._end_if_idle()
        container = self.container(container_id)
        try:
            return await container.delete()
        finally:
            if container_id not in self.containers:
                self._end_if_idle()
                self._record.forget(containers=sorted({*self.containers, *self._creating}))

    def _end_if_idle(self) -> None:
        if self.idle:
            self._end()

    def _end(self) -> None:
        """Begin to take the VM down; a second call must not disturb the first."""
        if not self._ending:
            self._ending = True
            self._life.cancel()

    async def stop(self) -> None:
        """Take the VM down and free everything. Idempotent."""
        self._end()
        await asyncio.wait([self._life])
        await self._give_up_creating(*self._creating)
        while self._tasks:
            await asyncio.wait(self._tasks)
        for container in list(self.containers.values()):
            await container.free()
        self.containers.clear()
