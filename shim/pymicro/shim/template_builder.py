"""Making a template: whoever comes first boots a VM as far as the agent goes without its pod, and saves it.

Whatever goes wrong, the pod boots cold, one warning says why, and nothing is left behind.
"""

import asyncio
import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msgspec import Struct
from pymicro.shim import template_files as files
from pymicro.shim.errors import HostMissing, InvalidSettings, ShimError, StepTimeout
from pymicro.shim.filelock import FileLock
from pymicro.shim.hypervisor.base import Boot, Hypervisor, Origin, Template, VmSpec
from pymicro.shim.spawn import Place
from pymicro.shim.templates import Store, delete, key
from pymicro.wire import messages

logger = logging.getLogger(__name__)

_POLL = 0.02
_USUAL_MIB, _SHARE = 96, 48
"""More than a template holds is this many MiB and this part of the VM's memory. A small VM's holds 45 MiB, with kernel,
agent and page cache; Linux's tables take 1/54 of the RAM, its bounce buffers 64 MiB where some RAM lies above 4 GiB.
"""
_FULL = 1 << 20
"""Bytes: with fewer left, a file system is what a failed builder failed of."""


class Builder(Struct, frozen=True):
    """Makes the templates of `store`.

    `timeout` (seconds) bounds the boot of a VM that becomes one, and the wait for another start that makes it; without
    `wait` such a start is not waited for. In `rest` seconds a guest that waits comes to rest: its console's line goes
    out, its kernel's threads sleep.
    """

    store: Store
    timeout: float
    wait: bool = True
    rest: float = 0.1

    async def origin(self, spec: VmSpec, hypervisor: Hypervisor, place: Place) -> Origin:
        """Return the template for `spec`, made now if there is none yet; a cold boot, with a warning, if that
        fails.
        """
        try:
            name = key(spec, hypervisor)
            return self.store.look_up(name) or await self._made(name, spec, hypervisor, place)
        except (ShimError, OSError) as error:
            logger.warning("no template for this pod, it boots cold: %s", error)
            return Boot()

    async def _made(self, name: str, spec: VmSpec, hypervisor: Hypervisor, place: Place) -> Origin:
        turn = await self._turn(name)
        if not isinstance(turn, FileLock):
            return turn
        with turn:
            return self.store.look_up(name, locked=True) or await self._build(name, spec, hypervisor, place)

    async def _turn(self, name: str) -> FileLock | Origin:
        """Return the lock under which to make the template, or what another start has made meanwhile. Raises
        StepTimeout.
        """
        deadline = time.monotonic() + self.timeout
        while not (lock := self.store.try_lock(name)):
            if not self.wait:
                logger.info("another start makes template %s, this pod boots cold (templates.wait)", name)
                return Boot()
            if time.monotonic() > deadline:
                raise StepTimeout(
                    f"another start did not finish template {name} in {self.timeout:g} s (timeouts.hello)"
                )
            await asyncio.sleep(_POLL)
            if found := self.store.look_up(name):
                return found
        return lock

    async def _build(self, name: str, spec: VmSpec, hypervisor: Hypervisor, place: Place) -> Template:
        """Make the template, and put it in its place in one step."""
        self._tidy(name)
        self._demand_room(spec)
        begun = time.monotonic()
        scratch = self.store.scratch(name)
        try:
            scratch.mkdir(mode=0o700)
            await self._save(scratch, spec, hypervisor, place)
            if key(spec, hypervisor) != name:
                raise HostMissing("the kernel, the image or the VMM was replaced while its template was made")
            files.seal(scratch, name, spec)
            self._refuse_too_large(files.held_bytes(scratch))
            os.rename(scratch, self.store.directory / name)
        except (ShimError, OSError) as error:
            raise self._explained(error) from error
        finally:
            delete(scratch)
        logger.info("built template %s in %.1f s", name, time.monotonic() - begun)
        for other in self.store.bound(newest=name):
            logger.info("template %s is removed: too many (templates.most) or too large (templates.most_mib)", other)
        return self.store.template(name)

    async def _save(self, scratch: Path, spec: VmSpec, hypervisor: Hypervisor, place: Place) -> None:
        """Boot a VM whose RAM is a file in `scratch`, and save it there when its agent waits."""
        memory = scratch / files.MEMORY
        with open(memory, "xb") as file:
            os.truncate(file.fileno(), spec.memory_mib << 20)
        with ExitStack() as stack:
            spawned = hypervisor.spawn(spec, Boot(memory), place, vsock=False)
            stack.callback(spawned.end)
            spawned.wake()
            async with hypervisor.take_over(spawned) as vm:
                await self._ready(vm.console_says(messages.READY))
                await asyncio.sleep(self.rest)
                await vm.save(scratch / files.STATE)

    async def _ready(self, waiting: Any) -> None:  # an awaitable of whatever
        try:
            async with asyncio.timeout(self.timeout):
                await waiting
        except TimeoutError:
            raise StepTimeout(f"the guest was not ready in {self.timeout:g} s (timeouts.hello)") from None

    def _tidy(self, name: str) -> None:
        """Remove what killed builders have left, and what nobody can use any more."""
        self.store.sweep(name)
        for each, why in self.store.prune().items():
            level = logging.WARNING if why.startswith("damaged") else logging.INFO
            logger.log(level, "template %s is removed: %s", each, why)

    def _demand_room(self, spec: VmSpec) -> None:
        """Raise InvalidSettings or HostMissing where a template would not find room: a VM whose RAM does is killed."""
        needed = self._likely_mib(spec)
        if needed > self.store.most_mib:
            raise _too_large(needed, self.store.most_mib)
        free = _free_bytes(self.store.directory)
        if free is not None and free < needed << 20:
            raise HostMissing(
                f"{self.store.directory} (templates.directory) is on a file system with {free >> 20} MiB left, and a"
                f" template takes about {needed} MiB: free some, or make it larger"
            )

    def _likely_mib(self, spec: VmSpec) -> int:
        """Return how much a template for `spec` takes: as much as one of its size, or what is known of Linux."""
        known = [self.store.facts(name) for name in self.store.names()]
        alike = [(facts.held_bytes >> 20) + 1 for facts in known if facts.memory_mib == spec.memory_mib]
        return min([spec.memory_mib, _USUAL_MIB + spec.memory_mib // _SHARE, *alike])

    def _refuse_too_large(self, held: int) -> None:
        if held > self.store.most_mib << 20:
            raise _too_large((held >> 20) + 1, self.store.most_mib)

    def _explained(self, error: Exception) -> Exception:
        """Return `error`, or that the file system is full where that is why: a VM dies of it without a word."""
        free = _free_bytes(self.store.directory)
        if free is None or free >= _FULL:
            return error
        return HostMissing(
            f"the file system of {self.store.directory} (templates.directory) is full: free some, or make it larger"
            f" ({error})"
        )


def _too_large(needed: int, most: int) -> InvalidSettings:
    return InvalidSettings(
        f"its template takes about {needed} MiB, more than templates.most_mib = {most}: raise that, or set vm.start to"
        ' "boot"'
    )


def _free_bytes(directory: Path) -> int | None:
    """Return what is free in the file system of `directory`; None where it has no limit."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize if status.f_blocks else None
