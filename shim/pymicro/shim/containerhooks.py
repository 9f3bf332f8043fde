"""The host's hooks of one container: which run when, and that the last ones run once, whoever is killed when."""

import asyncio
import logging
from contextlib import suppress

import msgspec
from pymicro.shim import hooks
from pymicro.shim.bundle import Bundle
from pymicro.shim.errors import ShimError
from pymicro.shim.guestspec import HostHooks
from pymicro.shim.hooks import Attempt, Call, Hook, Owed
from pymicro.shim.hostprogram import outer_namespace
from pymicro.shim.state import Record

logger = logging.getLogger(__name__)


class ContainerHooks:
    """Runs a container's hooks. Its poststop hooks are owed, in the record, from before its first hook runs until after
    its last one has: a daemon that dies in between leaves them to who frees the sandbox. One that was running then is
    run again.
    """

    def __init__(self, container_id: str, bundle: Bundle, host: HostHooks, record: Record, limit: float) -> None:
        """`limit` is in seconds, for a hook without a time-out of its own."""
        self._id = container_id
        self._bundle = bundle
        self._hooks = host
        self._record = record
        self._limit = limit

    def __repr__(self) -> str:
        return f"<ContainerHooks {self._id} {'owes poststop' if self._id in self._owed else ''}>"

    @property
    def _owed(self) -> hooks.Json:
        owed: hooks.Json = self._record.facts.get("poststop", {})
        return owed

    async def creating(self, pid: int) -> None:
        """Run the hooks of creation; the task is `pid`. Raises HookFailed, StepTimeout."""
        if self._hooks.poststop:
            owed = Owed(self._hooks.poststop, self._state("stopped"), self._limit)
            self._record.note(poststop={**self._owed, self._id: msgspec.to_builtins(owed)})
        await self._run("prestart", self._hooks.prestart, self._state("creating", pid))
        await self._run("createRuntime", self._hooks.create_runtime, self._state("creating", pid))

    async def started(self, pid: int) -> None:
        """Run the poststart hooks; the task is `pid`. Raises HookFailed, StepTimeout."""
        await self._run("poststart", self._hooks.poststart, self._state("running", pid))

    async def deleted(self) -> None:
        """Run the poststop hooks, if they are owed; one that fails is logged and keeps nobody from going on."""
        if self._id not in self._owed:
            return
        for number, hook in enumerate(self._hooks.poststop):
            try:
                await run(Call("poststop", number, self._limit), hook, self._state("stopped"))
            except ShimError as error:
                logger.warning("%s: %s", self._id, error)
        self._record.forget(poststop={other: owed for other, owed in self._owed.items() if other != self._id})

    async def _run(self, kind: str, wanted: tuple[Hook, ...], state: hooks.Json) -> None:
        for number, hook in enumerate(wanted):
            await run(Call(kind, number, self._limit), hook, state)

    def _state(self, status: str, pid: int = 0) -> hooks.Json:
        return hooks.state(self._bundle.spec, self._id, self._bundle.path, status, pid)


async def run(called: Call, hook: Hook, state: hooks.Json) -> None:
    """Run one hook to its end, where containerd runs. Raises HookFailed, StepTimeout; then nothing of it is left."""
    attempt = Attempt(called, hook, state, outer_namespace())
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def read() -> None:
        if not attempt.read():
            loop.remove_reader(attempt.output)

    try:
        loop.add_reader(attempt.running.pidfd, ended.set)
        loop.add_reader(attempt.output, read)
        with suppress(TimeoutError):
            async with asyncio.timeout(attempt.limit):
                await ended.wait()
    finally:
        loop.remove_reader(attempt.running.pidfd)
        loop.remove_reader(attempt.output)
        attempt.end()
    attempt.check()
