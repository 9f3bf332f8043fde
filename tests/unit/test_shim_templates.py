"""Templates: one per shape, built once, never used when anything about them is off, and never in a start's way."""

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from pymicro.shim import templates
from pymicro.shim.config import Templates, Vm
from pymicro.shim.errors import SandboxDied
from pymicro.shim.hypervisor.base import Boot, Origin, Template, VmSpec
from pymicro.shim.hypervisor.fake import FakeHypervisor
from pymicro.shim.spawn import Place
from pymicro.shim.templates import Store

from tests.framework.fakes import asynchronous
from tests.unit.sandbox_harness import SETTINGS, Pod, pod, settings_like


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    for name in ("kernel", "image"):
        (tmp_path / name).write_text(name)
    return VmSpec("/qemu", tmp_path / "kernel", tmp_path / "image", 1, 1, "tcg")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "templates", most=2, timeout=2)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def template(store: Store, spec: VmSpec, hypervisor: FakeHypervisor, place: Place) -> Template:
    origin = await store.origin(spec, hypervisor, place)
    assert isinstance(origin, Template), "it boots cold"
    return origin


@asynchronous
async def test_built_once_and_used_again(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    first = await template(store, spec, hypervisor, place)
    assert await template(store, spec, hypervisor, place) == first
    assert len(hypervisor.vms) == 1
    assert hypervisor.running == 0
    assert isinstance(hypervisor.origins[0], Boot)
    assert first.memory.stat().st_size == spec.memory_mib << 20
    assert not hypervisor.guest.requests, "nothing of a pod is in a template"
    assert not hypervisor.vms[0].devices


@asynchronous
async def test_only_their_user_can_read_them(store: Store, spec: VmSpec, place: Place) -> None:
    mask = os.umask(0)
    try:
        built = await template(store, spec, FakeHypervisor(), place)
    finally:
        os.umask(mask)
    for path in (store.directory, built.memory.parent):
        assert path.stat().st_mode & 0o077 == 0


@asynchronous
async def test_two_starts_at_the_same_time_build_one(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    first, second = await asyncio.gather(*(store.origin(spec, hypervisor, place) for _ in range(2)))
    assert first == second
    assert len(hypervisor.vms) == 1


@asynchronous
async def test_each_shape_has_its_own(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    one = await template(store, spec, hypervisor, place)
    other = await template(store, replace(spec, vcpus=2), hypervisor, place)
    assert one.memory.parent != other.memory.parent


@pytest.mark.parametrize("name", ["kernel", "image"])
@asynchronous
async def test_new_kernel_or_image_needs_a_new_one(store: Store, spec: VmSpec, place: Place, name: str) -> None:
    hypervisor = FakeHypervisor()
    before = await template(store, spec, hypervisor, place)
    path: Path = getattr(spec, name)
    path.write_text(f"another {name}")
    assert await template(store, spec, hypervisor, place) != before


@asynchronous
async def test_the_oldest_go(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    built = []
    for vcpus in (1, 2, 3):
        origin = await template(store, replace(spec, vcpus=vcpus), hypervisor, place)
        os.utime(origin.memory.parent, (vcpus, vcpus))
        built.append(origin.memory.parent.name)
    assert store.names() == built[1:]


def spoil_memory(where: Path) -> None:
    with (where / templates.MEMORY).open("r+b") as file:
        file.write(b"changed")


def spoil_memory_and_hide_it(where: Path) -> None:
    memory = where / templates.MEMORY
    before = memory.stat()
    spoil_memory(where)
    os.utime(memory, ns=(before.st_atime_ns, before.st_mtime_ns))


def spoil_state(where: Path) -> None:
    (where / templates.STATE).write_text("changed")


def spoil_manifest(where: Path) -> None:
    (where / templates.MANIFEST).write_text("{}")


def cut_manifest(where: Path) -> None:
    path = where / templates.MANIFEST
    path.write_text(path.read_text()[:-5])


def forge_manifest(where: Path) -> None:
    path = where / templates.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "0" * 64}))


def lose_state(where: Path) -> None:
    (where / templates.STATE).unlink()


def lose_memory(where: Path) -> None:
    (where / templates.MEMORY).unlink()


def lose_manifest(where: Path) -> None:
    (where / templates.MANIFEST).unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_memory,
        spoil_memory_and_hide_it,
        spoil_state,
        spoil_manifest,
        cut_manifest,
        forge_manifest,
        lose_state,
        lose_memory,
        lose_manifest,
    ],
)
@asynchronous
async def test_damaged_one_is_built_anew(store: Store, spec: VmSpec, place: Place, spoil: object) -> None:
    hypervisor = FakeHypervisor()
    built = await template(store, spec, hypervisor, place)
    spoil(built.memory.parent)  # type: ignore[operator]  # one of the functions above
    assert store.find(built.memory.parent.name) is None
    await template(store, spec, hypervisor, place)
    assert len(hypervisor.vms) == 2


@asynchronous
async def test_manifest_that_is_no_object(store: Store, spec: VmSpec, place: Place) -> None:
    built = await template(store, spec, FakeHypervisor(), place)
    for content in ("[]", "null", "7", '"x"'):
        built.memory.parent.mkdir(exist_ok=True)
        (built.memory.parent / templates.MANIFEST).write_text(content)
        assert store.find(built.memory.parent.name) is None


@asynchronous
async def test_what_a_killed_builder_left_is_swept(store: Store, spec: VmSpec, place: Place) -> None:
    hypervisor = FakeHypervisor()
    scratch = store.directory / f"{templates.key(spec, hypervisor)}.12345"
    scratch.mkdir(parents=True, mode=0o700)
    (scratch / templates.MEMORY).write_text("half")
    store.directory.chmod(0o700)
    await template(store, spec, hypervisor, place)
    assert not scratch.exists()


def fail(_origin: Origin) -> None:
    raise SandboxDied("qemu ended with status 1")


@asynchronous
async def test_failure_to_build_means_a_cold_boot(
    store: Store, spec: VmSpec, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    hypervisor = FakeHypervisor()
    hypervisor.spoil = fail
    assert await store.origin(spec, hypervisor, place) == Boot()
    assert "boots cold: qemu ended with status 1" in caplog.text
    assert [path.suffix for path in store.directory.iterdir()] == [".lock"], "a half-built one is left"


@asynchronous
async def test_cancelled_builder_leaves_nothing(store: Store, spec: VmSpec, place: Place) -> None:
    class Slow(FakeHypervisor):
        pass

    hypervisor = Slow()

    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pymicro.shim.hypervisor.fake.FakeVm.console_says", never)
        building = asyncio.create_task(store.origin(spec, hypervisor, place))
        await asyncio.sleep(0.02)
        building.cancel()
        await asyncio.wait([building])
    assert building.cancelled()
    assert hypervisor.running == 0
    assert [path.suffix for path in store.directory.iterdir()] == [".lock"]


@asynchronous
async def test_guest_that_never_gets_ready_means_a_cold_boot(tmp_path: Path, spec: VmSpec, place: Place) -> None:
    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pymicro.shim.hypervisor.fake.FakeVm.console_says", never)
        hypervisor = FakeHypervisor()
        store = Store(tmp_path / "templates", most=2, timeout=0.05)
        assert await store.origin(spec, hypervisor, place) == Boot()
        assert hypervisor.running == 0


@pytest.mark.parametrize("how", ["open to others", "a link", "somebody else's"])
@asynchronous
async def test_directory_that_others_control_is_not_used(
    tmp_path: Path, store: Store, spec: VmSpec, place: Place, how: str
) -> None:
    """It lies where everybody may create files: whoever made it first would own what every VM starts from."""
    if how == "open to others":
        store.directory.mkdir()
        store.directory.chmod(0o777)
    elif how == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        store.directory.symlink_to(tmp_path / "elsewhere")
    else:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        store.directory.mkdir(mode=0o700)
        os.chown(store.directory, 65534, 65534)
    hypervisor = FakeHypervisor()
    assert await store.origin(spec, hypervisor, place) == Boot()
    assert not hypervisor.vms


# --- a pod over a template


@asynchronous
async def test_pod_starts_from_a_template(tmp_path: Path, spec: VmSpec) -> None:
    settings = settings_like(vm=Vm(start="snapshot"), templates=Templates(directory=str(tmp_path / "templates")))
    async with pod(tmp_path, settings=settings, spec=spec) as p:
        await p.running()
        assert [type(origin) for origin in p.hypervisor.origins] == [Boot, Template]
        assert "create" in p.guest.methods()


@asynchronous
async def test_template_that_fails_is_discarded_and_the_pod_boots_cold(tmp_path: Path, spec: VmSpec) -> None:
    settings = settings_like(vm=Vm(start="snapshot"), templates=Templates(directory=str(tmp_path / "templates")))

    def prepare(p: Pod) -> None:
        def spoil(origin: Origin) -> None:
            if isinstance(origin, Template):
                raise SandboxDied("qemu refused the state")

        p.hypervisor.spoil = spoil

    async with pod(tmp_path, settings=settings, spec=spec, prepare=prepare) as p:
        container = await p.running()
        assert [type(origin) for origin in p.hypervisor.origins] == [Boot, Template, Boot]
        await p.guest.exit(0, "c1")
        assert (await container.init.wait()).status == 0
        assert p.log == ["create c1", "start c1", "exit c1 0"]
    assert Store(tmp_path / "templates", 8, 1).names() == []


@asynchronous
async def test_pod_that_wants_no_template(tmp_path: Path) -> None:
    async with pod(tmp_path, settings=SETTINGS) as p:
        await p.running()
        assert p.hypervisor.origins == [Boot()]
