"""Dialling the host over vsock, and sending in pieces that every vsock device takes."""

import _socket
import posix
from _struct import pack, unpack
from fcntl import ioctl

from pymicro.wire.messages import HOST_CID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pymicro.agent.devices import Ports

DEVICE = "/dev/vsock"
IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9
NO_CID = 0xFFFFFFFF
"""VMADDR_CID_ANY: what the kernel answers while there is no vsock device."""

MAX_SEND = 28 << 10
"""Bytes in one send or splice. The kernel makes one packet of each, and scatters a packet of more than about 32,400
bytes over several descriptors; vhost-device-vsock (0.3.0 at least) drops such a packet without a word."""


def dial(cid: int) -> "_socket.socket | None":
    """Return a connection to the host's port `cid`, which is this VM's context id; None if nobody listens there."""
    connection = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.connect((HOST_CID, cid))
    except OSError:
        connection.close()
        return None
    return connection


def dial_when_there(ports: "Ports", meanwhile: "Callable[[], None]") -> "tuple[_socket.socket, int]":
    """Return a connection to the host as soon as the vsock device is there, however long that takes, and this VM's
    context id.

    `meanwhile` is called once if it takes any time at all.
    """
    device = posix.open(DEVICE, posix.O_RDONLY | posix.O_CLOEXEC)
    waited = False
    try:
        while True:
            cid = _local_cid(device)
            if cid != NO_CID and (connection := dial(cid)):
                return connection, cid
            if not waited:
                meanwhile()
                waited = True
            ports.look_again()
    finally:
        posix.close(device)


def _local_cid(device: int) -> int:
    return int(unpack("I", ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, pack("I", NO_CID)))[0])


def send_all(connection: _socket.socket, data: bytes) -> None:
    """Send everything over a blocking connection. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[connection.send(view[:MAX_SEND]) :]
