"""A server's side of one connection: checks each frame, finds the method, runs it, answers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.connection import Connection
from pymicro.ttrpc.frame import Frame, Oversize
from pymicro.ttrpc.messages_pb2 import Request, Response, Status
from pymicro.ttrpc.methods import AnyMethod, Call, Method, Services, StreamMethod, current_call
from pymicro.ttrpc.status import Code, StatusError, StatusOf, defect, known
from pymicro.ttrpc.streaming import ServerStream, too_large

_log = logging.getLogger(__name__)

Spawn: TypeAlias = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class ServerConnection(Connection):
    """One client. Its handlers run as tasks that `spawn` starts, and are cancelled when it goes away."""

    def __init__(
        self,
        services: Services,
        *,
        spawn: Spawn,
        status_of: StatusOf,
        stall: float | None,
        made: "Callable[[ServerConnection], bool]",
        lost: "Callable[[ServerConnection], None]",
    ) -> None:
        super().__init__()
        self._services = services
        self._spawn = spawn
        self._status_of = status_of
        self._stall = stall
        self._made = made
        self._lost_callback = lost
        self._last_stream = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, ServerStream[Any, Any]] = {}
        self._held_by_writing = False

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The handlers that run."""
        return list(self._tasks.values())

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._made(self):
            self.close()
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost_callback(self)

    def ended(self) -> None:
        for stream in tuple(self._streams.values()):
            stream.inbox.end(self.disconnected())
        for task in tuple(self._tasks.values()):
            task.cancel()

    def pause_writing(self) -> None:
        """Take no requests from a client that does not read its answers: they would pile up here."""
        super().pause_writing()
        self.hold()
        self._held_by_writing = True

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._held_by_writing:
            self._held_by_writing = False
            self.release()

    # Frames

    def frame_received(self, frame: Frame | Oversize) -> None:
        try:
            self._dispatch(frame)
        except StatusError as error:
            self._abort(frame.stream, error)

    def _dispatch(self, frame: Frame | Oversize) -> None:
        if isinstance(frame, Oversize):
            raise too_large(frame.size)
        if frame.stream % 2 != 1:
            raise StatusError(Code.INVALID_ARGUMENT, "StreamID must be odd for client initiated streams")
        if frame.kind == frames.REQUEST:
            self._request(frame)
        elif frame.kind == frames.DATA:
            self._data(frame)
        # Other kinds are left to later versions of the protocol.

    def _request(self, frame: Frame) -> None:
        if frame.stream <= self._last_stream:
            # The stream of that number, if it still runs, goes on: only this frame is refused.
            self._send_status(
                frame.stream, StatusError(Code.INVALID_ARGUMENT, "StreamID cannot be re-used and must increment")
            )
            return
        self._last_stream = frame.stream
        try:
            request = Request.FromString(frame.payload)
        except DecodeError as error:
            raise StatusError(Code.INVALID_ARGUMENT, f"unmarshal request error: {error}") from error
        method = self._find(request)
        if isinstance(method, Method):
            run: Callable[[], Awaitable[bytes | None]] = partial(_unary, method, request.payload)
        else:
            run = partial(_streaming, method, self._open_stream(frame, method, request))
        self._tasks[frame.stream] = self._spawn(self._answer(frame.stream, request, run))

    def _find(self, request: Request) -> AnyMethod:
        methods = self._services.get(request.service)
        if methods is None:
            raise StatusError(Code.UNIMPLEMENTED, f"service {request.service}")
        method = methods.get(request.method)
        if method is None:
            raise StatusError(Code.UNIMPLEMENTED, f"method {request.method}")
        return method

    def _open_stream(self, frame: Frame, method: StreamMethod[Any], request: Request) -> ServerStream[Any, Any]:
        number = frame.stream
        stream: ServerStream[Any, Any] = ServerStream(
            self,
            number,
            method.request,
            may_send=method.server_streams,
            stall=self._stall,
            abort=lambda error: self._abort(number, error),
        )
        self._streams[number] = stream
        client_streams = bool(frame.flags & frames.REMOTE_OPEN)
        if request.payload or not client_streams:
            stream.inbox.put(request.payload)
        if not client_streams:
            stream.inbox.end()
        return stream

    def _data(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream)
        if stream is None:
            raise StatusError(Code.INVALID_ARGUMENT, "StreamID is no longer active")
        if not frame.flags & frames.NO_DATA:
            if stream.inbox.ended:
                raise StatusError(Code.INVALID_ARGUMENT, "data handling error: the stream is closed for sending")
            stream.inbox.put(frame.payload)
        if frame.flags & frames.REMOTE_CLOSED:
            stream.inbox.end()

    # Answers

    async def _answer(self, number: int, request: Request, run: Callable[[], Awaitable[bytes | None]]) -> None:
        """Run a method and send what comes of it. Never raises but when it is cancelled."""
        try:
            self._send_result(number, await _within_deadline(request, run))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # The handler waited for something that was cancelled; the caller still wants an answer.
            self._send_status(number, StatusError(Code.CANCELLED, "the call was cancelled"))
        except Exception as error:  # noqa: BLE001 -- whatever a handler raises becomes its answer
            self._send_failure(number, request, error)
        finally:
            self._tasks.pop(number, None)
            self._streams.pop(number, None)

    def _send_result(self, number: int, payload: bytes | None) -> None:
        if self.closing:
            return
        if payload is None:
            self.send(number, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA, b"")
        else:
            self._send_response(number, Response(payload=payload))

    def _send_status(self, number: int, error: StatusError) -> None:
        # A file name that is no UTF-8 may have found its way into a message as surrogates, which protobuf refuses.
        message = error.message.encode(errors="replace").decode()
        status = Status(code=error.code, message=message, details=error.details)
        self._send_response(number, Response(status=status))

    def _send_response(self, number: int, response: Response) -> None:
        if self.closing:
            return
        payload = response.SerializeToString()
        if len(payload) > frames.MAX_PAYLOAD:
            error = too_large(len(payload))
            payload = Response(status=Status(code=error.code, message=error.message)).SerializeToString()
        self.send(number, frames.RESPONSE, 0, payload)

    def _abort(self, number: int, error: StatusError) -> None:
        """End whatever runs on stream `number` with `error`."""
        stream = self._streams.pop(number, None)
        if stream is not None:
            stream.finish()
        task = self._tasks.pop(number, None)
        if task is not None:
            task.cancel()
        self._send_status(number, error)

    def _send_failure(self, number: int, request: Request, error: Exception) -> None:
        try:
            self._send_status(number, self._classify(request, error))
        except Exception:  # noqa: BLE001 -- the server goes on, whatever a handler raised
            _log.exception("%s/%s failed, and so did the report of it", request.service, request.method)
            self._send_status(number, StatusError(Code.INTERNAL, "the error cannot be reported"))

    def _classify(self, request: Request, error: Exception) -> StatusError:
        if found := known(error, self._status_of):
            return found
        if not self.closing:
            _log.error("%s/%s failed", request.service, request.method, exc_info=error)
        return defect(error)


async def _unary(method: Method[Any], payload: bytes) -> bytes:
    try:
        message = method.request.FromString(payload)
    except DecodeError as error:
        # Go's server answers 13 as well (protoUnmarshal in services.go).
        name = method.request.DESCRIPTOR.full_name
        raise StatusError(Code.INTERNAL, f"the request is no {name}: {error}") from error
    return (await method.handler(message)).SerializeToString()


async def _streaming(method: StreamMethod[Any], stream: ServerStream[Any, Any]) -> bytes | None:
    try:
        message = await method.handler(stream)
    finally:
        stream.finish()
    if method.server_streams:
        return None
    if message is None:
        raise TypeError("the handler of a method whose server does not stream must return a message")
    return message.SerializeToString()


async def _within_deadline(request: Request, run: Callable[[], Awaitable[bytes | None]]) -> bytes | None:
    if not request.timeout_nano:
        current_call.set(Call(request.service, request.method, None, _metadata(request)))
        return await run()
    try:
        async with asyncio.timeout(request.timeout_nano / 1e9) as scope:
            current_call.set(Call(request.service, request.method, scope.when(), _metadata(request)))
            return await run()
    except TimeoutError:
        if not scope.expired():
            raise
        raise StatusError(Code.DEADLINE_EXCEEDED, "context deadline exceeded") from None


def _metadata(request: Request) -> dict[str, tuple[str, ...]]:
    metadata: dict[str, tuple[str, ...]] = {}
    for pair in request.metadata:
        metadata[pair.key] = (*metadata.get(pair.key, ()), pair.value)
    return metadata
