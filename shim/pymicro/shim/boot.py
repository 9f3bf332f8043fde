"""The second half of a pod's start: one path, take over the VM, plug its share in, hello, on one exit stack."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace
from pymicro.shim.channel.base import Channel
from pymicro.shim.errors import SandboxDied, StepTimeout
from pymicro.shim.helper import Helper, watched
from pymicro.shim.hypervisor.base import Boot, Origin, Share, Vm, VmExit
from pymicro.shim.ignition import Ignition, Note, Started
from pymicro.shim.sparing import Sparing
from pymicro.shim.template_builder import Builder
from pymicro.shim.timeline import Timeline
from pymicro.wire import frames, messages

logger = logging.getLogger(__name__)

T = TypeVar("T")

_GREETING_LIMIT = 5.0
"""Seconds in which a connection from the guest must say what it is."""
MOST_GREETINGS = 64
"""Connections that may not have said yet what they are; more of them wait in the socket's queue."""
_ACCEPT_PAUSE = 0.1
"""Seconds after which accept(2) is tried again where the process has no descriptor left."""
_SAME_MOMENT = 1.0
"""Seconds in which processes that end because of each other are reaped, on a host with other things to do."""


class Booted(Struct, frozen=True):
    """A VM whose agent has said hello."""

    vm: Vm
    share: Helper
    control: Channel
    origin: Origin
    resumed_ns: int

    async def gone(self) -> VmExit:
        """Return when the VMM or a helper has ended: which and how, and what a guest that ended by itself last said.

        virtiofsd ends in peace when its VMM is gone, and may be reaped first: then the VMM is the cause.
        """
        waits = [asyncio.create_task(self.vm.wait()), asyncio.create_task(self._share_gone())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if waits[1].done() and waits[1].result().status == 0:
                await asyncio.wait(waits[:1], timeout=_SAME_MOMENT)
            if not waits[0].done():
                return waits[1].result()
            ended = waits[0].result()
            return ended if ended.status else replace(ended, last_lines=_last_said(self.vm.console()))
        finally:
            for wait in waits:
                wait.cancel()

    async def _share_gone(self) -> VmExit:
        return VmExit(self.share.name, await self.share.wait(), self.share.last_lines[-10:])


@asynccontextmanager
async def boot(
    ignition: Ignition,
    take_stream: Callable[[object, Channel], None],
    note: Note,
    timeline: Timeline,
    runs: Callable[[], None] = lambda: None,
) -> AsyncIterator[Booted]:
    """Bring up the VM that `ignition` has started, and wait for its agent's hello. Leaving the context ends the VM and
    its helpers. `runs` is called when nothing is left to be done before the guest's hello.

    Raises HostMissing, SandboxDied, StepTimeout, each with the cause and what to do.
    """
    plan = ignition.plan
    started = ignition.take()
    if started is None:
        begun = time.monotonic_ns()
        builder = Builder(plan.templates, plan.settings.timeouts.hello, plan.settings.templates.wait)
        origin = await builder.origin(plan.spec, plan.hypervisor, ignition.place)
        timeline.span("template", begun)
        started = ignition.start(origin)
    ascent = Ascent(ignition, take_stream, note, runs)
    async with AsyncExitStack() as stack:
        try:
            booted, hello = await ascent.attempt(stack, started)
        except (SandboxDied, StepTimeout, OSError) as error:
            started = ignition.start_cold(started.origin, error)
            try:
                booted, hello = await ascent.attempt(stack, started)
            except (SandboxDied, StepTimeout) as second:
                raise plan.diagnosed(second) from second
        _record_guest(timeline, booted, hello)
        yield booted


class Ascent(Struct, frozen=True):
    """Waiting for one pod's VM to come up, from whatever origin."""

    ignition: Ignition
    take_stream: Callable[[object, Channel], None]
    note: Note
    runs: Callable[[], None]

    async def attempt(self, outer: AsyncExitStack, started: Started) -> tuple[Booted, dict[str, Any]]:
        """Take over, plug in, hear the hello. What that took is freed by `outer`, or at once if it fails."""
        async with AsyncExitStack() as stack:
            stack.callback(started.end)
            share = await stack.enter_async_context(watched(started.share))
            vm = await stack.enter_async_context(self.ignition.plan.hypervisor.take_over(started.vmm))
            stack.callback(share.send_signal, signal.SIGKILL)  # it goes while the VMM does
            self.note(vmm_pid=vm.pid)
            greeting = await _while_running(share, self._greeted(vm, stack))
            booted = Booted(vm, share, greeting.channel, started.origin, started.resumed_ns)
            outer.push_async_exit(stack.pop_all())
            return booted, greeting.hello

    async def _greeted(self, vm: Vm, stack: AsyncExitStack) -> "Greeting":
        """Plug the share in, while the guest finds its vsock, and return its hello. The agent looks for the share."""
        greeter = Greeter(vm, self.take_stream)
        stack.push_async_callback(greeter.close)
        await vm.attach(Share(messages.SHARE_TAG, self.ignition.place.directory / "fs.sock"))
        self.runs()
        return await greeter.control(self.ignition.plan.settings.timeouts.hello)


async def _while_running(share: Helper, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which needs `share`. Raises SandboxDied with the end of `share` if that is why
    `work` fails, or would wait for ever.
    """
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(share.wait())
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        if ending.done() or isinstance(working.exception(), SandboxDied):
            await asyncio.wait((working, ending), timeout=_SAME_MOMENT)
        if ending.done() and (ending.result() or not working.done()):  # it ends in peace when its VMM is gone
            raise SandboxDied(str(VmExit(share.name, ending.result(), share.last_lines[-10:])))
        return working.result()
    finally:
        ending.cancel()
        working.cancel()
        await asyncio.wait((working,))
        working.cancelled() or working.exception()  # it has been looked at


class Greeting(Struct, frozen=True):
    """The control connection and its hello."""

    channel: Channel
    hello: dict[str, Any]


class Greeter:
    """Takes the connections that the guest opens: exactly one control connection, and streams that know a token."""

    def __init__(self, vm: Vm, take_stream: Callable[[object, Channel], None]) -> None:
        self._vm = vm
        self._take_stream = take_stream
        self._control: asyncio.Future[Greeting] = asyncio.get_running_loop().create_future()
        self._greetings: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MOST_GREETINGS)
        self._warn = Sparing(logger)
        self._accepting = asyncio.create_task(self._accept(), name="greeter")

    async def control(self, limit: float) -> Greeting:
        """Return the control connection with its hello. Raises SandboxDied, StepTimeout after `limit` seconds."""
        try:
            async with asyncio.timeout(limit):
                return await asyncio.shield(self._control)
        except TimeoutError:
            raise StepTimeout(
                f"the guest said no hello in {limit:g} s (timeouts.hello); {_console(self._vm.console())}"
            ) from None

    async def close(self) -> None:
        """Take no more connections."""
        for task in (self._accepting, *self._greetings):
            task.cancel()
        await asyncio.wait([self._accepting])
        self._control.cancel()
        if not self._control.cancelled() and self._control.exception() is None:
            self._control.result().channel.close()  # nobody may have taken it

    async def _accept(self) -> None:
        try:
            while True:
                await self._room.acquire()
                channel = await self._next()
                greeting = asyncio.create_task(self._greet(channel))
                self._greetings.add(greeting)
                greeting.add_done_callback(partial(self._greeted, channel))
        except SandboxDied as error:
            if not self._control.done():
                self._control.set_exception(SandboxDied(f"{error}; {_console(self._vm.console())}"))

    async def _next(self) -> Channel:
        """Return the next connection. Raises SandboxDied."""
        while True:
            try:
                return await self._vm.accept()
            except OSError as error:
                self._warn("a connection from the guest cannot be taken: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE)

    def _greeted(self, channel: Channel, greeting: asyncio.Task[None]) -> None:
        self._greetings.discard(greeting)
        self._room.release()
        if greeting.cancelled():
            channel.close()

    async def _greet(self, channel: Channel) -> None:
        try:
            async with asyncio.timeout(_GREETING_LIMIT):
                hello = await channel.read_message(frames.MAX_HELLO)
        except (OSError, frames.FrameError, TimeoutError) as error:
            self._warn("a connection from the guest said nothing sensible: %s", error)
            channel.close()
            return
        if hello.get("hello") == "stream":
            self._take_stream(hello.get("token"), channel)
        elif hello.get("hello") == "control" and not self._control.done():
            if hello.get("version") == messages.PROTOCOL_VERSION:
                self._control.set_result(Greeting(channel, hello))
            else:
                channel.close()
                self._control.set_exception(
                    SandboxDied(
                        f"the guest image's agent speaks protocol {hello.get('version')}, "
                        f"this shim {messages.PROTOCOL_VERSION}; "
                        "rebuild the image (`make rootfs`) and install both together"
                    )
                )
        else:
            self._warn("a second control connection from the guest was refused")
            channel.close()


def setup_message(hostname: str) -> dict[str, Any]:
    """Return the agent's `setup` parameters: what makes this VM unlike any other."""
    return {
        "entropy": os.urandom(64).hex(),
        "hostname": hostname,
        "machine_id": os.urandom(16).hex(),
    }


def _record_guest(timeline: Timeline, booted: Booted, hello: dict[str, Any]) -> None:
    """Record the guest's time until its hello.

    A cold boot's is split into the kernel's and the agent's, as the guest measured them.
    """
    timeline.span("guest", booted.resumed_ns)
    boot_ms, agent_ms = hello.get("boot_ms"), hello.get("agent_ms")
    if isinstance(booted.origin, Boot) and isinstance(boot_ms, int) and isinstance(agent_ms, int):
        timeline.record("guest_kernel", boot_ms)
        timeline.record("guest_agent", agent_ms - boot_ms)


def _console(lines: Sequence[str]) -> str:
    return "the console's last lines: " + (" | ".join(_last_said(lines)) or "none")


def _last_said(lines: Sequence[str]) -> Sequence[str]:
    """The console's last lines; of a kernel panic those up to its cause, not the registers."""
    panic = next((n for n, line in enumerate(lines) if "Kernel panic" in line), None)
    return lines[-8:] if panic is None else lines[max(0, panic - 5) : panic + 1]
