"""A template's RAM: only the pages that the guest has touched are there, and only those are copied."""

import errno
import os
from pathlib import Path


def copy_populated(source: Path, target_fd: int) -> None:
    """Copy the populated ranges of the sparse file `source` into the file behind `target_fd`, which is empty so far.

    vhost-user devices need RAM that is shared with them, so a clone cannot map its template's. Raises OSError.
    """
    with open(source, "rb", buffering=0) as file:
        fd = file.fileno()
        end = os.fstat(fd).st_size
        position = 0
        while position < end:
            try:
                begin = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no more data
                    return
                raise
            position = os.lseek(fd, begin, os.SEEK_HOLE)
            _copy_range(fd, target_fd, begin, position)


def _copy_range(source: int, target: int, begin: int, end: int) -> None:
    os.lseek(target, begin, os.SEEK_SET)
    while begin < end:
        copied = os.sendfile(target, source, begin, end - begin)
        if copied == 0:
            raise OSError(errno.EIO, "the template's memory is shorter than it was")
        begin += copied
