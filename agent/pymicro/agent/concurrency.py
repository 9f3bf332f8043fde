"""Threads and a one-time event on top of `_thread`: the part of threading that the agent needs."""

import posix
from _thread import allocate_lock, start_new_thread

from pymicro.agent import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CONSOLE = 2


def log(text: str) -> None:
    """Write one line to the VM's console. A broken console is nobody's problem."""
    try:  # noqa: SIM105  # contextlib is not imported
        posix.write(CONSOLE, f"pymicro: {text}\n".encode())
    except OSError:
        pass


def start_thread(function: "Callable[..., None]", *arguments: object) -> None:
    """Run the function in a thread of its own; an exception that it lets out is logged."""
    start_new_thread(_guarded, (function, arguments))


class Spare:
    """A thread that is there before any workload: it does, one after the other, what finds no thread of its own."""

    def __init__(self) -> None:
        self._work: list[tuple[Callable[..., None], tuple[object, ...]]] = []
        self._lock = allocate_lock()
        self._wanted = allocate_lock()
        self._wanted.acquire()

    def start(self) -> None:
        start_thread(self._run)

    def run_apart(self, function: "Callable[..., None]", *arguments: object) -> None:
        """Run the function in a thread of its own, or in the spare one where the VM has no more."""
        try:
            start_thread(function, *arguments)
        except RuntimeError as error:
            log(f"no thread for {function}: {error}")
            with self._lock:
                self._work.append((function, arguments))
                if self._wanted.locked():
                    self._wanted.release()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            with self._lock:
                work, self._work = self._work, []
            for function, arguments in work:
                _guarded(function, arguments)


spare = Spare()


def _guarded(function: "Callable[..., None]", arguments: "tuple[object, ...]") -> None:
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001  # the last place that can say why
        log(f"defect: {errors.summary(error)}")


class Event:
    """Something that happens once; any number of threads may wait for it."""

    __slots__ = ("_lock", "happened")

    def __init__(self) -> None:
        self.happened = False
        self._lock = allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake every waiter. To be called once."""
        self.happened = True
        self._lock.release()

    def wait(self, timeout: float = -1) -> bool:
        """Wait at most `timeout` seconds, for ever by default; tell whether it happened."""
        if not self.happened and self._lock.acquire(timeout=timeout):
            self._lock.release()  # pass it on to the next waiter
        return self.happened
