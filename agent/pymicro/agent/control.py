"""The control connection: the hello, requests in, replies and events out."""

import _socket
import posix
import time
from _thread import allocate_lock

from pymicro.agent import clock, handlers, vsock
from pymicro.agent.concurrency import log, spare
from pymicro.agent.errors import RequestError, summary
from pymicro.wire import frames, messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pymicro.agent.handlers import Agent, Answer


DIAL_ATTEMPTS = 600
DIAL_PAUSE = 0.05
"""Seconds between two attempts: the host refuses for a while when many streams are dialled at once, or when it has
other things to do. What is not dialled is lost.
"""
LONGEST_MESSAGE = 4096
"""Characters of an error: a program's name, which crun repeats, may be longer than what the host takes."""
LATEST_NS = 1 << 63
"""Nanoseconds since the epoch that are too many for a clock."""


def uptime_ms() -> int:
    """Return the milliseconds since the guest's kernel started."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Control:
    """The control connection. Any thread may send; one thread, in `serve`, receives."""

    def __init__(self, connection: _socket.socket, cid: int) -> None:
        """Take a connection to the host, which listens for streams at the port `cid`."""
        self._connection = connection
        self._cid = cid
        self._write_lock = allocate_lock()

    def say_hello(self, boot_ms: int) -> None:
        self.send(
            {
                "hello": "control",
                "version": messages.PROTOCOL_VERSION,
                "kernel": posix.uname().release,
                "boot_ms": boot_ms,
                "agent_ms": uptime_ms(),
            }
        )

    def send(self, message: "dict[str, Any]") -> None:
        """Send one message. Raises OSError when the host is gone: then this VM ends anyway."""
        self._send_frame(frames.encode(message))

    def _send_frame(self, frame: bytes) -> None:
        with self._write_lock:
            vsock.send_all(self._connection, frame)

    def dial_stream(self, token: str, given_up: "Callable[[], bool]") -> _socket.socket:
        """Return a stream connection that has said its token. Raises OSError, also when it is `given_up` meanwhile."""
        for _ in range(DIAL_ATTEMPTS):
            if given_up():
                break
            connection = vsock.dial(self._cid)
            if connection:
                connection.sendall(frames.encode({"hello": "stream", "token": token}))
                return connection
            time.sleep(DIAL_PAUSE)
        raise ConnectionRefusedError("the host does not take the stream's connection")

    def serve(self, agent: "Agent") -> None:
        """Answer requests until the host closes the connection. Raises OSError, FrameError."""
        while True:
            prefix = self._receive(frames.PREFIX_SIZE)
            if not prefix:
                return
            request: dict[str, Any] = frames.decode(self._receive(frames.payload_size(prefix)))
            host_ns, method = request.get("now_ns"), request.get("method")
            if isinstance(host_ns, int) and 0 < host_ns < LATEST_NS:
                clock.follow(host_ns, back=method == "setup")
            if isinstance(method, str) and method in handlers.INLINE:
                self._answer(agent, request)
            else:
                spare.run_apart(self._answer, agent, request)

    def _send_reply(self, reply: "dict[str, Any]") -> None:
        """Send a reply, or that it is more than the host takes: that would end the VM."""
        frame = frames.encode(reply)
        if len(frame) > frames.PREFIX_SIZE + frames.MAX_FROM_GUEST:
            text = f"the answer has {len(frame)} bytes, the host takes {frames.MAX_FROM_GUEST}"
            frame = frames.encode({"id": reply["id"], "error": {"kind": messages.INTERNAL, "message": text}})
        self._send_frame(frame)

    def _receive(self, size: int) -> bytes:
        """Return exactly `size` bytes, or nothing at the end of the connection."""
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            count = self._connection.recv_into(view)
            if count == 0:
                return b""
            view = view[count:]
        return bytes(buffer)

    def _answer(self, agent: "Agent", request: "dict[str, Any]", rest: "Callable[[], Answer] | None" = None) -> None:
        after = None
        try:
            result = rest() if rest else handlers.find(request["method"])(agent, request["params"])
            if callable(result):
                spare.run_apart(self._answer, agent, request, result)
                return
            if isinstance(result, tuple):
                result, after = result
            reply: dict[str, Any] = {"id": request["id"], "result": result}
        except Exception as error:  # noqa: BLE001  # a defect is the host's to know, not a reason to die
            reply = {"id": request.get("id", 0), "error": error_body(request, error)}
        self._send_reply(reply)
        if after:
            after()


def error_body(request: "dict[str, Any]", error: Exception) -> "dict[str, str]":
    """Return the reply's error for an exception; what we did not foresee goes to the console as well."""
    if isinstance(error, RequestError):
        return {"kind": error.kind, "message": str(error)[:LONGEST_MESSAGE]}
    text = f"{request.get('method')}: {summary(error)}"[:LONGEST_MESSAGE]
    log(f"defect: {text}")
    return {"kind": messages.INTERNAL, "message": text}
