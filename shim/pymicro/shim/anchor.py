"""The anchor: a host process per container, which is the task's pid.

The workload runs in a VM, yet clients do things to a task's pid: they join its network namespace, read its cgroup's
limits, look into its root. The anchor gives them the right answers: it sits in the pod's network namespace, in the
container's cgroup, chrooted to the container's root filesystem, and it ends before Wait returns.

It is a program of a few bytes, run from memory.
"""

import asyncio
import os
import signal
import struct
from collections.abc import Callable
from contextlib import suppress

from pymicro.shim import cgroup, forked, syscalls
from pymicro.shim.errors import ShimError
from pymicro.shim.spawn import Place

NAME = "pymicro-anchor"
_READY = b"1"


class Anchor:
    """One anchor process. If anybody kills it, `on_death` is called: that means the container."""

    def __init__(self, pid: int, on_death: Callable[[], None]) -> None:
        self.pid = pid
        self._on_death = on_death
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._died)

    def __repr__(self) -> str:
        return f"<Anchor {self.pid} {'running' if self._pidfd >= 0 else 'ended'}>"

    def _died(self) -> None:
        self._reap()
        self._on_death()

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        os.waitpid(self.pid, 0)

    def end(self) -> None:
        """Kill and reap it. Idempotent."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._reap()


def start(root: str, place: Place, on_death: Callable[[], None]) -> Anchor:
    """Fork an anchor in `place`, chrooted to `root`. Raises ShimError with what it could not enter."""
    parent = os.getpid()
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _become_anchor(root, place, parent, write_end)
    os.close(write_end)
    with open(read_end, "rb") as ready:
        answer = ready.read()
    if answer != _READY:
        os.waitpid(pid, 0)
        raise ShimError(
            f"the container's anchor process could not start: {answer.decode(errors='replace') or 'killed'}"
        )
    return Anchor(pid, on_death)


def _become_anchor(root: str, place: Place, parent: int, ready: int) -> None:
    """Runs in the child and never returns: not one line of the shim's own logic may run here."""
    try:
        forked.reset_signals()
        syscalls.set_parent_death_signal(signal.SIGKILL)
        syscalls.set_name(NAME)
        program = syscalls.memory_program(NAME, pause_program())
        cgroup.join(place.cgroups)
        if place.netns_fd is not None:
            syscalls.setns(place.netns_fd, syscalls.CLONE_NEWNET)
        os.chroot(root)
        os.chdir("/")
        if os.getppid() == parent:
            os.write(ready, _READY)
            os.closerange(0, program)
            os.closerange(program + 1, 1 << 20)
            with suppress(OSError):  # a host may forbid programs in memory (vm.memfd_noexec): then we stay what we are
                os.execve(program, [NAME], {})  # noqa: S606  # there is no shell where it runs
            os.close(program)
            while True:
                signal.pause()
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent must hear of it and this process must end
        with suppress(OSError):
            os.write(ready, str(error).encode())
    finally:
        os._exit(1)


def pause_program() -> bytes:
    """Return an x86-64 ELF program that names itself and then waits for ever.

    Nothing can be run from a container's root, which may hold anything; and a fork of the shim alone would keep a copy
    of the 12 MB that the shim changes afterwards.
    """
    base, header_size = 0x400000, 64 + 56
    name = NAME.encode()[:15] + b"\0"
    # mov eax, 34 (pause); syscall; jmp back
    wait = b"\xb8\x22\0\0\0" + b"\x0f\x05" + b"\xeb\xf7"
    # mov eax, 157 (prctl); mov edi, 15 (PR_SET_NAME); lea rsi, the name, which stands behind the code; syscall
    code = (
        b"\xb8\x9d\0\0\0" + b"\xbf\x0f\0\0\0" + b"\x48\x8d\x35" + struct.pack("<i", 2 + len(wait)) + b"\x0f\x05" + wait
    )
    size = header_size + len(code) + len(name)
    ident = b"\x7fELF" + bytes([2, 1, 1])
    # e_type EXEC, e_machine x86-64, e_version, e_entry, e_phoff, e_shoff, e_flags, sizes and counts of the headers
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, base + header_size, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    # PT_LOAD, readable and executable, from file offset 0
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return header + segment + code + name
