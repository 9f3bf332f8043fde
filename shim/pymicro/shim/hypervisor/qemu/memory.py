"""A VM's RAM as a file: its own, the one of a template that is being made, or a clone of a template's.

Of a template's RAM only the pages that its guest has touched are there, and only those are copied.
"""

import errno
import fcntl
import os
import threading
from pathlib import Path

from pymicro.shim.hypervisor.base import Origin, Template, VmSpec

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""A backend that cuts the file off under QEMU would end it by SIGBUS."""


class Ram:
    """The file that backs a VM's memory; `path` is None where QEMU makes it itself."""

    def __init__(self, spec: VmSpec, origin: Origin) -> None:
        """A template's RAM is copied, not mapped copy-on-write: virtiofsd must share it with QEMU.

        And a private mapping of a sparse file on tmpfs fills the file's own holes where the clone reads or writes.
        """
        self.fds: list[int] = []
        self.path = str(origin.memory) if origin.memory else None
        self._template = origin.memory if isinstance(origin, Template) else None
        if self._template:
            fd = os.memfd_create("pymicro-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self.fds.append(fd)
            self.path = f"/proc/self/fd/{fd}"
            os.truncate(fd, spec.memory_mib << 20)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Let the file go; QEMU keeps what it has mapped. Idempotent."""
        while self.fds:
            os.close(self.fds.pop())

    def fill(self) -> "Filling":
        """Begin to copy the template's pages, in a thread; close the file when they are there."""
        return Filling(self, self._template)


class Filling:
    """The copying of a template's pages, beside QEMU's start and the shim's imports: the kernel does the work."""

    def __init__(self, ram: Ram, template: Path | None) -> None:
        self._ram = ram
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        if template:
            self._thread = threading.Thread(target=self._copy, args=(template,), name="template")
            self._thread.start()

    def _copy(self, template: Path) -> None:
        try:
            copy_populated(template, self._ram.fds[0])
        except OSError as error:
            self._error = error
        finally:
            self._ram.close()

    def wait(self) -> None:
        """Return when all pages are there: the VM must not run before. Raises OSError."""
        if self._thread:
            self._thread.join()
        if self._error:
            raise self._error


def copy_populated(source: Path, target_fd: int) -> None:
    """Copy the populated ranges of the sparse file `source` into the file behind `target_fd`, which is empty so far.

    Raises OSError.
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
