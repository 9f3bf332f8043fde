"""Want of memory: the kernel counts the processes that it kills for it, group by group; each change is told."""

import posix
import select
from _thread import allocate_lock

from pymicro.agent.concurrency import start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

EVENTS_SIZE = 4096
"""Bytes: memory.events has a handful of short lines."""


class Watch:
    """One container's count, and how to tell that it has grown. Any thread may look."""

    def __init__(self, group: str, tell: "Callable[[], None]") -> None:
        """Open the count of a cgroup: a reader is woken when it changes (admin-guide/cgroup-v2.rst, memory.events).

        Raises OSError.
        """
        self.fd = posix.open(f"{group}/memory.events", posix.O_RDONLY | posix.O_CLOEXEC)
        self._tell = tell
        self._lock = allocate_lock()
        self._told = killed(self._read())

    def look(self) -> None:
        """Tell if processes have been killed since the last look: once for all of them, before this returns."""
        with self._lock:
            if self.fd < 0:
                return
            try:
                count = killed(self._read())
            except OSError:  # the group is gone, and its file would wake who polls it again and again
                self._close()
                return
            if count > self._told:
                self._told = count
                self._tell()

    def _read(self) -> str:
        return posix.pread(self.fd, EVENTS_SIZE, 0).decode()

    def close(self) -> None:
        """Stop looking; who polls the file stops, too. Idempotent."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self.fd >= 0:
            posix.close(self.fd)
            self.fd = -1


class Watcher:
    """Looks whenever one of many counts changes: one thread, which is there from the first container on."""

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._poll: select.epoll | None = None
        self._watches: dict[int, Watch] = {}

    def add(self, watch: Watch) -> None:
        """Begin to watch. Raises OSError."""
        with self._lock:
            if self._poll is None:
                self._poll = select.epoll()
                start_thread(self._run, self._poll)
            self._watches[watch.fd] = watch
            self._poll.register(watch.fd, select.EPOLLPRI)

    def remove(self, watch: Watch) -> None:
        """Stop watching and close. Idempotent."""
        with self._lock:
            self._watches = {fd: other for fd, other in self._watches.items() if other is not watch}
        watch.close()

    def _run(self, poll: select.epoll) -> None:
        while True:
            for fd, _ in poll.poll():
                with self._lock:
                    watch = self._watches.get(fd)
                if watch:
                    watch.look()


def killed(events: str) -> int:
    """Return how many processes memory.events says that the kernel has killed."""
    for line in events.splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.isdigit():
            return int(count)
    return 0
