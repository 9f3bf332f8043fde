"""The VMMs as tests meet them behind the shim's interface: which there are here, and one VM of each."""

import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pymicro.shim import host
from pymicro.shim.channel.base import Channel
from pymicro.shim.config import Paths, Settings, Timeouts, Vm
from pymicro.shim.errors import ShimError
from pymicro.shim.hypervisor import registry, virtiofsd
from pymicro.shim.hypervisor.base import Boot, Hypervisor, Origin, Share, VmSpec
from pymicro.shim.hypervisor.base import Vm as RunningVm
from pymicro.shim.hypervisor.fake import FakeHypervisor
from pymicro.shim.spawn import Place
from pymicro.wire import frames, messages

from tests.framework.settings import CLOUD_HYPERVISOR, dev_paths

STEP = 60.0
"""Seconds for each command to a VMM: an emulated KVM host is slow."""
FAKE = VmSpec("fake", Path("/k"), Path("/i"), 1, 256, "tcg")


@dataclass(frozen=True, slots=True)
class Vmm:
    """A VMM that VMs of `spec` can be made with; `settings` where it is a real one."""

    hypervisor: Hypervisor
    spec: VmSpec
    settings: Settings | None = None

    @asynccontextmanager
    async def running(self, place: Place, origin: Origin | None = None) -> AsyncIterator[RunningVm]:
        """Yield a VM that has its vsock and its share."""
        with ExitStack() as stack:
            if self.settings:
                (place.directory / "share").mkdir(exist_ok=True)
                socket = place.directory / "fs.sock"
                program = host.find_virtiofsd(self.settings)
                stack.callback(virtiofsd.start(program, place.directory / "share", socket, place).end)
                stack.callback(socket.unlink, missing_ok=True)
            spawned = self.hypervisor.spawn(self.spec, origin or Boot(), place, vsock=True)
            stack.callback(spawned.end)
            spawned.wake()
            async with self.hypervisor.take_over(spawned) as vm:
                await vm.attach(Share(messages.SHARE_TAG, place.directory / "fs.sock"))
                yield vm


def find(name: str) -> Vmm:
    """Return the VMM called `name`: "fake", or one of those that the settings can name. Skips where it cannot run."""
    if name == "fake":
        return Vmm(FakeHypervisor(), FAKE)
    if os.geteuid():
        pytest.skip(f"{name} is not run: virtiofsd needs root")
    vm = Vm(hypervisor=name)  # type: ignore[arg-type]  # one of registry.NAMES
    settings = Settings(vm=vm, paths=Paths(**dev_paths()), timeouts=Timeouts(vmm=STEP))
    try:
        spec = VmSpec(
            binary=registry.binary(settings),
            kernel=Path(settings.paths.kernel),
            image=Path(settings.paths.image),
            vcpus=1,
            memory_mib=256,
            accel=registry.accel(settings),
        )
        return Vmm(registry.hypervisor(settings), spec, settings)
    except ShimError as error:
        if name == "cloud-hypervisor":
            pytest.skip(f"{name} is not run: {error} ({CLOUD_HYPERVISOR}=<program> names one)")
        raise


async def hello(vm: RunningVm) -> tuple[Channel, dict[str, object]]:
    """Return the guest's first connection, and what it says first."""
    channel = await vm.accept()
    return channel, await channel.read_message()


async def ask(channel: Channel, method: str, **params: object) -> dict[str, object]:
    """Return the agent's reply to a request."""
    await channel.write(frames.encode({"id": 1, "now_ns": time.time_ns(), "method": method, "params": params}))
    while "id" not in (reply := await channel.read_message()):
        pass
    return reply
