"""A Cloud Hypervisor VM whose guest runs, driven over its REST API."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from pymicro.shim.errors import SandboxDied, StepTimeout
from pymicro.shim.helper import Helper, LogTail, watched
from pymicro.shim.hypervisor.base import Device, Template, VmExit
from pymicro.shim.hypervisor.cloud_hypervisor import requests, snapshot
from pymicro.shim.hypervisor.cloud_hypervisor.api import Refused
from pymicro.shim.hypervisor.cloud_hypervisor.backend import SpawnedCloudHypervisor
from pymicro.shim.hypervisor.driven import DrivenVm

logger = logging.getLogger(__name__)

_REBOOTING = '"rebooting"'
"""What the VMM reports first of a guest that resets its machine."""


@asynccontextmanager
async def running(spawned: SpawnedCloudHypervisor, timeout: float) -> AsyncIterator["CloudHypervisorVm"]:
    """Yield the VM that `spawned` is; `timeout` (seconds) bounds each step. Raises HostMissing."""
    async with AsyncExitStack() as stack:
        stack.callback(spawned.end)
        process = await stack.enter_async_context(watched(spawned.child))
        events = LogTail(f"{process.name}'s events", spawned.take_events())
        stack.callback(events.close)
        vm = CloudHypervisorVm(process, spawned, timeout)
        watching = asyncio.create_task(vm.end_with_guest(events), name="reboot")
        stack.callback(watching.cancel)
        yield vm


class CloudHypervisorVm(DrivenVm):
    """One Cloud Hypervisor process."""

    def __init__(self, process: Helper, spawned: SpawnedCloudHypervisor, timeout: float) -> None:
        super().__init__(process, spawned.vsock.listener if spawned.vsock else None)
        self._api = spawned.api
        self._memory = spawned.memory
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self._guest_ended = False

    def __repr__(self) -> str:
        return f"<CloudHypervisorVm {self._process!r}>"

    async def end_with_guest(self, events: LogTail) -> None:
        """End the VMM when the guest resets: it would boot it anew, and a dead pod would look alive."""
        if await events.says(_REBOOTING):
            self._guest_ended = True
            await self._process.kill()

    async def attach(self, device: Device) -> None:
        """Plug `device` in. Raises SandboxDied, StepTimeout."""
        await self._call(requests.add_share(device))

    async def save(self, state: Path) -> None:
        """Stop the VM and write its state to `state`, its RAM to the file that it was spawned with. Raises SandboxDied,
        StepTimeout.
        """
        assert self._memory is not None, "spawned to be saved"
        directory = state.parent / "snapshot"
        directory.mkdir()
        await self._call(requests.PAUSE)
        await self._call(requests.snapshot(directory))
        snapshot.pack(directory, Template(self._memory, state))

    async def wait(self) -> VmExit:
        """Return when the VMM is gone."""
        status = await self._process.wait()
        if self._guest_ended:
            return VmExit(self._process.name, 0, self._last_words, "guest-reset")
        return VmExit(self._process.name, status, self._last_words)

    async def _call(self, request: requests.Request) -> None:
        """Carry out `request`; the pod's other business goes on meanwhile."""
        name, limit = request[0], self._timeout
        try:
            async with self._turn, asyncio.timeout(limit):
                self._api.send(request)
                await self._answer_begins()
                self._api.answer(request)  # it is short and comes in one piece
        except Refused as error:
            raise SandboxDied(f"Cloud Hypervisor refused {name}: {error}") from error
        except TimeoutError:
            raise StepTimeout(
                f"Cloud Hypervisor did not answer {name} in {limit:g} s (timeouts.vmm);"
                f" its last lines: {self._last_words}"
            ) from None
        except (EOFError, OSError, ValueError) as error:
            raise SandboxDied(f"{await self._ended()} (at {name})") from error

    async def _answer_begins(self) -> None:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._api.fileno(), begun.set)
        try:
            await begun.wait()
        finally:
            loop.remove_reader(self._api.fileno())

    async def _ended(self) -> VmExit:
        """Return how the VMM has ended; its connection breaks a moment before it can be reaped."""
        try:
            async with asyncio.timeout(0.5):
                return await self.wait()
        except TimeoutError:
            await self._process.kill()
            return await self.wait()
