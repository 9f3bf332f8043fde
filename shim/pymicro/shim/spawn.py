"""Starting the pod's host processes: the one place that forks a helper program.

Each helper joins the pod's cgroups and network namespace before it runs its first instruction and dies with the shim
(PDEATHSIG). Nobody waits for that: the kernel takes 20 ms to put the first of them into a cgroup, and the shim has
other things to do. No event loop is needed either: a VM's processes are started while asyncio is still to be imported.
"""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from msgspec import Struct
from pymicro.shim import cgroup, forked, syscalls
from pymicro.shim.errors import HostMissing

LONGEST_LINE = 500
_LAST_LINES = 10
_PIPE_SIZE = 64 * 1024


class Place(Struct, frozen=True):
    """Where a pod's host processes run: their directory, cgroup directories (one per hierarchy) and network
    namespace.
    """

    directory: Path
    cgroups: tuple[str, ...] = ()
    netns_fd: int | None = None


class Child:
    """A helper that has been started; `helper.Helper` watches it. `outputs` are the read ends of stdout and stderr,
    `failure` that of a pipe in which it says why it could not become its program.
    """

    def __init__(self, name: str, program: str, pid: int, outputs: tuple[int, ...], failure: int) -> None:
        self.name = name
        self.pid = pid
        self._program = program
        self._outputs = outputs
        self._failure = failure
        self._status: int | None = None

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self.pid}>"

    def check(self) -> None:
        """Wait until it runs its program. Raises HostMissing where it cannot; then nothing is left of it."""
        if self._failure < 0:
            return
        with open(self._failure, "rb") as pipe:
            self._failure = -1
            reason = pipe.read().decode(errors="replace")
        if reason:
            self.end()
            raise HostMissing(
                f"cannot start {self.name} as {self._program!r}: {reason}; `pymicroctl check` tells what to install"
            )

    @property
    def ended(self) -> bool:
        """Whether it is gone, of one that nobody watches."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def wait(self) -> int:
        """Reap it and return its exit status, negative for a signal."""
        if self._status is None:
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def take_outputs(self) -> tuple[int, ...]:
        """Return the read ends of stdout and stderr, which are the caller's from now on."""
        taken, self._outputs = self._outputs, ()
        return taken

    def last_words(self) -> list[str]:
        """Return the last lines that it wrote to stderr, of one that nobody watches."""
        if not self._outputs:
            return []
        os.set_blocking(self._outputs[1], False)
        with suppress(BlockingIOError):
            lines = map(readable, os.read(self._outputs[1], _PIPE_SIZE).splitlines())
            return [line for line in lines if line][-_LAST_LINES:]
        return []

    def end(self) -> None:
        """Kill and reap it, unless somebody watches it. Idempotent."""
        if outputs := self.take_outputs():
            if self._status is None:
                os.kill(self.pid, signal.SIGKILL)
                self.wait()
            for fd in outputs:
                os.close(fd)
        if self._failure >= 0:
            os.close(self._failure)
            self._failure = -1


def readable(line: bytes) -> str:
    """Return a line of a log without what could control a terminal, cut at LONGEST_LINE."""
    return "".join(c if c.isprintable() else " " for c in line[:LONGEST_LINE].decode(errors="replace")).strip()


def spawn(name: str, argv: list[str], place: Place, pass_fds: Iterable[int] = (), *, huge_pages: bool = True) -> Child:
    """Start `argv` in `place`, its stdout and stderr in a pipe each; Child.check() tells whether that could be done.

    Without `huge_pages` its heap is not rounded up to 2 MiB at every use. The child joins cgroups and namespace between
    fork and exec: there is no moment at which it runs elsewhere.
    """
    parent = os.getpid()
    pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
    pid = os.fork()
    if pid == 0:
        _become(argv, place, parent, [write for _, write in pipes], pass_fds, huge_pages)
    for _, write in pipes:
        os.close(write)
    out, err, failure = (read for read, _ in pipes)
    return Child(name, argv[0], pid, (out, err), failure)


def _become(
    argv: list[str], place: Place, parent: int, pipes: list[int], pass_fds: Iterable[int], huge_pages: bool
) -> None:
    """Runs in the child and never returns: not one line of the shim's own logic may run here."""
    out, err, failure = pipes
    try:
        forked.reset_signals()
        forked.die_with(parent)
        cgroup.join(place.cgroups)
        if not huge_pages:
            syscalls.disable_huge_pages()
        if place.netns_fd is not None:
            syscalls.setns(place.netns_fd, syscalls.CLONE_NEWNET)
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, source in ((0, null), (1, out), (2, err)):
            os.dup2(source, fd)
        _close_all_but({*pass_fds, failure})
        for fd in pass_fds:
            os.set_inheritable(fd, True)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execvp(argv[0], argv)  # noqa: S606  # that is the point
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent must hear of it and this process must end
        with suppress(OSError):
            os.write(failure, str(error).encode())
    finally:
        os._exit(1)


def _close_all_but(kept: set[int]) -> None:
    """Close what was inherited beyond stdin, stdout and stderr, also what a library may have left inheritable."""
    begin = 3
    for fd in sorted(kept):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, 1 << 20)
