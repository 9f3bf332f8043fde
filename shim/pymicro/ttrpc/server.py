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
        self._closing = asyncio.Event()
        self._grace = 0.0
        self._serving = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        state = "closing" if self._closing.is_set() else "serving" if self._serving else "idle"
        return f"<Server {state}>"

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections on `listener`, a listening stream socket, until cancelled or closed.

        Takes the socket over and closes it, as well as every connection, and waits for the handlers, which are
        cancelled. The path of a unix socket is left to whoever bound it.
        """
        self._serving += 1
        self._idle.clear()
        try:
            async with asyncio.TaskGroup() as group:
                await self._accept(listener, group)
        finally:
            self._serving -= 1
            if not self._serving:
                self._idle.set()

    async def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        connections: set[ServerConnection] = set()
        open_ = True

        def made(connection: ServerConnection) -> bool:
            connections.add(connection)
            return open_ and self._admit(connection)

        def new() -> ServerConnection:
            return ServerConnection(
                self._services,
                spawn=group.create_task,
                status_of=self._status_of,
                stall=self._stall,
                made=made,
                lost=connections.discard,
            )

        acceptor = await asyncio.get_running_loop().create_server(new, sock=listener)
        try:
            await self._closing.wait()
            acceptor.close()
            running = [task for connection in connections for task in connection.tasks]
            if running and self._grace > 0:
                await asyncio.wait(running, timeout=self._grace)
        finally:
            open_ = False
            acceptor.close()
            for connection in tuple(connections):
                connection.close()
            for connection in tuple(connections):
                await connection.wait_lost()

    def _admit(self, connection: ServerConnection) -> bool:
        if self._authorize is None:
            return True
        try:
            admitted = self._authorize(connection.socket)
        except Exception:  # noqa: BLE001 -- a check that breaks must not let anyone in
            _log.exception("a connection is refused because its check failed")
            return False
        if not admitted:
            _log.warning("a connection to %s is refused", connection.socket.getsockname())
        return admitted

    async def close(self, *, grace: float = 0.0) -> None:
        """Stop serving for good: accept nothing more, send the answers that are ready, cancel the other handlers.

        Handlers may first go on for up to `grace` seconds.
        """
        self._grace = grace
        self._closing.set()
        await self._idle.wait()
