"""The Task service over gRPC: the same handlers as over ttrpc, for whom the settings ask for it.

gRPC's library takes no socket that is bound already, so it listens in the run directory, and connections to the shim's
own socket are relayed there: that one is there before the library is, its peers' credentials are looked at, and no
start races with another. Imported only where it is used: grpcio costs 100 ms and 20 MB.
"""

import asyncio
import logging
import os
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

# what the library writes to stderr is no log line of ours; the shim's forks become other programs at once
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc  # type: ignore[import-untyped]  # it ships no types, and reads its environment when it is imported
from google.protobuf.message import Message
from pymicro.ttrpc.methods import Method
from pymicro.ttrpc.server import Authorize
from pymicro.ttrpc.status import StatusError, StatusOf, defect, known

logger = logging.getLogger(__name__)

SOCKET = "grpc.sock"
"""In the run directory, which is root's alone."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_CHUNK = 64 * 1024
_FAREWELL = 1.0
"""Seconds that answers which are on their way have, when all is over."""


class GrpcServer:
    """Serves unary methods at a listening socket; used like `ttrpc.Server`."""

    def __init__(
        self,
        services: Mapping[str, Mapping[str, Method[Any]]],  # of any request type
        directory: str,
        *,
        status_of: StatusOf,
        authorize: Authorize,
    ) -> None:
        """`services` are methods by service and name. The library's own socket is made in `directory`."""
        self._path = os.path.join(directory, SOCKET)
        self._authorize = authorize
        self._relays: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._server = grpc.aio.server()
        for service, methods in services.items():
            handlers = {
                name: grpc.unary_unary_rpc_method_handler(
                    _answering(f"{service}/{name}", method, status_of),
                    request_deserializer=method.request.FromString,
                    response_serializer=_serialize,
                )
                for name, method in methods.items()
            }
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    def __repr__(self) -> str:
        return f"<GrpcServer {self._path} {'closing' if self._closing.is_set() else 'serving'}>"

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections on `listener`, a listening unix socket, until cancelled or closed.

        Takes it over and closes it. Raises OSError when gRPC cannot listen.
        """
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            listener.close()
            raise OSError(f"gRPC cannot listen at {self._path}: {error}") from error
        await self._server.start()
        acceptor = await asyncio.start_unix_server(self._relay, sock=listener)
        try:
            await self._closing.wait()
        finally:
            acceptor.close()
            await self._end_relays()
            await self._server.stop(None)
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    async def close(self, *, grace: float = 0.0) -> None:
        """Stop serving for good; handlers may go on for up to `grace` seconds."""
        await self._server.stop(grace)
        self._closing.set()

    async def _end_relays(self) -> None:
        if self._relays:
            _, late = await asyncio.wait(self._relays, timeout=_FAREWELL if self._closing.is_set() else 0)
            for relay in late:
                relay.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _relay(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Bring a client's bytes to gRPC and back, until both have ended."""
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        try:
            if not self._authorize(writer.get_extra_info("socket")):
                logger.warning("a connection to the shim is refused: its peer runs as another user")
                return
            inner_reader, inner_writer = await asyncio.open_unix_connection(self._path)
            try:
                await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
            finally:
                inner_writer.close()
        except OSError as error:  # a client that goes away half way
            logger.debug("a gRPC connection ended: %s", error)
        finally:
            writer.close()
            self._relays.discard(task)


async def _pump(source: StreamReader, sink: StreamWriter) -> None:
    """Copy until the source ends, and end the sink then: the other direction may still go on."""
    while data := await source.read(_CHUNK):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        with suppress(OSError):
            sink.write_eof()


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _answering(
    name: str, method: Method[Any], status_of: StatusOf
) -> Callable[[Any, Any], Awaitable[Message]]:  # a request of the method's type, and grpc's context, which has no type
    async def answer(request: Any, context: Any) -> Message:  # as above
        try:
            return await method.handler(request)
        except Exception as error:  # whatever a handler raises becomes its answer
            found = _classify(name, error, status_of)
            # a file name that is no UTF-8 may have found its way into a message as surrogates
            text = found.message.encode(errors="replace").decode()
            await context.abort(_CODES.get(found.code, grpc.StatusCode.UNKNOWN), text)
            raise AssertionError("abort() raises") from error

    return answer


def _classify(name: str, error: Exception, status_of: StatusOf) -> StatusError:
    if found := known(error, status_of):
        return found
    logger.error("%s failed", name, exc_info=error)
    return defect(error)
