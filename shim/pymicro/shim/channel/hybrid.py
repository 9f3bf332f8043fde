"""Hybrid vsock: a guest's connection to (CID 2, PORT) arrives at the unix socket `<uds>_PORT`.

The convention is Firecracker's and is shared by cloud-hypervisor and vhost-device-vsock. A listener is opened while
asyncio is still to be imported.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.channel.base import Channel


GUEST_CID = 0x10000
"""The guest's CID, and the port that it dials: each VM has a socket of its own, so all may have the same."""


class HybridListener:
    """Listens where the guest's connections to one port arrive."""

    def __init__(self, uds: Path, port: int) -> None:
        self.path = Path(f"{uds}_{port}")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(str(self.path))
        self._socket.listen(64)

    def __repr__(self) -> str:
        return f"<HybridListener {self.path}>"

    async def accept(self) -> "Channel":
        """Return the next connection of the guest."""
        import asyncio

        from pymicro.shim.channel.base import Channel

        connected, _ = await asyncio.get_running_loop().sock_accept(self._socket)
        return Channel(connected)

    def close(self) -> None:
        """Stop listening; idempotent."""
        self._socket.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)
