"""What a snapshotter's mount says: its options, and those of an overlay that are too long for mount(2)."""

import pytest
from pymicro.shim import syscalls
from pymicro.shim.errors import InvalidRequest
from pymicro.shim.mounting import Options, has_device, mount, shortened
from pymicro.shim.requests import Mount


@pytest.mark.parametrize(
    ("options", "parsed"),
    [
        ((), Options(0, ())),
        (("ro", "nosuid"), Options(syscalls.MS_RDONLY | syscalls.MS_NOSUID, ())),
        (("rbind", "rw"), Options(syscalls.MS_BIND | syscalls.MS_REC, ())),
        (("ro", "rw", "noatime", "relatime"), Options(syscalls.MS_NOATIME | syscalls.MS_RELATIME, ())),
        (("rw", "ro"), Options(syscalls.MS_RDONLY, ())),
        (("index=off", "lowerdir=/a:/b", "ro"), Options(syscalls.MS_RDONLY, ("index=off", "lowerdir=/a:/b"))),
        (("defaults", "suid", "async", "loop"), Options(0, (), loop=True)),
        (("direct-io", "loop", "discard"), Options(0, ("discard",), loop=True, direct_io=True)),
        (("nouuid",), Options(0, ("nouuid",))),
    ],
)
def test_options_become_what_mount_takes(options: tuple[str, ...], parsed: Options) -> None:
    assert Options.parse(options) == parsed


@pytest.mark.parametrize(
    ("data", "directory", "shorter"),
    [
        (
            ("index=off", "workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir=/s/2/fs:/s/1/fs"),
            "/s",
            ("index=off", "workdir=9/work", "upperdir=9/fs", "lowerdir=2/fs:1/fs"),
        ),
        (("upperdir=/other/fs", "lowerdir=/s/2:/s/1"), "/s", ("upperdir=/other/fs", "lowerdir=2:1")),
        (("lowerdir=/s/21/fs:/s/2/fs",), "/s", ("lowerdir=21/fs:2/fs",)),
        (("lowerdir=/s/1/fs",), "/s/1", ("lowerdir=fs",)),
        (("lowerdir=/a:/b",), "/", ("lowerdir=a:b",)),
        ((r"lowerdir=/a\:b/1:/a\:b/2",), "/a:b", ("lowerdir=1:2",)),
        (("lowerdir=1:2",), "/", ("lowerdir=1:2",)),
    ],
)
def test_overlay_options_become_shorter(data: tuple[str, ...], directory: str, shorter: tuple[str, ...]) -> None:
    assert shortened(data) == (directory, shorter)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Mount("overlay", "overlay", "", ("uidmap=0:1000:1", "lowerdir=/a:/b")), "maps ids, which pymicro cannot"),
        (Mount("fuse3.fuse-overlayfs", "overlay", "", ()), "'fuse3.fuse-overlayfs': pymicro runs no mount helpers"),
        (Mount("format/mkdir/overlay", "overlay", "", ()), "'format/mkdir/overlay': .* containerd 2.2 and newer"),
    ],
)
def test_what_cannot_be_mounted_is_said(given: Mount, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        mount(given, "/nowhere")


def test_who_has_a_device_of_its_own() -> None:
    assert has_device(Mount("ext4", "/dev/dm-3", "", ("nouuid",)))
    assert has_device(Mount("erofs", "/layer.erofs", "", ("ro", "loop")))
    assert not has_device(Mount("overlay", "overlay", "", ("lowerdir=/a",)))
    assert not has_device(Mount("bind", "/a", "", ("rbind", "rw")))
    assert not has_device(Mount("none", "/a", "", ("bind",)))
