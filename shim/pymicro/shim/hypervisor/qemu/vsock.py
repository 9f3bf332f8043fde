"""A QEMU VM's vsock device: the kernel's vhost-vsock where the host has it, else the program vhost-device-vsock."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymicro.shim.channel.base import Listener
from pymicro.shim.channel.hybrid import HybridListener
from pymicro.shim.channel.vsock import VsockListener
from pymicro.shim.errors import SandboxDied, StepTimeout
from pymicro.shim.hypervisor.base import VmExit
from pymicro.shim.spawn import Place, Process, spawn

HYBRID_CID = 0x10000
"""The guest's CID behind vhost-device-vsock: each VM has its own socket there, so all may have the same CID."""
_POLL = 0.002


@dataclass(frozen=True, slots=True)
class VsockBackend:
    """What QEMU is told and where the guest's connections arrive."""

    listener: Listener
    chardev_path: Path | None
    properties: dict[str, Any]  # QMP device_add arguments: their values are JSON of any kind
    helper: Process | None


@asynccontextmanager
async def vsock_backend(program: str | None, place: Place, timeout: float) -> AsyncIterator[VsockBackend]:
    """Open this VM's vsock. `program` is vhost-device-vsock's path, or None for the kernel's device.

    `timeout` is in seconds. Raises HostMissing, SandboxDied, StepTimeout.
    """
    if program is None:
        kernel = VsockListener()
        try:
            yield VsockBackend(kernel, None, {"driver": "vhost-vsock-pci", "guest-cid": kernel.cid}, None)
        finally:
            kernel.close()
        return
    chardev, uds = place.directory / "vsock-dev", place.directory / "vsock"
    hybrid = HybridListener(uds, HYBRID_CID)
    argv = [program, "--vm", f"guest-cid={HYBRID_CID},socket={chardev},uds-path={uds}"]
    helper = spawn("vhost-device-vsock", argv, place)
    try:
        await _wait_for_socket(helper, chardev, timeout)
        yield VsockBackend(hybrid, chardev, {"driver": "vhost-user-vsock-pci"}, helper)
    finally:
        await helper.kill()
        hybrid.close()
        chardev.unlink(missing_ok=True)
        uds.unlink(missing_ok=True)


async def _wait_for_socket(helper: Process, path: Path, timeout: float) -> None:
    deadline = asyncio.get_running_loop().time() + timeout
    while not path.exists():
        if not helper.running:
            raise SandboxDied(str(VmExit(helper.name, await helper.wait(), helper.last_lines)))
        if asyncio.get_running_loop().time() > deadline:
            raise StepTimeout(
                f"{helper.name} did not create {path} in {timeout:g} s (timeouts.vmm);"
                f" its last lines: {helper.last_lines}"
            )
        await asyncio.sleep(_POLL)
