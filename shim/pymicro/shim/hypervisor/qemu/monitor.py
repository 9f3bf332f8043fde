"""QEMU's monitor in plain code, for the few commands that a start takes: asyncio need not be there yet.

The protocol is QMP (QEMU's docs/interop/qmp-spec): a greeting, then one JSON object per line either way. What comes
later goes over a second monitor, by the QMP library.
"""

import json
import socket
from typing import Any

_CHUNK = 64 * 1024


class Refused(Exception):  # it is an answer
    """QEMU's answer to a command that it did not carry out."""


class Monitor:
    """Our end of a monitor. Every call raises TimeoutError after `timeout` seconds, EOFError or OSError when QEMU is
    gone.
    """

    def __init__(self, connected: socket.socket, timeout: float) -> None:
        self._socket = connected
        self._socket.settimeout(timeout)
        self._unread = b""

    def __repr__(self) -> str:
        return f"<Monitor fd={self._socket.fileno()}>"

    def greet(self) -> None:
        """Take the greeting, which comes when QEMU is ready, and begin to give commands."""
        while "QMP" not in self._read():
            pass
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None) -> Any:
        """Carry out `command`, `fd` going with it, and return what it returns: JSON of any kind. Raises Refused."""
        line = json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"
        if fd is None:
            self._socket.sendall(line)
        else:
            socket.send_fds(self._socket, [line], [fd])
        while True:
            message = self._read()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise Refused(str(message["error"].get("desc", message["error"])))

    def _read(self) -> dict[str, Any]:
        """Return the next message: an answer, or an event."""
        while b"\n" not in self._unread:
            data = self._socket.recv(_CHUNK)
            if not data:
                raise EOFError("QEMU closed its monitor")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Let the monitor go. Idempotent."""
        self._socket.close()
