"""Loop devices: a file as a block device, which the kernel frees with its last user, whoever was killed when.

Requests, flags and struct loop_config are those of the kernel's UAPI header linux/loop.h.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_CONTROL = "/dev/loop-control"
_GET_FREE = 0x4C82  # LOOP_CTL_GET_FREE
_CONFIGURE = 0x4C0A  # LOOP_CONFIGURE, since Linux 5.8

_READ_ONLY = 1
_AUTOCLEAR = 4
_DIRECT_IO = 16

_CONFIG = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 8Q")
_TRIES = 100
"""How often another program may be quicker in taking the device that was free."""


@contextmanager
def attached(file: str, *, read_only: bool, direct_io: bool = False) -> Iterator[str]:
    """Yield the path of a block device that shows `file`. It is free again when the context has been left and nothing
    that was mounted from it is mounted any more.

    Raises OSError that says what failed.
    """
    backing = os.open(file, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        flags = _AUTOCLEAR | (_READ_ONLY if read_only else 0) | (_DIRECT_IO if direct_io else 0)
        name = os.fsencode(file)[:63]  # for `losetup`: the kernel has the file itself
        config = _CONFIG.pack(backing, 0, *[0] * 5, *[0] * 3, flags, name, b"", b"", *[0] * 2, *[0] * 8)
        path, device = _configured(config, read_only=read_only)
    finally:
        os.close(backing)
    try:
        yield path
    finally:
        os.close(device)


def _configured(config: bytes, *, read_only: bool) -> tuple[str, int]:
    """Return the path of a device that had been free and a descriptor of it, which keeps it."""
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise OSError(errno.ENXIO, f"this host has no loop devices ({_CONTROL}); `modprobe loop` may help") from None
    try:
        for _ in range(_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
            device = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, f"{path} does not take the file: {error.strerror}") from None
            else:
                return path, device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, f"{_TRIES} times another program took the loop device that was free")
