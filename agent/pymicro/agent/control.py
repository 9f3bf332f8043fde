"""The connection to the host: dialling, the hello, requests in, replies and events out."""

import _socket
import posix
import time
from _struct import pack, unpack
from _thread import allocate_lock
from fcntl import ioctl

from pymicro.agent import handlers
from pymicro.agent.concurrency import log, start_thread
from pymicro.agent.errors import RequestError, summary
from pymicro.wire import frames, messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pymicro.agent.handlers import Agent
    from pymicro.agent.uevents import Uevents

IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9
NO_CID = 0xFFFFFFFF
"""VMADDR_CID_ANY: what the kernel answers while there is no vsock device."""


def uptime_ms() -> int:
    """Return the milliseconds since the guest's kernel started."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def local_cid() -> int:
    """Return this VM's context id, or NO_CID. Raises OSError."""
    fd = posix.open("/dev/vsock", posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return int(unpack("I", ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, pack("I", NO_CID)))[0])
    finally:
        posix.close(fd)


def dial_host() -> "_socket.socket | None":
    """Return a connection to the host's port of our own CID; None as long as there is no device or no listener."""
    cid = local_cid()
    if cid == NO_CID:
        return None
    connection = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.connect((messages.HOST_CID, cid))
    except OSError:
        connection.close()
        return None
    return connection


def dial_when_there(uevents: "Uevents") -> _socket.socket:
    """Return a connection to the host as soon as the vsock device is there, however long that takes."""
    while True:
        connection = dial_host()
        if connection:
            return connection
        uevents.wait()


class Control:
    """The control connection. Any thread may send; one thread, in `serve`, receives."""

    def __init__(self, connection: _socket.socket) -> None:
        self._connection = connection
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
        frame = frames.encode(message)
        with self._write_lock:
            self._connection.sendall(frame)

    def dial_stream(self, token: str) -> _socket.socket:
        """Return a stream connection that has said its token. Raises OSError."""
        connection = dial_host()
        if connection is None:
            raise ConnectionRefusedError("the host does not take the stream's connection")
        connection.sendall(frames.encode({"hello": "stream", "token": token}))
        return connection

    def serve(self, agent: "Agent") -> None:
        """Answer requests until the host closes the connection. Raises OSError, FrameError."""
        while True:
            prefix = self._receive(frames.PREFIX_SIZE)
            if not prefix:
                return
            request = frames.decode(self._receive(frames.payload_size(prefix)))
            if request.get("method") in handlers.INLINE:
                self._answer(agent, request)
            else:
                start_thread(self._answer, agent, request)

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

    def _answer(self, agent: "Agent", request: "dict[str, Any]") -> None:
        after = None
        try:
            result = handlers.find(request["method"])(agent, request["params"])
            if isinstance(result, tuple):
                result, after = result
            reply: dict[str, Any] = {"id": request["id"], "result": result}
        except Exception as error:  # noqa: BLE001  # a defect is the host's to know, not a reason to die
            reply = {"id": request.get("id", 0), "error": error_body(request, error)}
        self.send(reply)
        if after:
            after()


def error_body(request: "dict[str, Any]", error: Exception) -> "dict[str, str]":
    """Return the reply's error for an exception; what we did not foresee goes to the console as well."""
    if isinstance(error, RequestError):
        return {"kind": error.kind, "message": str(error)}
    text = f"{request.get('method')}: {summary(error)}"
    log(f"defect: {text}")
    return {"kind": messages.INTERNAL, "message": text}
