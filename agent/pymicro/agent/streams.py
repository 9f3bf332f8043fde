"""The pumps between a process's stdio and its stream connections to the host: one thread and one connection each.

Nothing is buffered here beyond one chunk: when the host does not read, the pipe fills and the process blocks, as it
would on a pipe of the host's own. No byte is dropped while the connection lives, and the counts say which bytes an
exit or an end of file covers (wire.messages tells why an end is a count and not a close).

Connections never block a system call: a splice that waits for the host would hold the pipe's lock, and a process
that waits for that lock cannot even be killed.
"""

import posix
import select
import time
from _socket import SHUT_RDWR, socket
from _thread import allocate_lock

from pymicro.agent.concurrency import log
from pymicro.agent.vsock import MAX_SEND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Connect = Callable[[Callable[[], bool]], "socket | None"]  # called with what tells whether it is given up

TERMINAL_CHUNK = 1 << 16
LOST = select.POLLRDHUP | select.POLLHUP | select.POLLERR
DISCARD_CHECK_MS = 500
TERMINAL_PAUSE = 0.05
"""Seconds between two looks at a terminal that nobody has open: the process may open it again."""


class Pump:
    """What both directions share: a connection that is dialled in the pump's thread and can be cut from another."""

    def __init__(self, connect: "Connect", local: int) -> None:
        """Take over the descriptor `local`, this side's end of the process's pipe or terminal.

        `connect` returns a connection, or None for a terminal whose output nobody wants.
        """
        self._connect = connect
        self._local = local
        self._socket: socket | None = None
        self._aborted = False
        self._lock = allocate_lock()
        self.ended = False
        """Nothing more will be moved."""

    def abort(self) -> None:
        """Cut the connection: the thread ends soon and closes what it owns. Bytes not yet moved are lost."""
        with self._lock:
            self._aborted = True
            self._shut_down()

    def discard(self) -> None:
        """Close a pump that will not run after all."""
        self.ended = True
        posix.close(self._local)

    def _shut_down(self) -> None:
        if self._socket:
            try:  # noqa: SIM105  # contextlib is not imported
                self._socket.shutdown(SHUT_RDWR)
            except OSError:  # not connected any more
                pass

    def run(self) -> None:
        """Dial, move bytes until the end, close everything. The pump's thread runs this."""
        try:
            connection = self._connect(lambda: self._aborted)
            if connection is None:
                self._discard()
                return
            with self._lock:
                self._socket = connection
                if self._aborted:
                    return
            connection.setblocking(False)
            self._move(connection)
        except OSError as error:
            if not self._aborted:
                self._broken(error)
        finally:
            self.ended = True
            self._close()

    def _move(self, connection: socket) -> None:
        raise NotImplementedError

    def _broken(self, error: OSError) -> None:
        """Deal with a connection that failed; for an input there is nothing more to do than to close it."""

    def _discard(self) -> None:
        """Keep the process from blocking on a stream that nobody serves."""

    def _close(self) -> None:
        with self._lock:
            if self._socket:
                self._socket.close()
                self._socket = None
        posix.close(self._local)


class OutputPump(Pump):
    """Moves what a process writes to the host."""

    def __init__(
        self, connect: "Connect", local: int, lives: "Callable[[], bool] | None", on_end: "Callable[[int], None]"
    ) -> None:
        """`on_end` is called with the number of bytes sent once the last writer has closed its end. For a terminal
        `lives` tells whether its process does: until then it may be closed and opened again.
        """
        super().__init__(connect, local)
        self._lives = lives
        self._on_end = on_end
        self._moving = False
        self.sent = 0

    def drained(self) -> bool:
        """Tell whether all that has been written until now is counted in `sent`, or never will be."""
        if self.ended:
            return True
        # In this order: what is no longer in the pipe has been counted by the time that `_moving` is false.
        poller = select.poll()
        poller.register(self._local, select.POLLIN)
        has_data = any(events & select.POLLIN for _, events in poller.poll(0))
        return not has_data and not self._moving

    def _move(self, connection: socket) -> None:
        waiter = select.poll()
        waiter.register(self._local, select.POLLIN)
        waiter.register(connection.fileno(), LOST)
        while self._move_once(connection):
            if any(fd != self._local for fd, _ in waiter.poll()):
                raise ConnectionResetError("the host closed it")
        self.ended = True
        self._on_end(self.sent)
        wait_for(connection, LOST)  # until the host has taken everything

    def _move_once(self, connection: socket) -> bool:
        """Move what is there; False at the end of file."""
        self._moving = True
        try:
            return self._read_terminal(connection, self._lives) if self._lives else self._splice(connection)
        finally:
            self._moving = False

    def _splice(self, connection: socket) -> bool:
        stuck = False
        while True:
            try:
                count = posix.splice(self._local, connection.fileno(), MAX_SEND, flags=posix.SPLICE_F_NONBLOCK)
            except BlockingIOError:  # the pipe is empty, or the connection is full
                if stuck or not readable(self._local):
                    return True
                wait_for(connection, select.POLLOUT | LOST)
                stuck = True
                continue
            if count == 0:
                return False
            self.sent += count
            stuck = False

    def _read_terminal(self, connection: socket, lives: "Callable[[], bool]") -> bool:
        if not readable(self._local):
            return True
        try:
            data = posix.read(self._local, TERMINAL_CHUNK)
        except BlockingIOError:
            return True
        except OSError:  # EIO: nobody has the terminal open
            return not self._aborted and self._may_be_opened(lives)
        self._send_all(connection, data)
        return bool(data)

    def _may_be_opened(self, lives: "Callable[[], bool]") -> bool:
        """Tell, after a while, whether a terminal that nobody has open may have been opened again."""
        alive = lives()
        if alive:
            time.sleep(TERMINAL_PAUSE)
        return alive

    def _send_all(self, connection: socket, data: bytes) -> None:
        while data:
            try:
                count = connection.send(data[:MAX_SEND])
            except BlockingIOError:
                wait_for(connection, select.POLLOUT | LOST)
                continue
            self.sent += count
            data = data[count:]

    def _broken(self, error: OSError) -> None:
        log(f"an output stream broke, what follows is dropped: {error}")
        self._discard()

    def _discard(self) -> None:
        self.ended = True
        poller = select.poll()
        poller.register(self._local, select.POLLIN)
        while not self._aborted:
            try:
                if poller.poll(DISCARD_CHECK_MS) and not posix.read(self._local, TERMINAL_CHUNK):
                    return
            except OSError:  # EIO, of a terminal
                if not self._lives or not self._may_be_opened(self._lives):
                    return


class InputPump(Pump):
    """Moves what the host sends into a process's stdin, and closes that at the count that `finish_at` gives."""

    def __init__(self, connect: "Connect", local: int) -> None:
        super().__init__(connect, local)
        self._limit: int | None = None
        self._received = 0
        posix.set_blocking(local, False)  # of our end only: the process's end is another open file

    def finish_at(self, count: int) -> None:
        """End the process's stdin after `count` bytes in all. A terminal stays open as long as its output is read."""
        with self._lock:
            self._limit = count
            if self._received >= count:
                self._shut_down()  # nothing more comes: wakes the thread

    def _move(self, connection: socket) -> None:
        while not self._complete():
            wait_for(connection, select.POLLIN)
            try:
                data = connection.recv(TERMINAL_CHUNK)
            except BlockingIOError:
                continue
            if not data and not self._complete():
                raise ConnectionResetError("the host closed it")
            with self._lock:
                self._received += len(data)
            if not self.ended:
                self._write(connection, data)

    def _complete(self) -> bool:
        with self._lock:
            return self._limit is not None and self._received >= self._limit

    def _write(self, connection: socket, data: bytes) -> None:
        poller = select.poll()
        poller.register(self._local, select.POLLOUT)
        poller.register(connection.fileno(), select.POLLHUP)
        while data:
            try:
                data = data[posix.write(self._local, data) :]
            except BlockingIOError:
                if any(fd != self._local for fd, _ in poller.poll()):
                    raise ConnectionResetError("cut while the process did not read") from None
            except OSError:  # EPIPE: the process has closed its stdin; take what still comes and drop it
                self.ended = True
                return


def readable(fd: int) -> bool:
    """Tell whether reading would not wait."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


def wait_for(connection: socket, events: int) -> None:
    poller = select.poll()
    poller.register(connection.fileno(), events)
    poller.poll()
