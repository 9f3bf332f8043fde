"""Cloud Hypervisor's REST API over a connected unix socket, in plain code: it is needed before asyncio is there.

One connection serves for the whole life of the VM; a request is answered before the next one is sent.
"""

import socket
from typing import Any

import msgspec
from pymicro.shim.hypervisor.cloud_hypervisor.requests import ASKING, Request

_ROOT = "/api/v1/"


class Refused(Exception):  # it is an answer
    """Cloud Hypervisor's answer to a request that it did not carry out."""


def encode(request: Request) -> bytes:
    """Return `request` as HTTP."""
    name, body = request
    content = b"" if body is None else msgspec.json.encode(body)
    head = (
        f"{'GET' if name in ASKING else 'PUT'} {_ROOT}{name} HTTP/1.1\r\n"
        f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class Api:
    """Our end of the connection. Every call raises TimeoutError after `timeout` seconds, EOFError or OSError when the
    VMM is gone.
    """

    def __init__(self, connected: socket.socket, timeout: float) -> None:
        self._socket = connected
        self._socket.settimeout(timeout)

    def __repr__(self) -> str:
        return f"<Api fd={self._socket.fileno()}>"

    def fileno(self) -> int:
        return self._socket.fileno()

    def call(self, request: Request) -> Any:
        """Carry out `request` and return what it returns: JSON of any kind. Raises Refused."""
        self.send(request)
        return self.answer(request)

    def send(self, request: Request) -> None:
        """Send `request`; a VMM that is still starting finds it when it is ready."""
        self._socket.sendall(encode(request))

    def answer(self, request: Request) -> Any:
        """Return the answer to `request`, which was sent: JSON of any kind. Raises Refused."""
        from http.client import HTTPException, HTTPResponse  # 20 ms, while the VMM works

        response = HTTPResponse(self._socket, method="GET" if request[0] in ASKING else "PUT")
        try:
            response.begin()
            content = response.read()
        except HTTPException as error:
            raise EOFError(f"no answer: {error}") from error
        finally:
            response.close()
        if response.status >= 300:
            raise Refused(_reason(content) or f"status {response.status}")
        return msgspec.json.decode(content) if content else None

    def close(self) -> None:
        """Let the connection go. Idempotent."""
        self._socket.close()


def _reason(content: bytes) -> str:
    """Return an error's text: the API gives a list, from the outermost error to its cause."""
    try:
        chain = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return content.decode(errors="replace")
    return ": ".join(map(str, chain)) if isinstance(chain, list) else str(chain)
