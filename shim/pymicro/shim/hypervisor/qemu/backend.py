"""The QEMU backend: a `microvm` machine, driven over QMP."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymicro.shim.channel.base import Channel, Listener
from pymicro.shim.errors import SandboxDied, StepTimeout, Unsupported
from pymicro.shim.hypervisor.base import Boot, Device, Origin, Share, Template, VmExit, VmSpec, Vsock
from pymicro.shim.hypervisor.qemu import cmdline
from pymicro.shim.hypervisor.qemu.memory import copy_populated
from pymicro.shim.hypervisor.qemu.vsock import vsock_backend
from pymicro.shim.spawn import Place, Process, spawn
from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError

logger = logging.getLogger(__name__)
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # its errors reach us as exceptions, with our context


_POLL = 0.002
_SAME_MOMENT = 0.2
"""Seconds in which a process that has ended is reaped."""


@dataclass(frozen=True, slots=True)
class Qemu:
    """Launches QEMU VMs. `vsock_program` is None where the kernel has vhost-vsock; `timeout` (seconds) bounds each
    step.
    """

    vsock_program: str | None
    tsc_khz: int
    timeout: float

    def identity(self, spec: VmSpec) -> str:
        """Return QEMU's command line, without what differs from start to start, and which QEMU it is."""
        binary = os.stat(spec.binary)
        words = cmdline.command(spec, monitor_fd=0, tsc_khz=0, incoming=True)
        return "\0".join([*words, str(binary.st_size), str(binary.st_mtime_ns)])

    @asynccontextmanager
    async def launch(self, spec: VmSpec, origin: Origin, place: Place) -> AsyncIterator["QemuVm"]:
        """Start QEMU with `spec`, paused. Raises HostMissing, SandboxDied, StepTimeout."""
        template = origin if isinstance(origin, Template) else None
        async with AsyncExitStack() as stack:
            ours, theirs = socket.socketpair()
            with theirs, ExitStack() as inherited:
                fds = [theirs.fileno()]
                memory = str(origin.memory) if isinstance(origin, Boot) and origin.memory else None
                if template:
                    ram = inherited.enter_context(open(os.memfd_create("pymicro-ram"), "r+b", buffering=0))
                    fds.append(ram.fileno())
                    memory = f"/proc/self/fd/{ram.fileno()}"
                    os.truncate(ram.fileno(), spec.memory_mib << 20)
                argv = cmdline.command(
                    spec, monitor_fd=fds[0], tsc_khz=self.tsc_khz, memory=memory, incoming=template is not None
                )
                process = spawn("qemu", argv, place, fds)
                stack.push_async_callback(process.kill)
                if template:  # while QEMU starts
                    copy_populated(template.memory, ram.fileno())
            vm = QemuVm(process, place, self, stack)
            stack.push_async_callback(vm.disconnect)
            await vm.connect(ours)
            if template:
                await vm.load(template.state)
            yield vm


class QemuVm:
    """One QEMU process and the helpers that its devices need."""

    def __init__(self, process: Process, place: Place, hypervisor: Qemu, stack: AsyncExitStack) -> None:
        self.pid = process.pid
        self._process = process
        self._place = place
        self._hypervisor = hypervisor
        self._stack = stack
        self._helpers: list[Process] = []
        self._qmp = QMPClient("pymicro")
        self._listener: Listener | None = None
        self._free_ports = [f"port{n}" for n in reversed(range(cmdline.ROOT_PORTS))]

    def __repr__(self) -> str:
        return f"<QemuVm {self._process!r} devices={cmdline.ROOT_PORTS - len(self._free_ports)}>"

    async def connect(self, monitor: socket.socket) -> None:
        """Shake hands with the monitor."""
        await self._step("its monitor", self._qmp.connect(monitor))

    async def disconnect(self) -> None:
        """Let the monitor go; whatever it says is of no interest any more."""
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
        match device:
            case Share():
                await self._add_chardev("share", device.socket)
                await self._add_device(port, {"driver": "vhost-user-fs-pci", "chardev": "share", "tag": device.tag})
            case Vsock():
                hypervisor = self._hypervisor
                backend = await self._stack.enter_async_context(
                    vsock_backend(hypervisor.vsock_program, self._place, hypervisor.timeout)
                )
                self._listener = backend.listener
                properties = dict(backend.properties)
                if backend.helper:
                    self._helpers.append(backend.helper)
                if backend.chardev_path:
                    await self._add_chardev("vsock", backend.chardev_path)
                    properties["chardev"] = "vsock"
                await self._add_device(port, properties)

    async def _add_chardev(self, name: str, path: Path) -> None:
        address = {"type": "unix", "data": {"path": str(path)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self._execute("chardev-add", {"id": name, "backend": backend})

    async def _add_device(self, port: str, properties: dict[str, Any]) -> None:  # JSON of any kind
        await self._execute("device_add", {"id": f"device-{port}", "bus": port, **properties})

    async def resume(self) -> None:
        """Let the guest run. Raises SandboxDied, StepTimeout."""
        await self._execute("cont")

    async def accept(self) -> Channel:
        """Return the next connection that the guest opens. Raises SandboxDied when the VM ends first."""
        assert self._listener is not None, "attach a Vsock before accept()"
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

    async def save(self, state: Path) -> None:
        """Stop the VM and write the state of its devices; its RAM stays in its file. Raises SandboxDied,
        StepTimeout.
        """
        await self._execute("stop")
        await self._migrate_devices_alone()
        with open(state, "xb") as file:
            self._qmp.send_fd_scm(file.fileno())
            await self._execute("getfd", {"fdname": "state"})
            await self._execute("migrate", {"uri": "fd:state"})
            await self._step("migrate", self._migrated())

    async def load(self, state: Path) -> None:
        """Take on the state that save() wrote. Raises SandboxDied, StepTimeout."""
        await self._migrate_devices_alone()
        with open(state, "rb") as file:
            self._qmp.send_fd_scm(file.fileno())
            await self._execute("getfd", {"fdname": "state"})
            await self._execute("migrate-incoming", {"uri": "fd:state"})
            await self._step("migrate-incoming", self._migrated())

    async def _migrate_devices_alone(self) -> None:
        """Leave RAM out of the state: it is in a file of its own."""
        capability = {"capability": "x-ignore-shared", "state": True}
        await self._execute("migrate-set-capabilities", {"capabilities": [capability]})

    async def _migrated(self) -> None:
        while True:
            progress = await self._qmp.execute("query-migrate")
            status = progress.get("status") if isinstance(progress, dict) else None
            if status == "completed":
                return
            if status in {"failed", "cancelled"}:
                raise SandboxDied(f"QEMU could not move the VM's state: {progress}")
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
        words = self._last_words if process is self._process else process.last_lines[-10:]
        return VmExit(process.name, ended.result(), words)

    @property
    def _last_words(self) -> Sequence[str]:
        """What QEMU itself said, without the guest's console."""
        return self._process.logs[1].lines[-10:]

    def console(self) -> Sequence[str]:
        """Return the last lines of the guest's console."""
        return self._process.logs[0].lines

    async def _execute(self, command: str, arguments: dict[str, Any] | None = None) -> None:  # JSON of any kind
        await self._step(command, self._qmp.execute(command, arguments))

    async def _step(self, what: str, call: Any) -> None:  # any awaitable; its result is of no interest
        limit = self._hypervisor.timeout
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
