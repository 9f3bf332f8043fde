"""A QEMU VM whose guest runs, driven over QMP."""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from pymicro.shim.errors import SandboxDied, StepTimeout, Unsupported
from pymicro.shim.helper import Helper, watched
from pymicro.shim.hypervisor.base import Device, VmExit
from pymicro.shim.hypervisor.driven import DrivenVm
from pymicro.shim.hypervisor.qemu import cmdline, commands
from pymicro.shim.hypervisor.qemu.backend import SpawnedQemu
from pymicro.shim.hypervisor.qemu.vsock import VsockBackend
from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError

logger = logging.getLogger(__name__)
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # its errors reach us as exceptions, with our context

_POLL = 0.002
_SAME_MOMENT = 0.2
"""Seconds in which a process that has ended is reaped, and what it said last is heard."""


@asynccontextmanager
async def running(spawned: SpawnedQemu, timeout: float) -> AsyncIterator["QemuVm"]:
    """Yield the VM that `spawned` is; `timeout` (seconds) bounds each step. Raises SandboxDied, StepTimeout."""
    async with AsyncExitStack() as stack:
        stack.callback(spawned.end)
        vsock = spawned.vsock
        helpers = [await stack.enter_async_context(watched(vsock.child))] if vsock and vsock.child else []
        process = await stack.enter_async_context(watched(spawned.child))
        vm = QemuVm(process, helpers, vsock, timeout)
        stack.push_async_callback(vm.disconnect)
        await vm.connect(spawned.monitor)
        yield vm


class QemuVm(DrivenVm):
    """One QEMU process and the helpers that its devices need."""

    def __init__(self, process: Helper, helpers: Sequence[Helper], vsock: VsockBackend | None, timeout: float) -> None:
        super().__init__(process, vsock.listener if vsock else None)
        self._helpers = helpers
        self._timeout = timeout
        self._qmp = QMPClient("pymicro")
        self._shutdown = EventListener(names=("SHUTDOWN",))
        self._qmp.register_listener(self._shutdown)
        self._free_ports = [*range(cmdline.ROOT_PORTS - 1, 0, -1)]  # the first is the vsock's

    def __repr__(self) -> str:
        return f"<QemuVm {self._process!r} devices={cmdline.ROOT_PORTS - len(self._free_ports)}>"

    async def connect(self, monitor: socket.socket) -> None:
        """Shake hands with the monitor."""
        await self._step("its monitor", self._connected(monitor))

    async def _connected(self, monitor: socket.socket) -> None:
        try:
            await self._qmp.connect(monitor)
        except AssertionError as error:  # the library is sure of a connection that has broken meanwhile
            raise EOFError("QEMU ended while its monitor was being connected") from error

    async def disconnect(self) -> None:
        """Let the monitor go; whatever it says is of no interest any more."""
        for helper in self._helpers:
            helper.send_signal(signal.SIGKILL)  # it goes while QEMU does
        await self._process.kill()
        try:
            await self._qmp.disconnect()
        except (QMPError, EOFError, OSError) as error:
            logger.debug("monitor: %s", error)

    async def attach(self, device: Device) -> None:
        """Plug `device` into the next free root port. Raises SandboxDied, HostMissing, StepTimeout, Unsupported."""
        if not self._free_ports:
            raise Unsupported(f"a VM takes {cmdline.ROOT_PORTS} devices and all slots are in use")
        port = self._free_ports.pop()
        await self._execute(*commands.add_chardev("share", device.socket))
        properties = {"driver": "vhost-user-fs-pci", "chardev": "share", "tag": device.tag}
        await self._execute(*commands.add_device(port, properties))

    async def save(self, state: Path) -> None:
        """Stop the VM and write the state of its devices; its RAM stays in its file. Raises SandboxDied,
        StepTimeout.
        """
        await self._execute("stop")
        await self._execute(*commands.DEVICES_ALONE)
        with open(state, "xb") as file:
            self._qmp.send_fd_scm(file.fileno())
            await self._execute("getfd", {"fdname": "state"})
            await self._execute("migrate", {"uri": "fd:state"})
            await self._step("migrate", self._migrated())

    async def _migrated(self) -> None:
        while not commands.migrated(await self._qmp.execute("query-migrate")):
            await asyncio.sleep(_POLL)

    async def wait(self) -> VmExit:
        """Return when QEMU or one of its helpers is gone."""
        processes = (self._process, *self._helpers)
        waits = {asyncio.ensure_future(process.wait()): process for process in processes}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        ended = next(iter(done))
        process = waits[ended]
        status = ended.result()
        if process is not self._process:
            return VmExit(process.name, status, process.last_lines[-10:])
        return VmExit(process.name, status, self._last_words, "" if status else await self._shutdown_reason())

    async def _shutdown_reason(self) -> str:
        """Return why QEMU has ended by itself: with -no-reboot, "guest-reset" is also a kernel's panic or triple fault
        (ShutdownCause in QEMU's qapi/run-state.json).
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_SAME_MOMENT):
                said: dict[str, Any] = dict(await self._shutdown.get())  # an event of QMP: JSON of any kind
                return str(said["data"].get("reason", ""))
        return ""

    async def _execute(self, command: str, arguments: dict[str, Any] | None = None) -> None:  # JSON of any kind
        await self._step(command, self._qmp.execute(command, arguments))

    async def _step(self, what: str, call: Any) -> None:  # any awaitable; its result is of no interest
        limit = self._timeout
        try:
            async with asyncio.timeout(limit):
                await call
        except TimeoutError:
            raise StepTimeout(
                f"QEMU did not answer {what} in {limit:g} s (timeouts.vmm); its last lines: {self._last_words}"
            ) from None
        except ExecuteError as error:
            why = f"QEMU refused {what}: {error}"
            raise SandboxDied(f"{dead} ({why})" if (dead := await self._dead_helper()) else why) from error
        except (QMPError, ExecInterruptedError, StateError, EOFError, OSError) as error:
            # the monitor breaks a moment before the process can be reaped; its last words say more than the broken pipe
            async with asyncio.timeout(limit):
                exit_ = VmExit("qemu", await self._end(), self._last_words)
            raise SandboxDied(f"{exit_} (at {what})") from error

    async def _dead_helper(self) -> VmExit | None:
        """Return the end of a helper that QEMU could not reach because it is gone."""
        for helper in self._helpers:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SAME_MOMENT):
                    return VmExit(helper.name, await helper.wait(), helper.last_lines[-10:])
        return None

    async def _end(self) -> int:
        try:
            async with asyncio.timeout(0.5):
                return await self._process.wait()
        except TimeoutError:
            await self._process.kill()
            return await self._process.wait()
