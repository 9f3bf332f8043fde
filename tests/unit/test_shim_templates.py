"""Templates: one per shape, never used when anything about them is off, and removed when nobody can use them."""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from pymicro.shim import filelock
from pymicro.shim.config import Templates, Vm
from pymicro.shim.errors import SandboxDied
from pymicro.shim.hypervisor.base import Boot, Origin, Template
from pymicro.shim.template_files import MANIFEST, MEMORY, STATE
from pymicro.shim.templates import OK, Store

from tests.framework.fakes import asynchronous, no_descriptor_leaks
from tests.unit.sandbox_harness import SETTINGS, Pod, pod, settings_like
from tests.unit.template_harness import Bench, bench_in, fill, warnings_said


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return bench_in(tmp_path)


def a_moment_later() -> None:
    """Let the clock go on that file systems take a file's times from: up to 10 ms on older kernels."""
    time.sleep(0.011)


# --- which template is whose


@asynchronous
async def test_each_shape_has_its_own(bench: Bench) -> None:
    one = await bench.template()
    other = await bench.template(replace(bench.spec, vcpus=2))
    assert one.memory.parent != other.memory.parent


@pytest.mark.parametrize("name", ["kernel", "image", "vmm"])
@asynchronous
async def test_new_kernel_image_or_vmm_needs_a_new_one(bench: Bench, tmp_path: Path, name: str) -> None:
    before = await bench.template()
    (tmp_path / name).write_text(f"another {name}")
    assert await bench.template() != before


@asynchronous
async def test_only_their_user_can_read_them(bench: Bench) -> None:
    mask = os.umask(0)
    try:
        built = await bench.template()
    finally:
        os.umask(mask)
    for path in (bench.store.directory, built.memory.parent):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("how", ["open to others", "a link", "somebody else's"])
@asynchronous
async def test_directory_that_others_control_is_not_used(tmp_path: Path, bench: Bench, how: str) -> None:
    """It lies where everybody may create files: whoever made it first would own what every VM starts from."""
    directory = bench.store.directory
    if how == "open to others":
        directory.mkdir()
        directory.chmod(0o777)
    elif how == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        directory.symlink_to(tmp_path / "elsewhere")
    else:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        directory.mkdir(mode=0o700)
        os.chown(directory, 65534, 65534)
    with warnings_said() as said:
        assert await bench.origin() == Boot()
    assert not bench.hypervisor.vms
    (warning,) = said
    assert "boots cold" in warning
    assert "must be a directory that only this user can enter" in warning


def test_looking_for_one_imports_little() -> None:
    """It is done while everything else of the start waits."""
    code = "import sys; import pymicro.shim.templates; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"asyncio", "subprocess", "logging", "shutil"} & set(run.stdout.split())


# --- damage


@dataclass(frozen=True)
class Damage:
    """Something done to one of a template's files. `at` is a place in it, from 0 to 1."""

    how: str
    at: float = 0.5
    mask: bytes = b"\xff"

    def __call__(self, path: Path) -> None:
        getattr(self, self.how)(path)

    def write(self, path: Path) -> None:
        """Change every byte of a range."""
        with path.open("r+b") as file:
            begin = min(int(path.stat().st_size * self.at), path.stat().st_size - 1)
            old = os.pread(file.fileno(), len(self.mask), begin)
            os.pwrite(file.fileno(), bytes(a ^ b for a, b in zip(old, self.mask, strict=False)), begin)

    def write_and_hide(self, path: Path) -> None:
        before = path.stat()
        self.write(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def cut(self, path: Path) -> None:
        os.truncate(path, min(int(path.stat().st_size * self.at), path.stat().st_size - 1))

    def extend(self, path: Path) -> None:
        with path.open("ab") as file:
            file.write(self.mask)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def directory(self, path: Path) -> None:
        path.unlink()
        path.mkdir()

    def fifo(self, path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def link(self, path: Path) -> None:
        """Put a link to the very same content in its place."""
        path.rename(path.parent.parent.parent / "elsewhere")
        path.symlink_to(path.parent.parent.parent / "elsewhere")

    def copy(self, path: Path) -> None:
        """Put another file with the very same content in its place: RAM too large to be read must not be trusted."""
        shutil.copy2(path, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)


MASKS = st.binary(min_size=1, max_size=300).map(lambda data: bytes(byte or 1 for byte in data))
DAMAGES = st.one_of(
    st.builds(Damage, st.sampled_from(["write", "write_and_hide", "cut", "extend"]), st.floats(0, 1), MASKS),
    st.builds(Damage, st.sampled_from(["unlink", "directory", "fifo", "link"])),
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([MEMORY, STATE, MANIFEST]), DAMAGES)
@asynchronous
async def test_damage_costs_one_cold_boot_and_one_warning_and_then_there_is_a_new_one(
    file: str, damage: Damage
) -> None:
    with tempfile.TemporaryDirectory() as directory, warnings_said() as said:
        bench = bench_in(Path(directory))
        await bench.template()
        a_moment_later()
        damage(bench.where / file)
        with no_descriptor_leaks():
            assert isinstance(bench.store.look_up(bench.name), Boot)
        assert bench.left() == []
        assert len(said) == 1
        assert f"it boots cold: template {bench.name} is discarded: " in said[0]

        await bench.template()
        a_moment_later()
        damage(bench.where / file)
        assert await bench.origin() == Boot()
        assert bench.left() == []
        assert len(said) == 2
        assert len(bench.hypervisor.vms) == 2, "it was made anew for the pod that found the damage"
        await bench.template()
        assert bench.left() == [bench.name]
        assert len(said) == 2


@asynchronous
async def test_other_file_with_the_same_content_is_no_template_s_memory(bench: Bench) -> None:
    await bench.template()
    Damage("copy")(bench.where / MEMORY)
    assert isinstance(bench.store.look_up(bench.name), Boot)


@pytest.mark.parametrize("what", ["a file", "a link", "an empty directory"])
@asynchronous
async def test_something_else_in_its_place(bench: Bench, what: str) -> None:
    await bench.template()
    bench.where.rename(bench.store.directory.parent / "elsewhere")
    if what == "a file":
        bench.where.touch()
    elif what == "a link":
        bench.where.symlink_to(bench.store.directory.parent / "elsewhere")
    else:
        bench.where.mkdir()
    with warnings_said() as said:
        assert await bench.origin() == Boot()
    assert len(said) == 1
    assert bench.left() == []
    assert (bench.store.directory.parent / "elsewhere" / MEMORY).exists(), "a link was followed"


def rewritten(path: Path, **facts: object) -> None:
    """Change facts of a manifest and give it the right checksum."""
    text = json.dumps({**json.loads(path.read_bytes().splitlines()[0]), **facts}).encode()
    path.write_bytes(text + b"\n" + hashlib.sha256(text).hexdigest().encode())


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"name": "0123456789abcdef"}, "its manifest is another template's"),
        ({"format": 1}, "another version has made it"),
        ({"state": "0" * 64}, "changed since it was made: state"),
    ],
)
@asynchronous
async def test_foreign_one_is_not_used(bench: Bench, facts: dict[str, object], why: str) -> None:
    await bench.template()
    rewritten(bench.where / MANIFEST, **facts)
    with warnings_said() as said:
        assert await bench.origin() == Boot()
    assert [message.rpartition("discarded: ")[2] for message in said] == [why]
    assert bench.left() == []


@asynchronous
async def test_template_under_another_name_is_not_used(bench: Bench) -> None:
    await bench.template()
    other = replace(bench.spec, vcpus=2)
    await bench.template(other)
    names = bench.store.names()
    shutil.rmtree(bench.where)
    shutil.copytree(bench.store.directory / next(name for name in names if name != bench.name), bench.where)
    assert await bench.origin() == Boot()


@asynchronous
async def test_damaged_one_is_left_to_whoever_replaces_it(bench: Bench) -> None:
    """Else its successor might be removed in its place."""
    await bench.template()
    (bench.where / STATE).unlink()
    lock = bench.store.try_lock(bench.name)
    assert lock
    with lock, warnings_said() as said:
        assert bench.store.look_up(bench.name) == Boot()
        assert bench.where.exists()
    assert len(said) == 1


# --- what has not changed


@asynchronous
async def test_looking_does_not_change_one(bench: Bench) -> None:
    template = await bench.template()
    for _ in range(3):
        assert bench.store.look_up(bench.name) == template
        assert bench.store.condition(bench.name, thorough=True) == OK


@asynchronous
async def test_pages_that_a_private_mapping_reads_are_no_damage() -> None:
    """On tmpfs a hole becomes a page of zeros when somebody reads it through a mapping."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        bench = bench_in(Path(directory))
        template = await bench.template()
        with (
            template.memory.open("rb") as file,
            mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped,
        ):
            assert mapped[2 << 20 : 3 << 20] == bytes(1 << 20)
        assert bench.store.facts(bench.name).held_bytes >= 2 << 20
        assert bench.store.look_up(bench.name) == template
        assert bench.store.condition(bench.name, thorough=True) == OK


@asynchronous
async def test_write_through_a_mapping_is_found_by_those_who_read_the_memory() -> None:
    """Such a write does not change the file's times on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        bench = bench_in(Path(directory))
        mapping: list[mmap.mmap] = []

        def keep_a_mapping(origin: Origin) -> None:
            fill(1)(origin)
            if isinstance(origin, Boot) and origin.memory:
                with origin.memory.open("r+b") as file:
                    mapping.append(mmap.mmap(file.fileno(), 0))
                    mapping[0][1 << 20] = mapping[0][1 << 20]

        bench.hypervisor.spoil = keep_a_mapping
        await bench.template()
        a_moment_later()
        mapping[0][1 << 20] ^= 0xFF
        found = bench.store.look_up(bench.name)
        assert isinstance(found, Template), "this kernel notices; say so in docs/threat-model.md"
        assert bench.store.condition(bench.name, thorough=True) == "damaged: changed since it was made: memory"
        assert list(bench.store.prune(thorough=True)) == [bench.name]
        mapping[0].close()


# --- pruning


@pytest.mark.parametrize(("name", "what"), [("kernel", "kernel"), ("image", "image"), ("vmm", "VMM")])
@asynchronous
async def test_stale_ones_are_pruned(tmp_path: Path, bench: Bench, name: str, what: str) -> None:
    await bench.template()
    old = bench.name
    assert bench.store.prune() == {}
    (tmp_path / name).write_text("another")
    why = f"stale: the {what} has changed: {tmp_path / name}"
    assert bench.store.condition(old) == why
    (tmp_path / name).unlink()
    why = f"stale: the {what} is gone: {tmp_path / name}"
    assert bench.store.prune() == {old: why}
    assert bench.left() == []


@asynchronous
async def test_older_protocol_is_stale(bench: Bench) -> None:
    await bench.template()
    rewritten(bench.where / MANIFEST, protocol=0)
    assert bench.store.condition(bench.name) == "stale: its agent speaks another version's protocol"


@asynchronous
async def test_damaged_and_half_made_ones_are_pruned_and_what_is_not_ours_stays(bench: Bench) -> None:
    await bench.template()
    half = bench.store.directory / f"{bench.name}.12345"
    half.mkdir()
    (half / MEMORY).write_text("half")
    (bench.store.directory / "0123456789abcdef.lock").touch()
    (bench.store.directory / "0123456789abcdef").mkdir()
    for name in ("notes.txt", "0123456789abcdeX", "letters.d"):
        (bench.store.directory / name).mkdir()
    assert bench.store.prune() == {
        "0123456789abcdef": "damaged: its manifest is missing",
        half.name: "half-made: its builder is gone",
    }
    assert bench.left() == sorted([bench.name, "notes.txt", "0123456789abcdeX", "letters.d"])


def test_half_made_one_whose_builder_is_alive_stays(bench: Bench) -> None:
    bench.store.claim()
    half = bench.store.directory / f"{bench.name}.12345"
    half.mkdir()
    lock = bench.store.try_lock(bench.name)
    assert lock
    with lock:
        assert bench.store.prune() == {}
        assert half.exists()
    assert list(bench.store.prune()) == [half.name]


def test_store_that_is_not_there_has_nothing_to_prune(bench: Bench) -> None:
    assert bench.store.names() == []
    assert bench.store.prune() == {}
    assert not bench.store.directory.exists()


# --- locks


def test_lock_is_held_by_one_and_leaves_no_file(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with no_descriptor_leaks():
        first = filelock.try_lock(path)
        assert first
        assert filelock.try_lock(path) is None
        first.release()
        first.release()
        assert list(tmp_path.iterdir()) == []
        second = filelock.try_lock(path)
        assert second
        second.release()


def test_lock_of_a_file_that_its_holder_has_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the file before that, and locks it then, must not be alone with it."""
    path = str(tmp_path / "lock")
    first = filelock.try_lock(path)
    assert first
    flock = fcntl.flock

    def release_in_between(fd: int, how: int) -> None:
        first.release()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", release_in_between)
    with no_descriptor_leaks():
        second = filelock.try_lock(path)
        assert second
        assert os.path.exists(path)
        assert filelock.try_lock(path) is None
        second.release()
    assert list(tmp_path.iterdir()) == []


def test_lock_whose_file_somebody_has_removed_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = filelock.try_lock(str(path))
    assert first
    path.unlink()
    second = filelock.try_lock(str(path))
    assert second
    first.release()
    assert filelock.try_lock(str(path)) is None
    second.release()


# --- a pod over a template


@asynchronous
async def test_pod_starts_from_a_template(tmp_path: Path, bench: Bench) -> None:
    settings = settings_like(vm=Vm(start="snapshot"), templates=Templates(directory=str(tmp_path / "templates")))
    async with pod(tmp_path, settings=settings, spec=bench.spec) as p:
        await p.running()
        assert [type(origin) for origin in p.hypervisor.origins] == [Boot, Template]
        assert "create" in p.guest.methods()


@asynchronous
async def test_template_that_fails_is_discarded_and_the_pod_boots_cold(tmp_path: Path, bench: Bench) -> None:
    settings = settings_like(vm=Vm(start="snapshot"), templates=Templates(directory=str(tmp_path / "templates")))

    def prepare(p: Pod) -> None:
        def spoil(origin: Origin) -> None:
            if isinstance(origin, Template):
                raise SandboxDied("qemu refused the state")

        p.hypervisor.spoil = spoil

    async with pod(tmp_path, settings=settings, spec=bench.spec, prepare=prepare) as p:
        container = await p.running()
        assert [type(origin) for origin in p.hypervisor.origins] == [Boot, Template, Boot]
        await p.guest.exit(0, "c1")
        assert (await container.init.wait()).status == 0
        assert p.log == ["create c1", "start c1", "exit c1 0"]
    assert Store(tmp_path / "templates", 8, 512).names() == []


@asynchronous
async def test_pod_that_wants_no_template(tmp_path: Path) -> None:
    async with pod(tmp_path, settings=SETTINGS) as p:
        await p.running()
        assert p.hypervisor.origins == [Boot()]
