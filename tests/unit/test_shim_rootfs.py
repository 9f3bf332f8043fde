"""Mounting root filesystems and binds, and taking them away without ever touching what lies behind a mount."""

import ctypes
import os
import subprocess
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from pymicro.shim import loop, rootfs, syscalls
from pymicro.shim.errors import InvalidRequest
from pymicro.shim.requests import Mount

from tests.framework.fakes import needs_root


def in_private_namespace(check: Callable[[str], None], directory: Path) -> None:
    """Run `check` in a child with a mount namespace of its own: the host's mounts stay as they are."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            rootfs.private_namespace()
            check(str(directory))
            status = 0
        except BaseException:  # noqa: BLE001  # whatever it is, the parent reports it
            (directory / "failure").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0, (directory / "failure").read_text()


def host_mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def check_overlay(directory: str) -> None:
    base = Path(directory)
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    (base / "lower/file").write_text("from the image")
    options = ("index=off", f"workdir={base}/work", f"upperdir={base}/upper", f"lowerdir={base}/lower")
    target = base / "share/c1/rootfs"
    rootfs.mount_rootfs([Mount("overlay", "overlay", "", options)], str(target))
    assert (target / "file").read_text() == "from the image"
    (target / "new").write_text("by the container")
    rootfs.remove_tree(str(base / "share/c1"))
    assert not (base / "share/c1").exists()
    assert (base / "upper/new").read_text() == "by the container"
    assert (base / "lower/file").read_text() == "from the image"


def check_read_only_bind(directory: str) -> None:
    base = Path(directory)
    (base / "volume").mkdir()
    (base / "volume/file").write_text("precious")
    target = base / "share/c1/mounts/0"
    rootfs.bind(str(base / "volume"), str(target), read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        (target / "file").write_text("spoiled")
    rootfs.remove_tree(str(base / "share/c1"))
    assert (base / "volume/file").read_text() == "precious"


def check_recursively_read_only_bind(directory: str) -> None:
    base = Path(directory)
    (base / "volume/below").mkdir(parents=True)
    syscalls.mount("tmpfs", str(base / "volume/below"), "tmpfs", 0)
    for name, recursively in (("0", False), ("1", True)):
        target = base / "share/c1/mounts" / name
        rootfs.bind(str(base / "volume"), str(target), read_only=True, recursively=recursively)
        with pytest.raises(OSError, match="Read-only") if recursively else nullcontext():
            (target / "below/file").write_text("spoiled")
    (base / "volume/below/file").write_text("whoever mounts it keeps it as it is")
    rootfs.remove_tree(str(base / "share/c1"))


def check_file_and_special_file_binds(directory: str) -> None:
    base = Path(directory)
    (base / "hosts").write_text("127.0.0.1 localhost")
    for source, name in ((base / "hosts", "0"), (Path("/dev/null"), "1")):
        rootfs.bind(str(source), str(base / "share/c1/mounts" / name), read_only=False)
    assert (base / "share/c1/mounts/0").read_text() == "127.0.0.1 localhost"
    (base / "hosts").write_text("changed later")
    assert (base / "share/c1/mounts/0").read_text() == "changed later"
    assert (base / "share/c1/mounts/1").is_char_device()
    rootfs.remove_tree(str(base / "share/c1"))
    assert (base / "hosts").read_text() == "changed later"
    assert Path("/dev/null").is_char_device()


def check_stacked_mounts(directory: str) -> None:
    base = Path(directory)
    for n in range(3):
        (base / f"v{n}").mkdir()
        (base / f"v{n}/file").write_text(str(n))
    target = str(base / "share/c1/rootfs")
    for n in range(3):
        rootfs.mount_rootfs([Mount("bind", str(base / f"v{n}"), "", ("rbind", "rw"))], target)
    (base / "v2/inner").mkdir()
    rootfs.bind(str(base / "v0"), f"{target}/inner", read_only=False)
    rootfs.remove_tree(str(base / "share/c1"))
    assert [(base / f"v{n}/file").read_text() for n in range(3)] == ["0", "1", "2"]
    assert not (base / "share/c1").exists()


def check_mount_at_a_target_inside(directory: str) -> None:
    base = Path(directory)
    (base / "image/etc").mkdir(parents=True)
    (base / "volume").mkdir()
    (base / "volume/file").write_text("inner")
    mounts = [
        Mount("bind", str(base / "image"), "", ("rbind", "rw")),
        Mount("bind", str(base / "volume"), "/etc", ("rbind", "ro")),
    ]
    rootfs.mount_rootfs(mounts, str(base / "share/c1/rootfs"))
    assert (base / "share/c1/rootfs/etc/file").read_text() == "inner"
    rootfs.remove_tree(str(base / "share/c1"))
    assert (base / "volume/file").exists()


def check_failed_mount(directory: str) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot mount the root filesystem \(overlay overlay\)"):
        rootfs.mount_rootfs([Mount("overlay", "overlay", "", ("lowerdir=/nowhere",))], f"{directory}/rootfs")
    (Path(directory) / "first").mkdir()
    half = [
        Mount("bind", f"{directory}/first", "", ("rbind",)),
        Mount("overlay", "overlay", "", ("lowerdir=/nowhere",)),
    ]
    with pytest.raises(InvalidRequest, match="overlay"):
        rootfs.mount_rootfs(half, f"{directory}/rootfs")
    assert f" {directory}/rootfs " not in host_mounts(), "what had been mounted before the failure is still there"


def check_long_options(directory: str) -> None:
    """Three hundred layers, whose paths take more than the page that mount(2) copies."""
    base = Path(directory)
    layers = [base / "snapshots" / str(n) / "fs" for n in range(300)]
    for layer in layers:
        layer.mkdir(parents=True)
        (layer / f"from-{layer.parent.name}").touch()
    for name in ("upper", "work"):
        (base / "snapshots/new" / name).mkdir(parents=True)
    upper = base / "snapshots/new/upper"
    options = (f"workdir={base}/snapshots/new/work", f"upperdir={upper}", f"lowerdir={':'.join(map(str, layers))}")
    target = base / "share/c1/rootfs"
    before = Path.cwd()
    rootfs.mount_rootfs([Mount("overlay", "overlay", "", options)], str(target))
    assert Path.cwd() == before
    assert len(list(target.iterdir())) == 300
    (target / "written").touch()
    rootfs.remove_tree(str(base / "share/c1"))
    assert (upper / "written").exists()


def check_what_the_host_mounts_later(directory: str) -> None:
    """A snapshotter mounts layers for a container of a pod that runs already; this host's mounts may be private."""
    base = Path(directory)
    (base / "layer").mkdir()
    outside = f"/proc/{os.getppid()}/ns/mnt"
    subprocess.run(["nsenter", f"--mount={outside}", "mount", "-t", "tmpfs", "none", base / "layer"], check=True)
    try:
        subprocess.run(["nsenter", f"--mount={outside}", "touch", base / "layer/file"], check=True)
        rootfs.mount_rootfs([Mount("bind", str(base / "layer"), "", ("rbind", "ro"))], str(base / "share/c1/rootfs"))
        assert (base / "share/c1/rootfs/file").exists()
        with pytest.raises(OSError, match="Read-only"):
            (base / "share/c1/rootfs/other").touch()
    finally:
        subprocess.run(["nsenter", f"--mount={outside}", "umount", base / "layer"], check=True)
    assert (base / "share/c1/rootfs/file").exists(), "the host's unmounting reached into the container"
    rootfs.remove_tree(str(base / "share/c1"))


def check_file_with_a_file_system(directory: str) -> None:
    base = Path(directory)
    image = block_image(base / "image")
    target = base / "share/c1/rootfs"
    rootfs.mount_rootfs([Mount("ext4", str(image), "", ("loop",))], str(target))
    (target / "file").write_text("by the container")
    assert len(loop_devices(image)) == 1
    with (target / "file").open():
        assert not rootfs.let_go(str(target)), "it was unmounted under who uses it"
    assert rootfs.let_go(str(target))
    assert loop_devices(image) == []
    assert b"by the container" in image.read_bytes(), "it was not written to its device"
    rootfs.mount_rootfs([Mount("ext4", str(image), "", ("loop", "ro", "noatime"))], str(target))
    assert (target / "file").read_text() == "by the container"
    with pytest.raises(OSError, match="Read-only"):
        (target / "other").touch()
    rootfs.remove_tree(str(base / "share/c1"))
    assert loop_devices(image) == []


def check_block_device(directory: str) -> None:
    """As of the devmapper snapshotter: a device, its file system's type, and `nouuid` for XFS."""
    base = Path(directory)
    image = block_image(base / "image")
    with loop.attached(str(image), read_only=False) as device:
        rootfs.mount_rootfs([Mount("ext4", device, "", ())], str(base / "share/c1/rootfs"))
        (base / "share/c1/rootfs/file").write_text("by the container")
        assert rootfs.let_go(str(base / "share/c1/rootfs"))
    rootfs.remove_tree(str(base / "share/c1"))
    assert b"by the container" in image.read_bytes()


def check_failed_loop_mount(directory: str) -> None:
    base = Path(directory)
    image = base / "image"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(InvalidRequest, match=r"cannot mount the root filesystem \(ext4 .*/image\): .*mount /dev/loop"):
        rootfs.mount_rootfs([Mount("ext4", str(image), "", ("loop",))], str(base / "rootfs"))
    assert loop_devices(image) == []
    with pytest.raises(InvalidRequest, match=r"no file system 'papyrus'"):
        rootfs.mount_rootfs([Mount("papyrus", str(image), "", ("loop",))], str(base / "rootfs"))
    with pytest.raises(InvalidRequest, match=r"No such file or directory: '/nowhere'"):
        rootfs.mount_rootfs([Mount("ext4", "/nowhere", "", ("loop",))], str(base / "rootfs"))
    assert loop_devices(image) == []


def block_image(path: Path) -> Path:
    """Make a file with an ext4 file system."""
    with path.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", path], check=True)
    return path


def loop_devices(file: Path) -> list[str]:
    return subprocess.run(
        ["losetup", "--noheadings", "-O", "NAME", "-j", file], capture_output=True, text=True, check=True
    ).stdout.split()


def check_links_of_the_guest(directory: str) -> None:
    """A guest that has been taken over may put links wherever it can write: none may lead the shim astray."""
    base = Path(directory)
    (base / "precious").mkdir()
    (base / "precious/file").write_text("keep me")
    syscalls.mount(str(base / "precious"), str(base / "precious"), None, syscalls.MS_BIND)
    own = base / "share/c1"
    (own / "rootfs").mkdir(parents=True)
    (own / "rootfs/link").symlink_to(base / "precious")
    (own / "mounts").symlink_to(base / "precious")
    rootfs.remove_tree(str(own))
    assert not own.exists()
    (base / "share/c2").symlink_to(base / "precious")
    rootfs.remove_tree(str(base / "share/c2"))
    assert not (base / "share/c2").is_symlink()
    assert (base / "precious/file").read_text() == "keep me"
    assert f" {base}/precious " in host_mounts(), "a mount that is not ours was taken away"


def check_view_of_the_guest(directory: str) -> None:
    """The guest sees what is mounted into the share, and cannot put anything beside it."""
    base = Path(directory)
    (base / "run/share").mkdir(parents=True)
    (base / "run/view").mkdir()
    (base / "volume").mkdir()
    rootfs.make_share(str(base / "run/share"), str(base / "run/view"))
    with pytest.raises(OSError, match="Read-only"):
        (base / "run/view/c2").symlink_to("/")
    rootfs.bind(str(base / "volume"), str(base / "run/share/c1"), read_only=False)
    (base / "run/view/c1/file").write_text("the guest may write into what is mounted")
    assert (base / "volume/file").exists()
    rootfs.remove_tree(str(base / "run"))
    assert not (base / "run").exists()
    assert (base / "volume/file").exists()


@needs_root
@pytest.mark.parametrize(
    "check",
    [
        check_overlay,
        check_read_only_bind,
        check_recursively_read_only_bind,
        check_file_and_special_file_binds,
        check_stacked_mounts,
        check_mount_at_a_target_inside,
        check_failed_mount,
        check_long_options,
        check_what_the_host_mounts_later,
        check_file_with_a_file_system,
        check_block_device,
        check_failed_loop_mount,
        check_links_of_the_guest,
        check_view_of_the_guest,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_in_a_private_namespace(check: Callable[[str], None], tmp_path: Path) -> None:
    before = host_mounts()
    needs_tmpfs = check in {check_overlay, check_long_options}
    if needs_tmpfs:  # not every file system can be an overlay's upper layer
        subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    try:
        in_private_namespace(check, tmp_path)
    finally:
        if needs_tmpfs:
            subprocess.run(["umount", tmp_path], check=True)
    assert host_mounts() == before, "the shim's mounts show on the host"


def test_missing_bind_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot bind '.*/missing' into the container: No such file"):
        rootfs.bind(str(tmp_path / "missing"), str(tmp_path / "target"), read_only=False)


def test_removing_what_never_was(tmp_path: Path) -> None:
    rootfs.remove_tree(str(tmp_path / "never"))


def test_nothing_is_removed_while_a_mount_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own/rootfs").mkdir(parents=True)
    (tmp_path / "own/rootfs/file").write_text("on a mount that cannot be taken away")
    monkeypatch.setattr(rootfs, "_mount_points", lambda _: [f"{tmp_path}/own/rootfs"])
    monkeypatch.setattr(syscalls, "unmount", lambda *_: None)
    with pytest.raises(OSError, match="still mounted"):
        rootfs.remove_tree(str(tmp_path / "own"))
    assert (tmp_path / "own/rootfs/file").exists()


def test_names_with_blanks_in_mountinfo() -> None:
    assert rootfs._unescape(r"/run/a\040b\134040") == "/run/a b\\040"


def test_libc_is_there() -> None:
    """The calls that Python lacks are looked up by name: a libc without them must fail here, not in production."""
    libc = ctypes.CDLL(None)
    assert all(hasattr(libc, name) for name in ("mount", "umount2", "unshare", "setns", "prctl", "syscall"))
