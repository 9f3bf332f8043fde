"""Starting processes and collecting the exit of every process in the VM: PID 1's oldest duty.

One thread reaps all children, the programs we start and the orphans alike. It learns of an exit without consuming it
(WNOWAIT) and reaps under the lock: so while `send_signal` holds the lock a pid cannot be somebody else's.
"""

import posix
from _thread import LockType, allocate_lock

from pymicro.agent.concurrency import Event, log, start_thread
from pymicro.agent.errors import summary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Watcher = Callable[[int], None]

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
DEFAULT_SIGNALS = (13, 25)
"""SIGPIPE and SIGXFSZ: what Python ignores and the programs we start must not."""


class Reaper:
    """Knows who waits for which pid, and the exits that nobody has asked for yet while a claim may still come."""

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._watchers: dict[int, Watcher] = {}
        self._unclaimed: dict[int, int] = {}
        self._claimants = 0
        self._has_children: LockType = allocate_lock()
        self._has_children.acquire()

    def start(self) -> None:
        """Begin to reap, for ever, in a thread."""
        start_thread(self._reap_for_ever)

    def spawn(self, argv: "list[str]", stdio: "tuple[int, int, int]", watcher: "Watcher") -> int:
        """Start a program and return its pid; the reaping thread calls `watcher` with its exit status.

        Every descriptor but the three of `stdio` is closed in it (ours are all close-on-exec). Raises OSError.
        """
        actions = [(posix.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
        with self._lock:
            pid = posix.posix_spawn(argv[0], argv, ENVIRONMENT, file_actions=actions, setsigdef=DEFAULT_SIGNALS)
            self._watchers[pid] = watcher
            self._children_exist()
        return pid

    def run(self, argv: "list[str]", stdio: "tuple[int, int, int]") -> int:
        """Start a program, wait for it and return its exit status. Raises OSError."""
        exited = Event()
        status = []

        def take(code: int) -> None:
            status.append(code)
            exited.set()

        self.spawn(argv, stdio, take)
        exited.wait()
        return status[0]

    def expect(self) -> None:
        """Keep the exits of unknown pids from now on, because `watch` may ask for one of them: end it by `forget`."""
        with self._lock:
            self._claimants += 1

    def forget(self) -> None:
        """End one `expect`. After the last one nothing unclaimed is kept: a stale exit must not meet a reused pid."""
        with self._lock:
            self._claimants -= 1
            if not self._claimants:
                self._unclaimed.clear()

    def watch(self, pid: int, watcher: "Watcher") -> None:
        """Have `watcher` called with the exit status of a process that we did not start ourselves.

        Call it between `expect`, made before the process was started, and `forget`. An exit that came already is
        handed over at once, in the calling thread.
        """
        with self._lock:
            if pid not in self._unclaimed:
                self._watchers[pid] = watcher
                return
            status = self._unclaimed.pop(pid)
        watcher(status)

    def send_signal(self, pid: int, number: int) -> bool:
        """Send a signal to a watched process; False if it has been reaped already. Raises OSError."""
        with self._lock:
            if pid not in self._watchers:
                return False
            posix.kill(pid, number)
            return True

    def _children_exist(self) -> None:
        if self._has_children.locked():
            self._has_children.release()

    def _reap_for_ever(self) -> None:
        while True:
            try:
                # The type stubs allow None, which only WNOHANG gives.
                exited = posix.waitid(posix.P_ALL, 0, posix.WEXITED | posix.WNOWAIT)
            except ChildProcessError:
                # Nobody is left in this VM but us. Only our own spawn can change that.
                self._has_children.acquire()
                continue
            if exited:
                self._reap(exited.si_pid)

    def _reap(self, pid: int) -> None:
        with self._lock:
            _, wait_status = posix.waitpid(pid, 0)
            status = exit_status(wait_status)
            watcher = self._watchers.pop(pid, None)
            if watcher is None and self._claimants:
                self._unclaimed[pid] = status
        if watcher:
            try:
                watcher(status)
            except Exception as error:  # noqa: BLE001  # reaping must go on
                log(f"defect: {summary(error)}")


def exit_status(wait_status: int) -> int:
    """Return what a shell would show: the exit code, or 128 + n after signal n."""
    code = posix.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code
