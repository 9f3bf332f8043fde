"""Making templates: once for all who need one, within bounds, and whatever fails, the pod boots and nothing is left."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from pymicro.shim import freeing, state, template_files
from pymicro.shim.errors import SandboxDied
from pymicro.shim.hypervisor.base import Boot, Origin, Template
from pymicro.shim.hypervisor.fake import FakeVm
from pymicro.shim.template_builder import Builder
from pymicro.shim.templates import Store

from tests.framework.fakes import asynchronous, no_descriptor_leaks
from tests.unit.template_harness import Bench, bench_in, fill, warnings_said


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return bench_in(tmp_path)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make guests that never get ready."""

    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(FakeVm, "console_says", never)
    yield
    monkeypatch.undo()


async def cold(bench: Bench) -> str:
    """Start a pod that must boot cold and leave the store empty; return the one warning."""
    with warnings_said() as said, no_descriptor_leaks():
        assert await bench.origin() == Boot()
    assert bench.hypervisor.running == 0
    assert bench.left() == []
    (warning,) = said
    assert warning.startswith("no template for this pod, it boots cold: ")
    return warning


# --- made once


@asynchronous
async def test_built_once_and_used_again(bench: Bench) -> None:
    with no_descriptor_leaks():
        first = await bench.template()
    assert await bench.template() == first
    hypervisor = bench.hypervisor
    assert len(hypervisor.vms) == 1
    assert hypervisor.running == 0
    assert isinstance(hypervisor.origins[0], Boot)
    assert first.memory.stat().st_size == bench.spec.memory_mib << 20
    assert not hypervisor.guest.requests, "nothing of a pod is in a template"
    assert not hypervisor.vms[0].devices
    assert bench.left() == [bench.name]


@asynchronous
async def test_many_starts_at_the_same_time_build_one(bench: Bench) -> None:
    origins = await asyncio.gather(*(bench.origin() for _ in range(20)))
    assert set(origins) == {await bench.template()}
    assert len(bench.hypervisor.vms) == 1
    assert bench.left() == [bench.name]


@asynchronous
async def test_those_who_wait_need_not_queue_for_the_lock(bench: Bench, tmp_path: Path) -> None:
    built = await bench.template()
    bench.where.rename(tmp_path / "aside")
    lock = bench.store.try_lock(bench.name)
    assert lock
    with lock:
        waiting = asyncio.create_task(bench.origin())
        await asyncio.sleep(0.01)
        (tmp_path / "aside").rename(bench.where)
        assert await waiting == built


@pytest.mark.usefixtures("endless")
@asynchronous
async def test_start_that_does_not_wait_boots_cold_at_once(bench: Bench) -> None:
    building = asyncio.create_task(bench.origin())
    await asyncio.sleep(0.02)
    bench.wait = False
    async with asyncio.timeout(0.5):
        assert await bench.origin() == Boot()
    assert len(bench.hypervisor.vms) == 1
    building.cancel()
    await asyncio.wait([building])


@pytest.mark.usefixtures("endless")
@asynchronous
async def test_start_that_waits_too_long_boots_cold(bench: Bench) -> None:
    building = asyncio.create_task(bench.origin())
    await asyncio.sleep(0.02)
    bench.timeout = 0.1
    with warnings_said() as said:
        assert await bench.origin() == Boot()
    (warning,) = said
    assert f"another start did not finish template {bench.name} in 0.1 s (timeouts.hello)" in warning
    building.cancel()
    await asyncio.wait([building])


# --- failure


def fail(_origin: Origin) -> None:
    raise SandboxDied("qemu ended with status 1")


@asynchronous
async def test_failure_to_build_means_a_cold_boot(bench: Bench) -> None:
    bench.hypervisor.spoil = fail
    assert (await cold(bench)).endswith("boots cold: qemu ended with status 1")


@pytest.mark.usefixtures("endless")
@asynchronous
async def test_guest_that_never_gets_ready_means_a_cold_boot(bench: Bench) -> None:
    bench.timeout = 0.05
    assert "the guest was not ready in 0.05 s (timeouts.hello)" in await cold(bench)


@pytest.mark.usefixtures("endless")
@asynchronous
async def test_cancelled_builder_leaves_nothing(bench: Bench) -> None:
    building = asyncio.create_task(bench.origin())
    await asyncio.sleep(0.02)
    building.cancel()
    await asyncio.wait([building])
    assert building.cancelled()
    assert bench.hypervisor.running == 0
    assert bench.left() == []


@asynchronous
async def test_kernel_that_is_replaced_meanwhile_gives_no_template(bench: Bench) -> None:
    def replace_kernel(_origin: Origin) -> None:
        bench.spec.kernel.write_text("a newer kernel")

    bench.hypervisor.spoil = replace_kernel
    assert "was replaced while its template was made" in await cold(bench)


@asynchronous
async def test_missing_kernel_means_a_cold_boot(bench: Bench) -> None:
    bench.store.claim()
    bench.spec.kernel.unlink()
    assert str(bench.spec.kernel) in await cold(bench)


# --- a file system that is full


def file_system(monkeypatch: pytest.MonkeyPatch, *free: int | None) -> None:
    """Let the file system have `free` MiB left, at one look after the other; None where it has no limit."""
    looks = iter(free)

    def statvfs(_path: object) -> Any:  # what os.statvfs returns has no public constructor
        mib = next(looks)
        return SimpleNamespace(f_frsize=1 << 20, f_bavail=mib or 0, f_blocks=0 if mib is None else 100)

    monkeypatch.setattr(os, "statvfs", statvfs)


@asynchronous
async def test_too_little_room_is_found_before_a_vm_is_started(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file_system(monkeypatch, 3)
    warning = await cold(bench)
    assert f"{bench.store.directory} (templates.directory) is on a file system with 3 MiB left" in warning
    assert "takes about 4 MiB" in warning
    assert not bench.hypervisor.vms


@asynchronous
async def test_room_is_measured_by_templates_of_the_same_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.template()
    file_system(monkeypatch, 2)
    await bench.template(replace(bench.spec, vcpus=2))


@asynchronous
async def test_file_system_without_a_limit_has_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file_system(monkeypatch, None)
    await bench.template()


@asynchronous
async def test_vm_that_dies_of_a_full_file_system_is_told_apart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest whose RAM finds no room has its VMM killed by SIGBUS, which says nothing."""

    def killed(_origin: Origin) -> None:
        raise SandboxDied("qemu ended with signal 7")

    bench.hypervisor.spoil = killed
    file_system(monkeypatch, 4, 0)
    warning = await cold(bench)
    assert f"the file system of {bench.store.directory} (templates.directory) is full" in warning
    assert "qemu ended with signal 7" in warning


@asynchronous
async def test_large_vms_need_more_room(bench: Bench) -> None:
    builder = Builder(Store(bench.store.directory, 2, 512), 1)
    large = replace(bench.spec, memory_mib=16384)
    assert builder._likely_mib(large) == 437
    assert builder._likely_mib(replace(large, memory_mib=256)) == 101


# --- bounds


@asynchronous
async def test_the_least_recently_used_go(bench: Bench) -> None:
    specs = [replace(bench.spec, vcpus=vcpus) for vcpus in (1, 2, 3)]
    names = [(await bench.template(spec)).memory.parent.name for spec in specs[:2]]
    os.utime(bench.store.directory / names[0], (1, 1))
    os.utime(bench.store.directory / names[1], (2, 2))
    await bench.template(specs[0])  # used again
    names.append((await bench.template(specs[2])).memory.parent.name)
    assert set(bench.store.names()) == {names[0], names[2]}


@asynchronous
async def test_all_together_hold_no_more_than_they_may(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, most=8, most_mib=5)
    bench.hypervisor.spoil = fill(2)
    names = []
    for vcpus in (1, 2, 3):
        names.append((await bench.template(replace(bench.spec, vcpus=vcpus))).memory.parent.name)
        os.utime(bench.store.directory / names[-1], (vcpus, vcpus))
    assert bench.store.names() == names[1:]
    assert sum(template_files.held_bytes(bench.store.directory / name) for name in names) <= 5 << 20


@asynchronous
async def test_one_that_alone_is_too_large_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_in(tmp_path, most_mib=2)
    monkeypatch.setattr(Builder, "_likely_mib", lambda *_: 1)
    bench.hypervisor.spoil = fill(3)
    assert "takes about 4 MiB, more than templates.most_mib = 2: raise that" in await cold(bench)


@asynchronous
async def test_one_that_is_bound_to_be_too_large_is_not_tried(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, most_mib=2)
    assert "more than templates.most_mib = 2" in await cold(bench)
    assert not bench.hypervisor.vms


@asynchronous
async def test_new_one_outlives_the_bounds_for_others(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, most=1)
    await bench.template(replace(bench.spec, vcpus=2))
    newest = await bench.template()
    assert bench.store.names() == [newest.memory.parent.name]


@asynchronous
async def test_whoever_makes_one_removes_what_nobody_can_use(bench: Bench) -> None:
    await bench.template()
    bench.spec.kernel.write_text("another kernel")
    damaged = await bench.template(replace(bench.spec, vcpus=2))
    damaged.state.unlink()
    half = bench.store.directory / "0123456789abcdef.12345"
    half.mkdir()
    with warnings_said() as said:
        await bench.template()
    assert bench.left() == [bench.name]
    assert said == [f"template {damaged.memory.parent.name} is removed: damaged: its state is missing"]


# --- builders that are killed


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_it_has_a_directory(patch: pytest.MonkeyPatch, _bench: Bench) -> None:
    patch.setattr(Builder, "_demand_room", die)


def before_it_has_a_vm(_patch: pytest.MonkeyPatch, bench: Bench) -> None:
    bench.hypervisor.spoil = die


def while_it_boots(patch: pytest.MonkeyPatch, _bench: Bench) -> None:
    patch.setattr(FakeVm, "console_says", die)


def while_it_saves(patch: pytest.MonkeyPatch, _bench: Bench) -> None:
    def half(_vm: FakeVm, path: Path) -> None:
        path.write_bytes(b"a f")
        die()

    patch.setattr(FakeVm, "save", half)


def while_it_writes_the_manifest(patch: pytest.MonkeyPatch, _bench: Bench) -> None:
    patch.setattr(template_files, "_memory_digest", die)


def before_it_is_in_its_place(patch: pytest.MonkeyPatch, _bench: Bench) -> None:
    patch.setattr(Builder, "_refuse_too_large", die)


def once_it_is_in_its_place(patch: pytest.MonkeyPatch, _bench: Bench) -> None:
    patch.setattr(Store, "bound", die)


KILLS = [
    before_it_has_a_directory,
    before_it_has_a_vm,
    while_it_boots,
    while_it_saves,
    while_it_writes_the_manifest,
    before_it_is_in_its_place,
    once_it_is_in_its_place,
]


def killed_builder(bench: Bench, when: Callable[[pytest.MonkeyPatch, Bench], None]) -> int:
    """Fork a builder that is killed at some point; return its pid."""
    if (pid := os.fork()) == 0:
        try:
            when(pytest.MonkeyPatch(), bench)
            asyncio.run(bench.origin())
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return pid


@pytest.mark.parametrize("when", KILLS)
def test_next_start_sweeps_what_a_killed_builder_left(
    bench: Bench, when: Callable[[pytest.MonkeyPatch, Bench], None]
) -> None:
    killed_builder(bench, when)
    with warnings_said() as said:
        if when is not once_it_is_in_its_place:
            assert isinstance(asyncio.run(bench.origin()), Template)
            assert bench.left() == [bench.name]
        asyncio.run(bench.template(replace(bench.spec, vcpus=2)))
    assert len(bench.left()) == len(bench.store.names()) == 2
    assert said == []


@pytest.mark.parametrize("when", KILLS)
def test_freeing_a_killed_shim_frees_the_memory_it_left(
    tmp_path: Path, bench: Bench, when: Callable[[pytest.MonkeyPatch, Bench], None]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    state.write(str(run), {"shim_pid": killed_builder(bench, when), "templates": str(bench.store.directory)})
    freeing.free(str(run))
    assert [name for name in bench.left() if not name.endswith(".lock")] == bench.store.names()
    bench.store.prune()
    assert bench.left() == bench.store.names()


def test_template_whose_removal_was_interrupted_is_no_template(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(bench.template())
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        bench.store.remove(bench.name)
    assert bench.store.names() == []
    assert list(bench.store.prune().values()) == ["half-made: its builder is gone"]
    assert bench.left() == []
