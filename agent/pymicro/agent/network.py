"""The guest's network devices: the loopback."""

from _socket import AF_INET, SOCK_CLOEXEC, SOCK_DGRAM, socket
from _struct import pack
from fcntl import ioctl

SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1


def raise_loopback() -> None:
    """Set `lo` up; the kernel then gives it its addresses. Raises OSError."""
    control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        ioctl(control.fileno(), SIOCSIFFLAGS, pack("16sH22x", b"lo", IFF_UP))  # struct ifreq
    finally:
        control.close()
