"""Mounting a container's root filesystem and bind mounts into the pod's share.

All of it happens in the shim's own mount namespace: when the pod's last process is gone the kernel unmounts everything,
whoever was killed when.
"""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress

from pymicro.shim import syscalls as sys
from pymicro.shim.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.requests import Mount

_FLAGS = {
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
_IGNORED = frozenset({"rw", "suid", "dev", "exec", "async", "defaults", "atime", "diratime", "loop"})
_LONGEST_DATA = 4095
"""mount(2) copies one page of options."""


def private_namespace() -> None:
    """Give the shim a mount namespace of its own that follows the host's but never shows it ours. Raises OSError."""
    sys.unshare(sys.CLONE_NEWNS)
    sys.mount("none", "/", None, sys.MS_SLAVE | sys.MS_REC)


def make_share(directory: str, view: str) -> None:
    """Make `directory` a shared mount point and `view` a second one of the same peer group, read-only at its top.

    What is mounted below `directory` appears below `view` as well, and in the mount namespace of a virtiofsd that
    serves
    `view`. The guest may write into the mounts, as they allow, but not beside them: there we create directories and
    follow paths as root. Raises OSError.
    """
    sys.mount(directory, directory, None, sys.MS_BIND)
    sys.mount("none", directory, None, sys.MS_SHARED)
    sys.mount(directory, view, None, sys.MS_BIND)
    sys.mount("none", view, None, sys.MS_BIND | sys.MS_REMOUNT | sys.MS_RDONLY | _locked_flags(view))


def split_options(options: Iterable[str]) -> tuple[int, str]:
    """Return the flags and the data string that mount(2) takes for these options."""
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option not in _IGNORED:
            data.append(option)
    return flags, ",".join(data)


def mount_rootfs(mounts: "Sequence[Mount]", target: str) -> None:
    """Mount a snapshotter's list, in order, at `target` (each at its own `target` below, where it names one).

    Raises InvalidRequest naming the mount that failed.
    """
    os.makedirs(target, exist_ok=True)
    for mount in mounts:
        where = os.path.join(target, mount.target.lstrip("/")) if mount.target else target
        flags, data = split_options(mount.options)
        if len(data) > _LONGEST_DATA:
            raise InvalidRequest(
                f"the {mount.type} mount of the root filesystem has {len(data)} bytes of options, over one page"
            )
        try:
            if mount.type in {"bind", "rbind"} or flags & sys.MS_BIND:
                _bind(mount.source, where, flags | sys.MS_BIND)
            else:
                sys.mount(mount.source, where, mount.type, flags, data or None)
        except OSError as error:
            raise InvalidRequest(f"cannot mount the root filesystem ({mount.type} {mount.source}): {error}") from error


def bind(source: str, target: str, *, read_only: bool) -> None:
    """Bind a host directory, file or special file at `target`, which is created to match. Raises InvalidRequest."""
    try:
        is_directory = stat.S_ISDIR(os.stat(source).st_mode)
        if is_directory:
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        _bind(source, target, sys.MS_BIND | sys.MS_REC | (sys.MS_RDONLY if read_only else 0))
    except OSError as error:
        raise InvalidRequest(f"cannot bind {source!r} into the container: {error.strerror}") from error


def _bind(source: str, target: str, flags: int) -> None:
    sys.mount(source, target, None, flags & (sys.MS_BIND | sys.MS_REC))
    if flags & sys.MS_RDONLY:
        sys.mount("none", target, None, sys.MS_BIND | sys.MS_REMOUNT | sys.MS_RDONLY | _locked_flags(target))


def _locked_flags(path: str) -> int:
    """The flags a mount already has, which a remount must repeat or it would drop them."""
    current = os.statvfs(path).f_flag
    pairs = ((os.ST_NOSUID, sys.MS_NOSUID), (os.ST_NODEV, sys.MS_NODEV), (os.ST_NOEXEC, sys.MS_NOEXEC))
    return sum(flag for have, flag in pairs if current & have)


def unmount_below(directory: str) -> None:
    """Unmount everything at and below `directory`, innermost first. Raises OSError when a mount stays."""
    for point in sorted(_mount_points(directory), reverse=True):
        try:
            sys.unmount(point)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOENT}:  # it went with another mount of its peer group
                raise
    if left := _mount_points(directory):
        raise OSError(errno.EBUSY, f"{left[0]} is still mounted")


def _mount_points(directory: str) -> list[str]:
    parent, name = os.path.split(directory.rstrip("/"))
    real = os.path.join(os.path.realpath(parent), name)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [_unescape(line.split(" ")[4]) for line in file]
    return [point for point in points if point == real or point.startswith(real + "/")]


def remove_tree(directory: str) -> None:
    """Unmount everything at and below `directory` and remove the mount points; never a file that lies on a mount.

    The guest can write beside the mounts: symbolic links that it may have put anywhere, even in place of `directory`,
    are removed and never followed. Raises OSError, before anything is removed, when a mount stays.
    """
    unmount_below(directory)
    with suppress(FileNotFoundError):
        if os.path.islink(directory):
            os.unlink(directory)
        else:
            import shutil

            shutil.rmtree(directory)  # goes by directory descriptors, so that renaming does not deceive it


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of blanks and backslashes (proc(5))."""
    for escape, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(escape, char)
    return field
