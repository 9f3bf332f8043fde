"""The Linux calls that Python 3.11 lacks: namespaces, mounts, prctl. Thin, typed, raising OSError.

Numbers are from the kernel's UAPI headers (linux/sched.h, linux/mount.h, linux/fcntl.h, linux/prctl.h).
"""

import ctypes
import os
import struct
from typing import Final

CLONE_FS: Final = 0x00000200
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_SYNCHRONOUS: Final = 0x10
MS_REMOUNT: Final = 0x20
MS_DIRSYNC: Final = 0x80
MS_NOATIME: Final = 0x400
MS_NODIRATIME: Final = 0x800
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MS_SLAVE: Final = 0x80000
MS_SHARED: Final = 0x100000
MS_RELATIME: Final = 0x200000
MS_STRICTATIME: Final = 0x1000000
MNT_DETACH: Final = 0x2

_AT_FDCWD: Final = -100
_SYS_OPEN_TREE: Final = 428
_OPEN_TREE_CLONE: Final = 0x1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_AT_RECURSIVE: Final = 0x8000
_SYS_MOVE_MOUNT: Final = 429
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4

_SYS_MOUNT_SETATTR: Final = 442  # Linux 5.12
_MOUNT_ATTR_RDONLY: Final = 0x1

_SYS_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_VERSION: Final = 1

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_THP_DISABLE: Final = 41
_PR_SET_CHILD_SUBREAPER: Final = 36

_MFD_EXEC: Final = 0x10

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move this process into new namespaces. Raises OSError."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, kind: int) -> None:
    """Join the namespace that `fd` refers to; `kind` is its CLONE_NEW* flag. Raises OSError."""
    _check(_libc.setns(fd, kind), f"setns({fd})")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2). Raises OSError that names source and target."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        fstype.encode() if fstype else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, f"mount {source} on {target}")


def unmount(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2), by default lazily. Raises OSError."""
    _check(_libc.umount2(target.encode(), flags), f"unmount {target}")


def copy_mounts(path: str) -> int:
    """Return a descriptor of a copy of what is mounted at and below `path`; it is mounted nowhere, and gone with its
    last descriptor unless it is put somewhere. Raises OSError.
    """
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE)
    fd = int(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, path.encode(), flags))
    _check(fd, f"open_tree {path}")
    return fd


def put_mounts(fd: int, target: str) -> None:
    """Mount at `target` what copy_mounts() has returned. Raises OSError."""
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    _check(_libc.syscall(_SYS_MOVE_MOUNT, fd, b"", _AT_FDCWD, target.encode(), flags), f"move_mount to {target}")


def make_read_only(path: str) -> None:
    """Make what is mounted at and below `path` read-only. Raises OSError."""
    attributes = struct.pack("=4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr: set, clear, propagation, userns
    flags = ctypes.c_uint(_AT_RECURSIVE)
    size = ctypes.c_size_t(len(attributes))
    result = _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, size)
    _check(result, f"mount_setattr {path}")


def set_parent_death_signal(signal: int) -> None:
    """Have the kernel send `signal` to this process when the thread that forked it ends. Raises OSError."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def disable_huge_pages() -> None:
    """Have the kernel give this process and what it executes no transparent huge pages. Raises OSError."""
    _check(_libc.prctl(_PR_SET_THP_DISABLE, ctypes.c_ulong(1), 0, 0, 0), "prctl(PR_SET_THP_DISABLE)")


def set_name(name: str) -> None:
    """Set this process's name as `ps` shows it (15 bytes). Raises OSError."""
    _check(_libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0), "prctl(PR_SET_NAME)")


def memory_program(name: str, content: bytes) -> int:
    """Return a descriptor of a file in memory with `content`, to be executed by os.execve(). Raises OSError."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:  # before Linux 6.3 there was no such flag, and no need for it
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def landlock_abi() -> int:
    """Return the version of Landlock's interface that the kernel offers; 0 where it has none, or it is off."""
    return max(0, int(_libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)))
