"""Templates: made once, found again, never used when anything about them has changed."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymicro.shim.errors import SandboxDied
from pymicro.shim.hypervisor.base import Boot, Template, VmSpec
from pymicro.shim.hypervisor.fake import FakeHypervisor, FakeVm
from pymicro.shim.spawn import Place
from pymicro.shim.templates import MANIFEST, MEMORY, STATE, Store, key

from tests.framework.fakes import asynchronous


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "templates", most=2, timeout=5)


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    for name in ("kernel", "image"):
        (tmp_path / name).write_text(name)
    return VmSpec("fake", tmp_path / "kernel", tmp_path / "image", vcpus=1, memory_mib=1, accel="tcg")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def damage_at(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@asynchronous
async def test_first_start_builds_and_later_ones_find_it(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    first = await store.origin(spec, hypervisor, place)
    second = await store.origin(spec, hypervisor, place)
    assert isinstance(first, Template)
    assert first == second
    assert len(hypervisor.vms) == 1, "the second start must not boot a VM to make a template"
    assert hypervisor.running == 0, "the VM that became the template must be gone"


@asynchronous
async def test_ten_first_starts_at_once_build_one(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    origins = await asyncio.gather(*(store.origin(spec, hypervisor, place) for _ in range(10)))
    assert len(set(map(str, origins))) == 1
    assert len(hypervisor.vms) == 1


@asynchronous
async def test_only_root_can_read_it(store: Store, spec: VmSpec, place: Place) -> None:
    await store.origin(spec, FakeHypervisor(), place)
    assert os.stat(store.directory).st_mode & 0o077 == 0


def offsets() -> Iterator[tuple[str, int]]:
    for offset in (0, 4095, 4096, 700_000, (1 << 20) - 1):
        yield MEMORY, offset
    for offset in range(len(b"devices")):
        yield STATE, offset


@pytest.mark.parametrize(("name", "offset"), list(offsets()))
def test_damage_at_any_place_is_noticed(
    store: Store, spec: VmSpec, place: Place, caplog: pytest.LogCaptureFixture, name: str, offset: int
) -> None:
    @asynchronous
    async def check() -> None:
        hypervisor = FakeHypervisor()
        template = await store.origin(spec, hypervisor, place)
        assert isinstance(template, Template)
        times = os.stat(template.memory.parent / name)
        damage_at(template.memory.parent / name, offset)
        os.utime(template.memory.parent / name, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert store.find(key(spec, hypervisor)) is None
        assert not template.memory.parent.exists(), "a damaged template is removed"
        assert "is discarded" in caplog.text

    check()


@asynchronous
async def test_manifest_damaged_at_any_byte_is_noticed(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    await store.origin(spec, hypervisor, place)
    size = (store.directory / key(spec, hypervisor) / MANIFEST).stat().st_size
    for offset in range(0, size, 7):
        await store.origin(spec, hypervisor, place)
        damage_at(store.directory / key(spec, hypervisor) / MANIFEST, offset)
        assert store.find(key(spec, hypervisor)) is None, f"a manifest damaged at byte {offset} was taken"


@pytest.mark.parametrize("name", [MANIFEST, MEMORY, STATE])
def test_a_missing_or_truncated_file_is_noticed(store: Store, spec: VmSpec, place: Place, name: str) -> None:
    @asynchronous
    async def check() -> None:
        hypervisor = FakeHypervisor()
        for ruin in (os.unlink, lambda path: os.truncate(path, os.stat(path).st_size // 2)):
            await store.origin(spec, hypervisor, place)
            ruin(store.directory / key(spec, hypervisor) / name)
            assert store.find(key(spec, hypervisor)) is None
            assert store.names() == []

    check()


@asynchronous
async def test_another_templates_files_are_not_taken(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    await store.origin(spec, hypervisor, place)
    other = VmSpec("fake", spec.kernel, spec.image, vcpus=2, memory_mib=1, accel="tcg")
    os.rename(store.directory / key(spec, hypervisor), store.directory / key(other, hypervisor))
    assert store.find(key(other, hypervisor)) is None


def test_key_names_all_that_shapes_it(spec: VmSpec) -> None:
    hypervisor = FakeHypervisor()
    before = key(spec, hypervisor)
    assert key(spec, hypervisor) == before
    assert key(VmSpec("fake", spec.kernel, spec.image, 2, 1, "tcg"), hypervisor) != before
    assert key(VmSpec("fake", spec.kernel, spec.image, 1, 2, "tcg"), hypervisor) != before
    spec.image.write_text("another image")
    assert key(spec, hypervisor) != before


@asynchronous
async def test_a_build_that_fails_means_a_cold_boot_and_leaves_nothing(
    store: Store, spec: VmSpec, place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_vm: FakeVm, _text: str) -> None:
        raise SandboxDied("qemu ended with status 1")

    monkeypatch.setattr(FakeVm, "console_says", never)
    origin = await store.origin(spec, FakeHypervisor(), place)
    assert origin == Boot()
    assert [record.levelname for record in caplog.records] == ["WARNING"], "exactly one warning says why"
    assert "qemu ended with status 1" in caplog.text
    assert [name for name in os.listdir(store.directory) if not name.endswith(".lock")] == []


@asynchronous
async def test_what_a_killed_builder_left_is_swept(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    half = store.directory / f"{key(spec, hypervisor)}.4242"
    half.mkdir(parents=True)
    (half / MEMORY).write_bytes(b"half")
    assert isinstance(await store.origin(spec, hypervisor, place), Template)
    assert not half.exists()


@asynchronous
async def test_no_more_than_the_setting_says_are_kept(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    for vcpus in (1, 2, 3):
        await store.origin(VmSpec("fake", spec.kernel, spec.image, vcpus, 1, "tcg"), hypervisor, place)
    names = store.names()
    assert len(names) == 2
    assert key(spec, hypervisor) not in names, "the least recently used one goes first"
