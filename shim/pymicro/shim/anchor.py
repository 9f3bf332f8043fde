"""The anchor: a host process per container, which is the task's pid.

The workload runs in a VM, yet clients do things to a task's pid: they join its network namespace, read its cgroup's
limits, look into its root. The anchor gives them the right answers: it sits in the pod's network namespace, in the
container's cgroup, chrooted to the container's root filesystem, and it ends before Wait returns.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress

from pymicro.shim import cgroup, syscalls
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
    """Fork an anchor in `place`, chrooted to `root`. Raises ShimError with what it could not enter.

    A fork without exec: the program must not be looked up inside the container's root, and a fork shares our memory.
    """
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
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        syscalls.set_parent_death_signal(signal.SIGKILL)
        syscalls.set_name(NAME)
        cgroup.join(place.cgroups)
        if place.netns_fd is not None:
            syscalls.setns(place.netns_fd, syscalls.CLONE_NEWNET)
        os.chroot(root)
        os.chdir("/")
        if os.getppid() == parent:
            os.write(ready, _READY)
            os.closerange(0, 1 << 20)
            while True:
                signal.pause()
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent must hear of it and this process must end
        with suppress(OSError):
            os.write(ready, str(error).encode())
    finally:
        os._exit(1)
