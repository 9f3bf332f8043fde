"""A sandbox: one VM with its helpers, and the containers in it."""

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any

from msgspec.structs import replace
from pymicro.shim import anchor, answer, cgroup, guestmessages, guestspec, oom
from pymicro.shim.agent import AgentClient
from pymicro.shim.answer import KILLED
from pymicro.shim.bundle import Bundle
from pymicro.shim.container import Container
from pymicro.shim.containerhooks import ContainerHooks
from pymicro.shim.errors import AlreadyExists, InvalidRequest, NotFound, SandboxDied, ShimError
from pymicro.shim.events import Publisher
from pymicro.shim.folder import Folder
from pymicro.shim.guest import Guest
from pymicro.shim.guestmessages import result_of
from pymicro.shim.ignition import Ignition
from pymicro.shim.mounting import has_device
from pymicro.shim.process import Process
from pymicro.shim.requests import CreateContainer, Deleted
from pymicro.shim.state import Record
from pymicro.shim.streams import Streams
from pymicro.shim.timeline import Timeline

logger = logging.getLogger(__name__)


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
        self.vm = ignition.plan.spec
        self.containers: dict[str, Container] = {}
        self._creating: dict[str, asyncio.Task[Container]] = {}
        self._undoing: set[str] = set()
        """Of those the ones that have failed or were given up: nobody disturbs what they undo."""
        self._folders = itertools.count(1)
        self._oom_score: int | None = None
        self._timeline = timeline
        self._timelines: dict[str, Timeline] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._record = record
        self._place = ignition.place
        self.guest = Guest(
            sandbox_id,
            ignition,
            timeline,
            take_stream=self.streams.claim,
            note=self._note,
            on_event=self._on_event,
            on_death=self._lost,
        )

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {self.guest!r} containers={list(self.containers)}>"

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
        return await self.guest.agent()

    async def open_stdio(self, process: Process) -> dict[str, str | None]:
        """Open the stdio of `process`; return its stream tokens. Raises as Stdio.open()."""
        return await process.open_stdio(
            self.streams, self.guest.connected, self.settings.timeouts.request, self._record
        )

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

    async def _lost(self) -> None:
        await asyncio.gather(*(container.lost() for container in self.containers.values()))

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
            raise await self.guest.cause(error) from error
        except asyncio.CancelledError:
            if creation.cancelled() and (task := asyncio.current_task()) and not task.cancelling():
                raise NotFound(f"container {request.id!r} was deleted while it was created") from None
            raise

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
            logger.info("%s: left out, a VM has no part in it: %s", request.id, ", ".join(plan.dropped))
        hooks = ContainerHooks(request.id, bundle, plan.hooks, self._record, limit)
        stack.callback(self.containers.pop, request.id, None)  # the last thing: who deletes it meanwhile waits for that
        stack.push_async_callback(hooks.deleted)  # then nothing of the container is left
        process = Process(request.id, "", request.stdio)
        process.gate.clear()
        stack.callback(process.abandon)
        stack.callback(process.ended, KILLED)  # who waits for what is given up; one that is deleted has its exit
        streams = await self.open_stdio(process)
        stack.push_async_callback(process.close, self.streams, 0)
        if self.guest.death is not None:  # the place is gone, and its descriptors may be other files by now
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
        container.limits = guestspec.limits_of(bundle.resources, container.limits)
        container.anchor = anchor.start(folder.root, replace(self._place, cgroups=groups), container.anchor_died)
        stack.callback(container.anchor.end)
        answer.leave_pid(request.bundle, container.anchor.pid)
        self.containers[request.id] = container

        await hooks.creating(container.anchor.pid)
        mounted = timeline.span("hooks", mounted) if plan.hooks != guestspec.HostHooks() else mounted
        agent = await self.agent()
        up = timeline.span("wait_for_vm", mounted)
        self._adjust_oom_scores(container.anchor.pid, bundle.oom_score_adj)
        stack.push_async_callback(self._delete_in_guest, request.id)
        terminal = request.stdio.terminal
        params = {"container": request.id, "spec": plan.spec, "terminal": terminal, "streams": streams}
        container.guest_pid = result_of("create", await agent.call("create", params), guestmessages.Started).pid
        timeline.span("create", up)
        self.events.created(request, container.anchor.pid)
        process.gate.set()
        return container

    def _adjust_oom_scores(self, anchor_pid: int, score: int | None) -> None:
        """Let the pod's processes be ended as willingly as its most expendable container."""
        if score is not None:
            oom.adjust([anchor_pid], score)
            self._oom_score = score if self._oom_score is None else max(self._oom_score, score)
            oom.adjust(cgroup.processes(self._place.cgroups), self._oom_score)

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
        self.guest.end()
        return True

    async def _let_go(self, container_id: str, folder: Folder, in_guest: str) -> None:
        """Unmount a file system that is the container's alone before Delete answers: clients may mount it elsewhere
        then, and it must not be mounted twice. A guest that remembers files keeps it.
        """
        if not self._ends_with(container_id) and self.guest.connected.done():
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
            raise await self.guest.cause(error) from error
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
            self.guest.end()

    async def stop(self) -> None:
        """Take the VM down and free everything. Idempotent."""
        self.guest.end()
        await self.guest.wait_ended()
        await self._give_up_creating(*self._creating)
        while self._tasks:
            await asyncio.wait(self._tasks)
        for container in list(self.containers.values()):
            await container.free()
        self.containers.clear()
