"""Mounting a container's root filesystem and bind mounts into the pod's share.

All of it happens in the shim's own mount namespace: when the pod's last process is gone the kernel unmounts everything,
whoever was killed when.
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress

from pymicro.shim import mounting
from pymicro.shim import syscalls as sys
from pymicro.shim.errors import InvalidRequest
from pymicro.shim.hostprogram import outer_namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.requests import Mount


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
    sys.mount("none", view, None, sys.MS_BIND | sys.MS_REMOUNT | sys.MS_RDONLY | mounting.locked_flags(view))


def mount_rootfs(mounts: "Sequence[Mount]", target: str) -> None:
    """Mount a snapshotter's list, in order, at `target` (each at its own `target` below, where it names one).

    Its paths are looked up where containerd is: what the host has mounted since the pod's start counts. Raises
    InvalidRequest naming the mount that failed; then nothing is mounted.
    """
    os.makedirs(target, exist_ok=True)

    def mounted() -> int:
        for mount in mounts:
            mounting.mount(mount, os.path.join(target, mount.target.lstrip("/")) if mount.target else target)
        return sys.copy_mounts(target)

    try:
        tree = _in_a_copy_of(outer_namespace(), mounted)
        try:
            sys.put_mounts(tree, target)
        finally:
            os.close(tree)
    except OSError as error:
        raise InvalidRequest(f"cannot mount the root filesystem: {error}") from error


def _in_a_copy_of(namespace: str, work: Callable[[], int]) -> int:
    """Return what `work` returns, done in a copy of a mount namespace and with a working directory of its own.

    A thread has the copy: it goes with the thread, and all that `work` has mounted, also if we are killed meanwhile.
    Raises what `work` does, OSError.
    """
    import threading

    outcome: list[int | BaseException] = []

    def run() -> None:
        try:
            sys.unshare(sys.CLONE_FS)
            with open(namespace, "rb") as file:
                sys.setns(file.fileno(), sys.CLONE_NEWNS)
            private_namespace()
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001  # the caller gets it
            outcome.append(error)

    thread = threading.Thread(target=run, name="mount")
    thread.start()
    thread.join()
    if isinstance(result := outcome[0], BaseException):
        raise result
    return result


def bind(source: str, target: str, *, read_only: bool, recursively: bool = False) -> None:
    """Bind a host directory, file or special file at `target`, which is created to match; if it is to be read-only
    `recursively`, with all that is mounted below. Raises InvalidRequest.
    """
    try:
        is_directory = stat.S_ISDIR(os.stat(source).st_mode)
        if is_directory:
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        mounting.bind(source, target, sys.MS_BIND | sys.MS_REC | (sys.MS_RDONLY if read_only else 0))
        if recursively:
            sys.make_read_only(target)
    except OSError as error:
        raise InvalidRequest(f"cannot bind {source!r} into the container: {error.strerror}") from error


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


def let_go(directory: str) -> bool:
    """Unmount what is mounted at and below `directory` unless somebody uses it; tell whether all is unmounted.

    A file system that was mounted nowhere else is written to its device then. Raises OSError.
    """
    for point in sorted(_mount_points(directory), reverse=True):
        try:
            sys.unmount(point, 0)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno not in {errno.EINVAL, errno.ENOENT}:  # as above
                raise
    return True


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
