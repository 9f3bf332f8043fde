"""System calls that no C module of the standard library offers: through libc and the C half of ctypes.

The Python half, `ctypes` itself, takes 50 ms to import under emulation.
"""

import _ctypes
import posix
from _struct import pack

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_RELATIME = 0x200000
MS_BIND = 0x1000
MNT_DETACH = 0x2

RLIMIT_CORE = 4
RLIMIT_NPROC = 6
RLIMIT_NOFILE = 7
RLIM_INFINITY = 2**64 - 1


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001  # no subscript at run time; its name in ctypes too
    _type_ = "i"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_libc = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None is the process itself
_mount = _Function(_ctypes.dlsym(_libc, "mount"))
_umount2 = _Function(_ctypes.dlsym(_libc, "umount2"))
_setrlimit = _Function(_ctypes.dlsym(_libc, "setrlimit"))


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """Call mount(2). Raises OSError that names the target."""
    if _mount(source.encode(), target.encode(), fstype.encode(), flags, options.encode()) != 0:
        raise _last_error(f"mount {fstype or source} on {target}")


def unmount(target: str) -> None:
    """Call umount2(2), lazily. Raises OSError that names the target."""
    if _umount2(target.encode(), MNT_DETACH) != 0:
        raise _last_error(f"unmount {target}")


def set_limit(resource: int, soft: int, hard: int) -> None:
    """Set a resource limit of this process and so of its future children. Raises OSError."""
    if _setrlimit(resource, pack("QQ", soft, hard)) != 0:
        raise _last_error(f"setrlimit {resource}")


def _last_error(what: str) -> OSError:
    number = _ctypes.get_errno()
    return OSError(number, f"{what}: {posix.strerror(number)}")
