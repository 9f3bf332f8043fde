"""One mount as a snapshotter describes it, done as containerd's own shims do it (core/mount/mount_linux.go)."""

import errno
import os
from collections.abc import Iterable

from msgspec import Struct
from pymicro.shim import syscalls as sys
from pymicro.shim.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.requests import Mount

_SET = {
    "ro": sys.MS_RDONLY,
    "nosuid": sys.MS_NOSUID,
    "nodev": sys.MS_NODEV,
    "noexec": sys.MS_NOEXEC,
    "sync": sys.MS_SYNCHRONOUS,
    "dirsync": sys.MS_DIRSYNC,
    "noatime": sys.MS_NOATIME,
    "nodiratime": sys.MS_NODIRATIME,
    "relatime": sys.MS_RELATIME,
    "strictatime": sys.MS_STRICTATIME,
    "bind": sys.MS_BIND,
    "rbind": sys.MS_BIND | sys.MS_REC,
}
_CLEARED = {
    "rw": "ro",
    "suid": "nosuid",
    "dev": "nodev",
    "exec": "noexec",
    "async": "sync",
    "atime": "noatime",
    "diratime": "nodiratime",
    "norelatime": "relatime",
    "nostrictatime": "strictatime",
}
_IGNORED = frozenset({"defaults", "mand", "nomand"})
_LONGEST_DATA = 4095
"""mount(2) copies one page of options, the zero byte at its end included."""


class Options(Struct, frozen=True):
    """What mount(2) takes for a list of options as in fstab(5); of two that contradict each other the later one holds.

    `loop`: the source is a file, to be shown by a loop device, which reads and writes past the page cache with
    `direct_io`.
    """

    flags: int
    data: tuple[str, ...]
    loop: bool = False
    direct_io: bool = False

    @classmethod
    def parse(cls, options: Iterable[str]) -> "Options":
        """Sort the options."""
        flags, data, given = 0, [], set()
        for option in options:
            if option in _SET:
                flags |= _SET[option]
            elif option in _CLEARED:
                flags &= ~_SET[_CLEARED[option]]
            elif option in {"loop", "direct-io"}:
                given.add(option)
            elif option not in _IGNORED:
                data.append(option)
        is_loop = "loop" in given
        return cls(flags, tuple(data), is_loop, is_loop and "direct-io" in given)


def has_device(mount: "Mount") -> bool:
    """Tell whether it is a file system of its own, on a block device or in a file: not directories of another one."""
    return mount.type not in {"bind", "rbind", "overlay"} and not {"bind", "rbind"} & set(mount.options)


def mount(mount: "Mount", target: str) -> None:
    """Mount it at `target`, a directory that is there. May change this thread's working directory.

    Raises InvalidRequest that names the mount.
    """
    if "/" in mount.type:
        raise InvalidRequest(
            f"the root filesystem has a mount of type {mount.type!r}: what precedes the last slash is for the mount "
            "manager of containerd 2.2 and newer"
        )
    if mount.type.startswith(("fuse.", "fuse3.")):
        raise InvalidRequest(f"the root filesystem has a mount of type {mount.type!r}: pymicro runs no mount helpers")
    options = Options.parse(mount.options)
    if any(option.startswith(("uidmap=", "gidmap=")) for option in options.data):
        raise InvalidRequest(f"the {mount.type} mount of the root filesystem maps ids, which pymicro cannot")
    try:
        if mount.type in {"bind", "rbind"} or options.flags & sys.MS_BIND:
            bind(mount.source, target, options.flags | sys.MS_BIND)
        elif options.loop:
            from pymicro.shim import loop

            read_only = bool(options.flags & sys.MS_RDONLY)
            with loop.attached(mount.source, read_only=read_only, direct_io=options.direct_io) as device:
                _mount_data(mount.type, device, target, options)
        else:
            _mount_data(mount.type, mount.source, target, options)
    except OSError as error:
        reason = f"this kernel has no file system {mount.type!r}" if error.errno == errno.ENODEV else error
        raise InvalidRequest(f"cannot mount the root filesystem ({mount.type} {mount.source}): {reason}") from error


def bind(source: str, target: str, flags: int) -> None:
    """Bind `source` at `target`, of the same kind, read-only with MS_RDONLY. Raises OSError."""
    sys.mount(source, target, None, flags & (sys.MS_BIND | sys.MS_REC))
    if flags & sys.MS_RDONLY:
        sys.mount("none", target, None, sys.MS_BIND | sys.MS_REMOUNT | sys.MS_RDONLY | locked_flags(target))


def locked_flags(path: str) -> int:
    """The flags a mount already has, which a remount must repeat or it would drop them."""
    current = os.statvfs(path).f_flag
    pairs = ((os.ST_NOSUID, sys.MS_NOSUID), (os.ST_NODEV, sys.MS_NODEV), (os.ST_NOEXEC, sys.MS_NOEXEC))
    return sum(flag for have, flag in pairs if current & have)


def _mount_data(fstype: str, source: str, target: str, options: Options) -> None:
    data = ",".join(options.data)
    if len(os.fsencode(data)) > _LONGEST_DATA and fstype == "overlay":
        directory, shorter = shortened(options.data)
        os.chdir(directory)
        data = ",".join(shorter)
    if (length := len(os.fsencode(data))) > _LONGEST_DATA:
        raise OSError(
            errno.E2BIG, f"{length} bytes of options, even where relative paths do; mount(2) takes {_LONGEST_DATA}"
        )
    sys.mount(source, target, fstype, options.flags, data or None)


def shortened(data: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """Return the directory that the lower layers of an overlay share, and its options with paths relative to that.

    Backslashes stay where they are: overlayfs takes the character after one as it is.
    """
    import re

    values = dict(option.partition("=")[::2] for option in data)
    lower = re.split(r"(?<!\\):", values.get("lowerdir", ""))
    if not all(path.startswith("/") for path in lower):
        return "/", tuple(data)
    shared = os.path.commonpath([os.path.dirname(path) for path in lower])
    names = {"upperdir", "workdir"} & values.keys()
    relative = {name: _below(shared, values[name]) for name in names}
    relative["lowerdir"] = ":".join(_below(shared, path) for path in lower)
    return re.sub(r"\\(.)", r"\1", shared), tuple(
        f"{name}={relative[name]}" if (name := option.partition("=")[0]) in relative else option for option in data
    )


def _below(directory: str, path: str) -> str:
    return os.path.relpath(path, directory) if path.startswith(directory.rstrip("/") + "/") else path
