"""Learning of new devices from the kernel: its uevents, with a slow poll behind them."""

import _socket
import select

NETLINK_KOBJECT_UEVENT = 15
KERNEL_GROUP = 1
FALLBACK_MS = 200
"""An event can be lost when the socket's buffer overflows; nothing waits longer than this for that reason."""


class Uevents:
    """A subscription. Open it before the first look at a device: then no event falls between look and wait."""

    def __init__(self) -> None:
        self._socket = _socket.socket(
            _socket.AF_NETLINK,
            _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK,
            NETLINK_KOBJECT_UEVENT,
        )
        self._socket.bind((0, KERNEL_GROUP))
        self._poller = select.poll()
        self._poller.register(self._socket.fileno(), select.POLLIN)

    def wait(self) -> None:
        """Return after the next event, or after FALLBACK_MS."""
        self._poller.poll(FALLBACK_MS)
        try:
            while True:
                self._socket.recv(8192)
        except OSError:  # no more (EAGAIN), or some were lost (ENOBUFS): either way look again
            return
