"""What every VMM that is a process of its own has in common, once an event loop drives it."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from pymicro.shim.channel.base import Channel
from pymicro.shim.errors import SandboxDied
from pymicro.shim.helper import Helper
from pymicro.shim.hypervisor.base import VmExit


class Listening(Protocol):
    """Where the guest's connections arrive."""

    async def accept(self) -> Channel:
        """Return the next one."""


class DrivenVm:
    """A VMM's process: the guest's console is its stdout, its own words are on stderr."""

    def __init__(self, process: Helper, listener: Listening | None) -> None:
        """`listener` is None for a VM without a vsock."""
        self.pid = process.pid
        self._process = process
        self._listener = listener

    async def wait(self) -> VmExit:
        """Return when the VMM or what it needs is gone."""
        return VmExit(self._process.name, await self._process.wait(), self._last_words)

    async def accept(self) -> Channel:
        """Return the next connection that the guest opens. Raises SandboxDied when the VM ends first."""
        assert self._listener is not None, "spawned without a vsock"
        accepting = asyncio.ensure_future(self._listener.accept())
        dying = asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait((accepting, dying), return_when=asyncio.FIRST_COMPLETED)
            if accepting.done():
                return accepting.result()
            raise SandboxDied(str(dying.result()))
        finally:
            accepting.cancel()
            dying.cancel()

    async def console_says(self, text: str) -> None:
        """Wait until the guest's console has shown `text`. Raises SandboxDied."""
        if not await self._process.logs[0].says(text):
            raise SandboxDied(str(await self.wait()))

    def console(self) -> Sequence[str]:
        """Return the last lines of the guest's console."""
        return self._process.logs[0].lines

    @property
    def _last_words(self) -> Sequence[str]:
        """What the VMM itself said, without the guest's console."""
        return self._process.logs[1].lines[-10:]
