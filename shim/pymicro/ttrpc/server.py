"""The server: accepts connections, runs each request in a task of its own, and answers in any order."""

import asyncio
import logging
import socket
from asyncio.trsock import TransportSocket
from collections.abc import Callable
from typing import TypeAlias

from pymicro.ttrpc import status
from pymicro.ttrpc.methods import Services
from pymicro.ttrpc.serving import ServerConnection
from pymicro.ttrpc.status import StatusOf
from pymicro.ttrpc.streaming import STALL_SECONDS

_log = logging.getLogger(__name__)

Authorize: TypeAlias = Callable[[TransportSocket], bool]
"""Decides about a new connection by its socket, such as by SO_PEERCRED."""


class Server:
    """Serves `services` on any number of listening sockets.

    `status_of` classifies a handler's exception that is no StatusError; what it does not know (None) is logged
    with its traceback and answered with code 2. `authorize` sees each connection before anything is read from it.
    `stall` is the time in seconds that an unread stream may hold up its connection.
    """

    def __init__(
        self,
        services: Services,
        *,
        status_of: StatusOf = status.status_of,
        authorize: Authorize | None = None,
        stall: float | None = STALL_SECONDS,
    ) -> None:
        self._services = services
        self._status_of = status_of
        self._authorize = authorize
        self._stall = stall
        self._connections: set[ServerConnection] = set()
        self._closing = asyncio.Event()
        self._serving = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        state = "closing" if self._closing.is_set() else "serving" if self._serving else "idle"
        return f"<Server {state} connections={len(self._connections)}>"

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections on `listener`, a listening stream socket, until cancelled or closed.

        Takes the socket over and closes it, as well as every connection, and waits for the handlers, which are
        cancelled. The path of a unix socket is left to whoever bound it.
        """
        loop = asyncio.get_running_loop()
        self._serving += 1
        self._idle.clear()
        connections: set[ServerConnection] = set()
        try:
            async with asyncio.TaskGroup() as group:
                acceptor = await loop.create_server(lambda: self._connection(group, connections), sock=listener)
                try:
                    await self._closing.wait()
                finally:
                    acceptor.close()
                    for connection in tuple(connections):
                        connection.close()
                    for connection in tuple(connections):
                        await connection.wait_lost()
        finally:
            self._serving -= 1
            if not self._serving:
                self._idle.set()

    async def close(self) -> None:
        """Stop serving: send the answers that are ready, cancel the other handlers, close. For good."""
        self._closing.set()
        await self._idle.wait()

    def _connection(self, group: asyncio.TaskGroup, connections: set[ServerConnection]) -> ServerConnection:
        connection = ServerConnection(
            self._services,
            spawn=group.create_task,
            status_of=self._status_of,
            stall=self._stall,
            authorize=self._authorize,
            on_lost=lambda: self._drop(connection, connections),
        )
        connections.add(connection)
        self._connections.add(connection)
        return connection

    def _drop(self, connection: ServerConnection, connections: set[ServerConnection]) -> None:
        connections.discard(connection)
        self._connections.discard(connection)
