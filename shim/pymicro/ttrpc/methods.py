"""What a server offers: methods as data, and what a handler can learn about the call that it answers."""

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import Message
from pymicro.ttrpc.streaming import ServerStream

RequestT = TypeVar("RequestT", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[RequestT]):
    """A unary method: one request, one response."""

    handler: Callable[[RequestT], Awaitable[Message]]
    """Returns the response. It is cancelled when the deadline passes and when the connection closes."""
    request: type[RequestT]


@dataclass(frozen=True, slots=True)
class StreamMethod(Generic[RequestT]):
    """A method whose client, server, or both, send any number of messages."""

    handler: Callable[[ServerStream[RequestT, Any]], Awaitable[Message | None]]
    """Returns None when the server streams, else the single response. The stream ends when it returns."""
    request: type[RequestT]
    """The type of the client's messages; a client that does not stream sends exactly one."""
    server_streams: bool = True


# A table of methods holds handlers of many request types.
AnyMethod: TypeAlias = Method[Any] | StreamMethod[Any]
Services: TypeAlias = Mapping[str, Mapping[str, AnyMethod]]
"""Methods by the full name of the service, then by their own name."""


@dataclass(frozen=True, slots=True)
class Call:
    """The call that a handler answers."""

    service: str
    method: str
    deadline: float | None = None
    """When the caller gives up, in the event loop's time; None: never."""
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the caller sent beside the request; a key may have several values."""


current_call: ContextVar[Call] = ContextVar("current_call")
"""Set while a handler runs, in its task."""
