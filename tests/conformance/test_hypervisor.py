"""What every VMM backend promises to the code above it: one suite for the fake, QEMU and Cloud Hypervisor.

The real ones boot the real guest; Cloud Hypervisor where it is (CLOUD_HYPERVISOR, or PATH) and the host has KVM.
"""

import asyncio
import os
import signal
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from pymicro.shim.errors import HostMissing, SandboxDied
from pymicro.shim.hypervisor import registry
from pymicro.shim.hypervisor.base import Boot, Template
from pymicro.shim.spawn import Place
from pymicro.wire import messages

from tests.framework import vmm as vmms
from tests.framework.fakes import descriptors
from tests.framework.processes import all_processes
from tests.framework.vmm import Vmm, ask, hello

LIMIT = 250.0
"""Seconds for a test: on a host whose KVM is emulated a boot takes half a minute."""
NOTICED = 1.0
"""Seconds until a dead VMM is noticed."""

pytestmark = pytest.mark.timeout(LIMIT + 50)
REAL = [pytest.param(name, marks=pytest.mark.vm) for name in registry.NAMES]
ANY = ["fake", *REAL]


@pytest.fixture(scope="module")
def vmm(request: pytest.FixtureRequest) -> Vmm:
    return vmms.find(request.param)


every_vmm = pytest.mark.parametrize("vmm", ANY, indirect=True, scope="module")
every_real_vmm = pytest.mark.parametrize("vmm", REAL, indirect=True, scope="module")


@pytest.fixture
def place() -> Iterator[Place]:
    """A directory with a short name: paths of sockets are limited. Afterwards only directories may be left in it."""
    before, children = descriptors(), _children()
    with tempfile.TemporaryDirectory(prefix="pymicro-") as directory:
        yield Place(Path(directory))
        left = [path for path in Path(directory).rglob("*") if not path.is_dir()]
        assert left == []
    assert _children() == children
    assert [target for fd, target in descriptors().items() if fd not in before] == []


def _children() -> set[int]:
    return {process.pid for process in all_processes().values() if process.parent == os.getpid()}


@pytest.fixture(scope="module")
def template(vmm: Vmm) -> Iterator[Template]:
    """A saved VM; it is looked at again at the end, since no clone may change it."""
    with tempfile.TemporaryDirectory(prefix="pymicro-test-", dir="/dev/shm") as name:
        saved = Template(Path(name) / "memory", Path(name) / "state")
        with saved.memory.open("xb") as file:
            os.truncate(file.fileno(), vmm.spec.memory_mib << 20)
        run(save(vmm, saved))
        assert sorted(os.listdir(name)) == ["memory", "state"]
        before = saved.memory.stat().st_mtime_ns, saved.state.read_bytes()
        yield saved
        assert (saved.memory.stat().st_mtime_ns, saved.state.read_bytes()) == before


async def save(vmm: Vmm, saved: Template) -> None:
    with tempfile.TemporaryDirectory(prefix="pymicro-") as directory:
        spawned = vmm.hypervisor.spawn(vmm.spec, Boot(saved.memory), Place(Path(directory)), vsock=False)
        try:
            spawned.wake()
            async with vmm.hypervisor.take_over(spawned) as vm:
                await vm.console_says(messages.READY)
                await vm.save(saved.state)
        finally:
            spawned.end()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT):
            await test

    asyncio.run(limited())


async def serves(vmm: Vmm, place: Place, origin: Boot | Template) -> None:
    """A VM from `origin` says hello, finds its share, and ends with its context."""
    async with vmm.running(place, origin) as vm:
        channel, said = await hello(vm)
        assert (said["hello"], said["version"]) == ("control", messages.PROTOCOL_VERSION)
        setup = {"hostname": "pod", "machine_id": "0" * 32, "entropy": "00" * 64}
        reply = await ask(channel, "setup", **setup)
        assert "result" in reply, f"the guest could not mount its share: {reply}"
        channel.close()


@every_vmm
def test_vm_that_boots_says_hello_and_finds_its_share(vmm: Vmm, place: Place) -> None:
    run(serves(vmm, place, Boot()))


@every_vmm
def test_vms_that_go_on_from_a_saved_one_do_too(vmm: Vmm, place: Place, template: Template) -> None:
    run(serves(vmm, place, template))
    run(serves(vmm, place, template))


@every_vmm
def test_vm_that_nobody_takes_over_is_freed_whenever_it_is_ended(vmm: Vmm, place: Place) -> None:
    for wakes in (False, True):
        spawned = vmm.hypervisor.spawn(vmm.spec, Boot(), place, vsock=True)
        if wakes and vmm.settings:  # a fake guest needs a loop
            spawned.wake()
        spawned.end()
        spawned.end()
        assert [path for path in place.directory.rglob("*") if not path.is_dir()] == []


@every_vmm
def test_templates_of_other_sizes_are_others(vmm: Vmm) -> None:
    larger = replace(vmm.spec, memory_mib=512)
    assert vmm.hypervisor.identity(vmm.spec) == vmm.hypervisor.identity(vmm.spec)
    assert vmm.hypervisor.identity(vmm.spec) != vmm.hypervisor.identity(larger)


@every_real_vmm
def test_killed_vmm_is_noticed_by_all_who_wait(vmm: Vmm, place: Place, template: Template) -> None:
    async def test() -> None:
        async with vmm.running(place, template) as vm:
            channel, _ = await hello(vm)
            waiting = asyncio.ensure_future(vm.accept())
            os.kill(vm.pid, signal.SIGKILL)
            async with asyncio.timeout(NOTICED):
                ended = await vm.wait()
                with pytest.raises(SandboxDied, match="ended with signal 9"):
                    await waiting
            assert ended.status == -signal.SIGKILL
            channel.close()

    run(test())


@every_real_vmm
def test_guest_that_ends_by_itself_is_the_end_of_the_vm(vmm: Vmm, place: Place, template: Template) -> None:
    """The agent ends without its control connection: a VM that then booted anew would look alive."""

    async def test() -> None:
        async with vmm.running(place, template) as vm:
            channel, _ = await hello(vm)
            channel.close()
            ended = await vm.wait()
            assert (ended.status, ended.reason) == (0, "guest-reset")
            assert any("Kernel panic" in line for line in vm.console())

    run(test())


@every_real_vmm
def test_program_that_is_not_there_is_named(vmm: Vmm, place: Place) -> None:
    spawned = vmm.hypervisor.spawn(replace(vmm.spec, binary="/no/such/vmm"), Boot(), place, vsock=False)
    try:
        with pytest.raises(HostMissing, match="/no/such/vmm"):
            spawned.wake()
    finally:
        spawned.end()


@every_real_vmm
def test_kernel_that_is_none_is_the_vmms_error(vmm: Vmm, place: Place, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_text("not a kernel")
    spawned = vmm.hypervisor.spawn(replace(vmm.spec, kernel=tmp_path / "vmlinux"), Boot(), place, vsock=False)
    try:
        with pytest.raises(SandboxDied, match=r"(?i)kernel|boot"):
            spawned.wake()
    finally:
        spawned.end()


@every_real_vmm
def test_saved_state_that_is_none_is_an_error_of_that_start(vmm: Vmm, place: Place, template: Template) -> None:
    garbage = place.directory / "garbage"
    garbage.write_bytes(b'{"cpus": 1}\nnot a state')
    try:
        with pytest.raises(SandboxDied):
            _wake(vmm, Template(template.memory, garbage), place)
    finally:
        garbage.unlink()


def _wake(vmm: Vmm, origin: Template, place: Place) -> None:
    spawned = vmm.hypervisor.spawn(vmm.spec, origin, place, vsock=False)
    try:
        spawned.wake()
    finally:
        spawned.end()
