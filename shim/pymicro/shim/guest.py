"""The guest of a sandbox: its VM from ignition to death, and the agent in it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress

from pymicro.shim import guestmessages
from pymicro.shim.agent import AgentClient
from pymicro.shim.boot import Booted, boot, setup_message
from pymicro.shim.channel.base import Channel
from pymicro.shim.errors import SandboxDied, ShimError
from pymicro.shim.ignition import Ignition, Note
from pymicro.shim.timeline import Timeline

logger = logging.getLogger(__name__)

_VM_ENDS = 1.0
"""Seconds in which a VM ends whose agent's connection has broken because of that."""
_AUTOPSY = 3.0
"""Seconds that an error waits for the cause of the VM's death."""


class Guest:
    """One VM, which comes up at once and goes down once, by itself or by `end`."""

    def __init__(
        self,
        sandbox_id: str,
        ignition: Ignition,
        timeline: Timeline,
        *,
        take_stream: Callable[[object, Channel], None],
        note: Note,
        on_event: Callable[[guestmessages.Event], None],
        on_death: Callable[[], Awaitable[object]],
    ) -> None:
        """Bring up the VM that `ignition` has started. `on_death` is called when it is gone, for whatever reason."""
        self.connected: asyncio.Future[AgentClient] = asyncio.get_running_loop().create_future()
        """The agent once the VM is up, or why it could not start."""
        self.death: SandboxDied | None = None
        self._sandbox_id = sandbox_id
        self._ignition = ignition
        self._timeline = timeline
        self._take_stream = take_stream
        self._note = note
        self._on_event = on_event
        self._on_death = on_death
        self._runs = asyncio.Event()
        self._died = asyncio.Event()
        self._ending = False
        self._life = asyncio.create_task(self._live(), name="guest")
        # not only in the task: one that is cancelled before its first step frees nothing
        self._life.add_done_callback(lambda _: ignition.close())

    def __repr__(self) -> str:
        return f"<Guest {'dead' if self.death else 'up' if self.connected.done() else 'booting'}>"

    async def agent(self) -> AgentClient:
        """Return the agent once the VM is up. Raises why it could not start, or SandboxDied."""
        agent = await asyncio.shield(self.connected)
        if self.death is not None:
            raise self.death
        return agent

    async def runs(self, limit: float) -> None:
        """Return when the guest runs, or never will, or after `limit` seconds: then there is time for more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._runs.wait()

    async def cause(self, error: SandboxDied) -> SandboxDied:
        """Return why the VM died, which is known a moment after the agent's connection has broken; else `error`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_AUTOPSY):
                await self._died.wait()
        return self.death or error

    def end(self) -> None:
        """Begin to take the VM down; a second call must not disturb the first."""
        if not self._ending:
            self._ending = True
            self._life.cancel()

    async def wait_ended(self) -> None:
        """Return when nothing of the VM is left and `on_death` has returned."""
        await asyncio.wait([self._life])

    async def _live(self) -> None:
        """Boot, watch, and take the VM down; in every case nobody waits for it afterwards."""
        reason: ShimError = SandboxDied(f"sandbox {self._sandbox_id!r} was stopped")
        try:
            with closing(self._ignition) as ignition:
                async with boot(ignition, self._take_stream, self._note, self._timeline, self._runs.set) as booted:
                    reason = await self._use(booted)
                    logger.error("sandbox %s: %s", self._sandbox_id, reason)
        except ShimError as error:
            reason = error
            logger.error("sandbox %s cannot run: %s", self._sandbox_id, reason)  # noqa: TRY400  # the message says it all
        except asyncio.CancelledError:
            pass
        except Exception as error:
            logger.exception("sandbox %s failed", self._sandbox_id)
            reason = ShimError(f"{type(error).__name__}: {error}")
        finally:
            self.death = reason if isinstance(reason, SandboxDied) else SandboxDied(str(reason))
            self._died.set()
            self._runs.set()
            if not self.connected.done():
                self.connected.set_exception(reason)
                self.connected.exception()  # it may be that nobody asks
        await self._on_death()

    async def _use(self, booted: Booted) -> SandboxDied:
        """Take the VM into use; return why it is dead."""
        plan = self._ignition.plan
        agent = AgentClient(booted.control, self._on_event, plan.settings.timeouts.request)
        try:
            hostname = str(plan.bundle.spec.get("hostname") or self._sandbox_id)[:64]
            begun = time.monotonic_ns()
            try:
                await agent.call("setup", setup_message(hostname), plan.settings.timeouts.hello)
                self._timeline.span("setup", begun)
            except SandboxDied:
                raise await _cause_of_death(booted, agent) from None
            self.connected.set_result(agent)
            return await _cause_of_death(booted, agent)
        finally:
            await agent.close()


async def _cause_of_death(booted: Booted, agent: AgentClient) -> SandboxDied:
    """Return why the VM is of no use any more, once it is so: whichever piece went first."""
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
