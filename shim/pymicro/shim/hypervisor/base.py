"""The interface that every VMM backend implements: spawn, wake, take over, attach the pod's devices.

A VmSpec holds only what every pod of that size shares. Whatever belongs to one pod (its vsock, share, NICs, disks) is
plugged in, so that a VM booted from the kernel and one restored from a template differ in one argument.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

from msgspec import Struct
from pymicro.shim.spawn import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.channel.base import Channel

Accel = Literal["kvm", "tcg"]


class VmSpec(Struct, frozen=True):
    """The shape of a VM. Memory in MiB; `accel` is what was proved to work, never "auto"."""

    binary: str
    kernel: Path
    image: Path
    vcpus: int
    memory_mib: int
    accel: Accel


class Boot(Struct, frozen=True):
    """Origin of a VM that starts its kernel. A VM that is to be saved keeps its RAM in the file `memory`."""

    memory: Path | None = None


class Template(Struct, frozen=True):
    """Origin of a VM that goes on where another one was saved: its RAM and the state of its devices."""

    memory: Path
    state: Path


Origin = Boot | Template


class Share(Struct, frozen=True):
    """A virtio-fs share: the guest mounts `tag`; `socket` is the listening vhost-user socket of its virtiofsd."""

    tag: str
    socket: Path


Device = Share
"""What can be plugged into a VM that runs. NICs and disks will join it."""


class VmExit(Struct, frozen=True):
    """Why a VM is gone: which process ended first, how, the last lines it (or the console) wrote, and what the VMM
    itself calls the reason.
    """

    process: str
    status: int
    last_lines: Sequence[str]
    reason: str = ""

    def __str__(self) -> str:
        tail = "; its last lines: " + " | ".join(self.last_lines) if self.last_lines else ""
        how = f"signal {-self.status}" if self.status < 0 else f"status {self.status}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.process} ended with {how}{reason}{tail}"


class Vm(Protocol):
    """A VM whose guest runs."""

    pid: int

    async def attach(self, device: Device) -> None:
        """Plug `device` in; the guest finds it. Raises SandboxDied, HostMissing, StepTimeout."""

    async def accept(self) -> "Channel":
        """Wait for the next connection that the guest opens to its host port: it has a vsock device. Raises
        SandboxDied.
        """

    async def console_says(self, text: str) -> None:
        """Wait until the guest's console has shown `text`. Raises SandboxDied."""

    async def save(self, state: Path) -> None:
        """Stop the VM, spawned with Boot(memory), and write its state; the two files then make a Template.

        Raises SandboxDied, StepTimeout.
        """

    async def wait(self) -> VmExit:
        """Wait until the VMM or one of its helpers is gone."""

    def console(self) -> Sequence[str]:
        """Return the last lines that the guest wrote to its console."""


class Spawned(Protocol):
    """A VMM that has been started and that nobody drives yet."""

    def wake(self) -> None:
        """Wait until the VMM is ready, plug the vsock in, and let the guest run. Raises SandboxDied, StepTimeout,
        OSError.
        """

    def end(self) -> None:
        """End it, unless somebody has taken it over, and free what it took. Idempotent."""


class Hypervisor(Protocol):
    """A VMM backend.

    A VM comes up in three steps, of which two are plain code: its guest runs before what drives it is imported.
    """

    def identity(self, spec: VmSpec) -> str:
        """Return what a template for `spec` depends on beside the files that it names: the arguments."""

    def spawn(self, spec: VmSpec, origin: Origin, place: Place, *, vsock: bool) -> Spawned:
        """Start a VMM with `spec`, paused, that will be given a `vsock` or not; wait for nothing. Raises HostMissing,
        OSError.
        """

    def take_over(self, spawned: Any) -> AbstractAsyncContextManager[Vm]:  # what this backend's spawn() returned
        """Yield the VM that has been woken. Leaving the context ends it and frees what it took. Raises SandboxDied,
        StepTimeout.
        """
