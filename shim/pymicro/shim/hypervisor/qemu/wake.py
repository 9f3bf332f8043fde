"""Waking a QEMU VM: from the process that has just been started to the guest that runs, in plain code."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymicro.shim.errors import SandboxDied, StepTimeout
from pymicro.shim.hypervisor.base import Origin, Template
from pymicro.shim.hypervisor.ending import ended, step
from pymicro.shim.hypervisor.qemu import commands
from pymicro.shim.hypervisor.qemu.memory import Filling
from pymicro.shim.hypervisor.qemu.monitor import Monitor, Refused
from pymicro.shim.hypervisor.qemu.vsock import VsockBackend
from pymicro.shim.spawn import Child

Json = dict[str, Any]
"""An object of JSON: its values are of any kind."""

_POLL = 0.002
_SAME_MOMENT = 0.2
"""Seconds in which a process that has ended can be reaped."""


class Waking:
    """Brings one VM up. `timeout` (seconds) bounds each step.

    Every method raises SandboxDied, StepTimeout, and HostMissing for a program that could not be started.
    """

    def __init__(self, qemu: Child, monitor: Monitor, vsock: VsockBackend | None, timeout: float) -> None:
        self._qemu = qemu
        self._monitor = monitor
        self._vsock = vsock
        self._timeout = timeout

    def run(self, origin: Origin, filling: Filling) -> None:
        """Wait until QEMU is ready, load its state, plug the vsock in, and let the guest run. Raises OSError where the
        template's pages cannot be copied.
        """
        with self._step("its monitor"):
            self._monitor.greet()
        filling.wait()
        if isinstance(origin, Template):
            self._load(origin.state)
        if self._vsock:
            self._plug(self._vsock)
        self._execute("cont")

    def _load(self, state: Path) -> None:
        """Take on the state that QemuVm.save() wrote."""
        self._execute(*commands.DEVICES_ALONE)
        with open(state, "rb") as file:
            self._execute("getfd", {"fdname": "state"}, fd=file.fileno())
            self._execute("migrate-incoming", {"uri": "fd:state"})
            self._until(self._migrated, "QEMU did not load the VM's state")

    def _migrated(self) -> bool:
        return commands.migrated(self._execute("query-migrate"))

    def _plug(self, vsock: VsockBackend) -> None:
        """Give the VM its vsock, in the first of its ports."""
        if vsock.child and vsock.chardev_path:
            name = vsock.child.name
            self._until(vsock.chardev_path.exists, f"{name} did not create {vsock.chardev_path}", vsock.child)
            self._execute(*commands.add_chardev("vsock", vsock.chardev_path))
        self._execute(*commands.add_device(0, vsock.properties))

    def _until(self, holds: Callable[[], bool], failure: str, helper: Child | None = None) -> None:
        deadline = time.monotonic() + self._timeout
        while not holds():
            if helper and (dead := ended(helper)):
                raise SandboxDied(str(dead))
            if time.monotonic() > deadline:
                words = (helper or self._qemu).last_words()
                raise StepTimeout(f"{failure} in {self._timeout:g} s (timeouts.vmm); its last lines: {words}")
            time.sleep(_POLL)

    def _execute(self, command: str, arguments: Json | None = None, *, fd: int | None = None) -> object:
        with self._step(command):
            return self._monitor.execute(command, arguments, fd=fd)

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        """Name the step `what` in whatever goes wrong with it."""
        try:
            with step("QEMU", self._qemu, what, self._timeout):
                yield
        except Refused as error:
            why = f"QEMU refused {what}: {error}"
            dead = ended(self._vsock.child, _SAME_MOMENT) if self._vsock and self._vsock.child else None
            raise SandboxDied(f"{dead} ({why})" if dead else why) from error
