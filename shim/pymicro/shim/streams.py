"""One-time tokens: how a stream that the guest opens finds the stdio it belongs to.

A process in a container could open a connection to the host as well; without a token it gets nothing.
"""

import logging
import os
from collections.abc import Callable, Iterable

from pymicro.shim.channel.base import Channel
from pymicro.shim.sparing import Sparing

logger = logging.getLogger(__name__)


class Streams:
    """The streams that a VM's guest is expected to open."""

    def __init__(self) -> None:
        self._expected: dict[str, Callable[[Channel], object]] = {}
        self._warn = Sparing(logger)

    def expect(self, take: Callable[[Channel], object] | None) -> str | None:
        """Return a fresh token; the connection that presents it goes to `take`. None stays None: no stream is
        wanted.
        """
        if take is None:
            return None
        token = os.urandom(16).hex()
        self._expected[token] = take
        return token

    def claim(self, token: object, channel: Channel) -> None:
        """Hand `channel` to whoever expects `token`, once; close it if nobody does."""
        take = self._expected.pop(token, None) if isinstance(token, str) else None
        if take is None:
            self._warn("a connection from the guest presented an unknown token; closed")
            channel.close()
        else:
            take(channel)

    def forget(self, tokens: Iterable[str | None]) -> None:
        """The connections with these tokens are not expected any more."""
        for token in tokens:
            if token is not None:
                self._expected.pop(token, None)
