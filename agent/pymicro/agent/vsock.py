"""Dialling the host over vsock, and sending in pieces that every vsock device takes."""

import _socket
import posix
from _struct import pack, unpack
from fcntl import ioctl

from pymicro.agent import devices
from pymicro.wire.messages import HOST_CID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9
NO_CID = 0xFFFFFFFF
"""VMADDR_CID_ANY: what the kernel answers while there is no vsock device."""

MAX_SEND = 28 << 10
"""Bytes in one send or splice. The kernel makes one packet of each, and scatters a packet of more than about 32,400
bytes over several descriptors; vhost-device-vsock (0.3.0 at least) drops such a packet without a word."""


def local_cid() -> int:
    """Return this VM's context id, or NO_CID. Raises OSError."""
    fd = posix.open("/dev/vsock", posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return int(unpack("I", ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, pack("I", NO_CID)))[0])
    finally:
        posix.close(fd)


def dial() -> "_socket.socket | None":
    """Return a connection to the host's port of our own CID; None as long as there is no device or no listener."""
    cid = local_cid()
    if cid == NO_CID:
        return None
    connection = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.connect((HOST_CID, cid))
    except OSError:
        connection.close()
        return None
    return connection


def dial_when_there(meanwhile: "Callable[[], None]") -> _socket.socket:
    """Return a connection to the host as soon as the vsock device is there, however long that takes.

    `meanwhile` is called once if it takes any time at all.
    """
    connection = dial()
    if connection is None:
        meanwhile()
    while connection is None:
        devices.look_again()
        connection = dial()
    return connection


def send_all(connection: _socket.socket, data: bytes) -> None:
    """Send everything over a blocking connection. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[connection.send(view[:MAX_SEND]) :]
