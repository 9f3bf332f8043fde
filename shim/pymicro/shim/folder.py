"""A container's folder in the pod's share: its root filesystem and its volumes, mounted there, and let go of."""

import asyncio
import logging
import os
import time

from msgspec import Struct
from pymicro.shim import rootfs
from pymicro.shim.guestspec import GuestPlan
from pymicro.shim.requests import CreateContainer, Mount

logger = logging.getLogger(__name__)

_LETS_GO = 5.0
"""Seconds in which the guest, or the end of its VM, lets go of a root filesystem."""
_POLL = 0.005


class Folder(Struct, frozen=True):
    """The folder at `path`; nothing is there yet."""

    path: str

    @property
    def root(self) -> str:
        """Where the root filesystem is."""
        return os.path.join(self.path, "rootfs")

    def mount(self, request: CreateContainer, plan: GuestPlan) -> None:
        """Mount the root filesystem and the volumes. Raises InvalidRequest; then remove() is to be called.

        Not in a thread that is given up where a file server does not answer: what it mounts while remove() is at work
        would be emptied as if it were ours.
        """
        named = Mount("bind", os.path.join(request.bundle, plan.root_path), "", ("rbind",))
        rootfs.mount_rootfs(request.rootfs or (named,), self.root)
        for wanted in plan.binds:
            source = os.path.join(request.bundle, wanted.source)
            target = os.path.join(self.path, "mounts", wanted.name)
            rootfs.bind(source, target, read_only=wanted.read_only, recursively=wanted.recursively)

    async def let_go(self) -> None:
        """Unmount the root filesystem as soon as nobody uses it, which writes it to its device."""
        deadline = time.monotonic() + _LETS_GO
        while not rootfs.let_go(self.root):
            if time.monotonic() > deadline:
                logger.warning("%s is still in use after %g s; its device may be as well", self.root, _LETS_GO)
                return
            await asyncio.sleep(_POLL)

    def remove(self) -> None:
        """Unmount everything and remove the folder. Idempotent. Raises OSError, when a mount stays."""
        rootfs.remove_tree(self.path)
