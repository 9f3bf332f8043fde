"""Starting the pod's host processes: the one place that forks a helper program.

Each helper joins the pod's cgroups and network namespace before it runs its first instruction and dies with the shim
(PDEATHSIG). No event loop is needed here: a VM's processes are started while asyncio is still to be imported.
"""

import os
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct
from pymicro.shim import cgroup, syscalls
from pymicro.shim.errors import HostMissing


class Place(Struct, frozen=True):
    """Where a pod's host processes run: their directory, cgroup directories (one per hierarchy) and network
    namespace.
    """

    directory: Path
    cgroups: tuple[str, ...] = ()
    netns_fd: int | None = None


class Child:
    """A helper that has been started; `helper.Helper` watches it. `outputs` are the read ends of stdout and stderr."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], outputs: tuple[int, ...]) -> None:
        self.name = name
        self.process = process
        self._outputs = outputs

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self.process.pid}>"

    def take_outputs(self) -> tuple[int, ...]:
        """Return the read ends of stdout and stderr, which are the caller's from now on."""
        taken, self._outputs = self._outputs, ()
        return taken

    def end(self) -> None:
        """Kill and reap it, unless somebody watches it. Idempotent."""
        if outputs := self.take_outputs():
            self.process.kill()
            self.process.wait()
            for fd in outputs:
                os.close(fd)


def spawn(
    name: str, argv: Sequence[str], place: Place, pass_fds: Iterable[int] = (), *, huge_pages: bool = True
) -> Child:
    """Start `argv` in `place`, its stdout and stderr in a pipe each. Raises HostMissing.

    Without `huge_pages` its heap is not rounded up to 2 MiB at every use. The child joins cgroups and namespace between
    fork and exec: there is no moment at which it runs elsewhere.
    """
    parent = os.getpid()
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)

    def enter_place() -> None:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        cgroup.join(place.cgroups)
        if not huge_pages:
            syscalls.disable_huge_pages()
        if place.netns_fd is not None:
            syscalls.setns(place.netns_fd, syscalls.CLONE_NEWNET)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out_write,
            stderr=err_write,
            pass_fds=tuple(pass_fds),
            cwd="/",
            preexec_fn=enter_place,  # noqa: PLW1509  # the shim forks helpers from its only thread
        )
    except (OSError, subprocess.SubprocessError) as error:
        os.close(out_read)
        os.close(err_read)
        raise HostMissing(
            f"cannot start {name} as {argv[0]!r}: {error}; `pymicroctl check` tells what to install"
        ) from error
    finally:
        os.close(out_write)
        os.close(err_write)
    return Child(name, process, (out_read, err_read))
