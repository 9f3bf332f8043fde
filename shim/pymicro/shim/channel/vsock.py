"""Kernel vsock (AF_VSOCK with /dev/vhost-vsock): the guest's connections arrive at a port of the host.

Ports are shared by all shims of a host, and so are CIDs. One rule serves both: the guest dials the port that equals
its own CID, so binding that port reserves the CID, without a race and until the shim is gone. A listener is opened
while asyncio is still to be imported.
"""

import errno
import os
import socket

from pymicro.shim.errors import HostMissing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.channel.base import Channel

FIRST_CID = 0x10000
LAST_CID = 0xFFFF_FFFE
_TRIES = 1000


class VsockListener:
    """Listens for one guest's connections; holds its CID."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        for _ in range(_TRIES):
            self.cid = FIRST_CID + int.from_bytes(os.urandom(8)) % (LAST_CID - FIRST_CID + 1)
            try:
                self._socket.bind((socket.VMADDR_CID_ANY, self.cid))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    self._socket.close()
                    raise
            else:
                self._socket.listen(64)
                return
        self._socket.close()
        raise HostMissing(f"no free vsock CID in {_TRIES} tries; are thousands of VMs running?")

    def __repr__(self) -> str:
        return f"<VsockListener cid={self.cid}>"

    async def accept(self) -> "Channel":
        """Return the next connection of this VM's guest; connections of any other CID are dropped."""
        import asyncio

        from pymicro.shim.channel.base import Channel

        while True:
            connected, (cid, _port) = await asyncio.get_running_loop().sock_accept(self._socket)
            if cid == self.cid:
                return Channel(connected)
            connected.close()
            await asyncio.sleep(0)  # strangers may queue without a pause

    def close(self) -> None:
        """Stop listening and free the CID; idempotent."""
        self._socket.close()
