"""Running a program of the host that a spec or a client names, a hook or a log binary, as runc would run it.

It is none of the pod's helpers: it runs in the mount namespace that containerd runs in, outside of the pod's cgroups,
with the environment that was asked for and nothing else, in a session and so in a process group of its own. Used by
`delete` too: no event loop is needed.
"""

import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

from pymicro.shim import forked, syscalls

_OUT_OF_THE_WAY = 64
"""Where descriptors wait while the program's own, from 0 on, are put in their places."""


def outer_namespace() -> str:
    """Return the mount namespace that containerd runs in: the daemon has left it, its parent, the guard, has not."""
    return f"/proc/{os.getppid()}/ns/mnt"


class Running:
    """A program that has been launched. Its `pidfd` can be read from when it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.status: int | None = None

    def __repr__(self) -> str:
        return f"<Running {self.pid} {'' if self.status is None else self.status}>"

    def peek(self) -> int | None:
        """Return its exit status, negative for a signal, None while it runs. It is not reaped: the pid stays taken."""
        if self.status is not None:
            return self.status
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -int(found.si_status)

    def signal(self, number: int) -> None:
        """Signal it and what it has started, as far as that has stayed in its process group."""
        if self.status is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def reap(self) -> int:
        """Wait for its end and return its exit status. Idempotent."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
            os.close(self.pidfd)
        return self.status

    def end(self) -> None:
        """Kill it, and what it has started, and reap it. Idempotent."""
        self.signal(signal.SIGKILL)
        self.reap()


def launch(
    argv: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
    *,
    program: str = "",
    directory: str = "/",
    namespace: str = "",
    dies_with_us: bool,
) -> Running:
    """Run `program` (else the first word of `argv`) with `descriptors` as its 0, 1, 2 and so on, all others closed.

    It begins in `directory`, or in / where that is gone, and in the mount namespace `namespace`, "" for ours. Returns
    when it runs. Raises OSError that names the program.
    """
    path = program or argv[0]
    parent = os.getpid()
    entered = _open_other(namespace)
    said, failure = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _become(path, argv, environment, descriptors, directory, entered, parent if dies_with_us else 0, failure)
    os.close(failure)
    if entered >= 0:
        os.close(entered)
    with open(said, "rb") as pipe:
        reason = pipe.read().decode(errors="replace")
    if reason:
        os.waitpid(pid, 0)
        raise OSError(f"cannot run {path!r}: {reason}")
    return Running(pid)


def _open_other(namespace: str) -> int:
    """Return a descriptor of `namespace`, -1 where it is the one that we are in."""
    if not namespace or os.path.samestat(os.stat(namespace), os.stat("/proc/self/ns/mnt")):
        return -1
    return os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)


def _become(
    path: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
    directory: str,
    namespace: int,
    parent: int,
    failure: int,
) -> None:
    """Runs in the child and never returns: not one line of the shim's own logic may run here."""
    try:
        forked.reset_signals()
        os.setsid()
        if parent:
            forked.die_with(parent)
        if namespace >= 0:
            syscalls.setns(namespace, syscalls.CLONE_NEWNS)
        os.chdir("/")
        with suppress(OSError):
            os.chdir(directory)
        waiting = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for fd in descriptors]
        failure = fcntl.fcntl(failure, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY)
        for target, fd in enumerate(waiting):
            os.dup2(fd, target)
        os.closerange(len(waiting), failure)
        os.closerange(failure + 1, 1 << 20)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execve(path, list(argv), dict(environment))  # noqa: S606  # that is the point
    except OSError as error:
        with suppress(OSError):
            os.write(failure, (error.strerror or str(error)).encode())
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent must hear of it and this process must end
        with suppress(OSError):
            os.write(failure, str(error).encode())
    finally:
        os._exit(1)
