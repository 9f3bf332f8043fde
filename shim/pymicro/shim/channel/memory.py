"""A channel inside one process, for tests: a socket pair, so that splice and back-pressure behave as they do for
real.
"""

import socket

from pymicro.shim.channel.base import Channel


def pair() -> tuple[Channel, Channel]:
    """Return two connected channels."""
    left, right = socket.socketpair()
    return Channel(left), Channel(right)
