"""ttrpc for asyncio: client, server and streaming over one stream socket. See README.md beside this file.

Sources: containerd/ttrpc's PROTOCOL.md, and its Go implementation where that document is silent.
"""

from pymicro.ttrpc.client import Client
from pymicro.ttrpc.methods import AnyMethod, Call, Method, Services, StreamMethod, current_call
from pymicro.ttrpc.server import Server
from pymicro.ttrpc.status import Code, Disconnected, Error, ProtocolError, StatusError
from pymicro.ttrpc.streaming import ClientStream, ServerStream

__all__ = [
    "AnyMethod",
    "Call",
    "Client",
    "ClientStream",
    "Code",
    "Disconnected",
    "Error",
    "Method",
    "ProtocolError",
    "Server",
    "ServerStream",
    "Services",
    "StatusError",
    "StreamMethod",
    "current_call",
]
