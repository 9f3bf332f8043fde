"""Status codes and errors.

Error:
|- StatusError     the peer answered with a status, a deadline passed, or a message was too large
|- Disconnected    the connection ended while a call was under way (also a ConnectionError)
`- ProtocolError   the peer broke the protocol

"""

from collections.abc import Callable
from enum import IntEnum
from typing import TypeAlias

from google.protobuf.any_pb2 import Any as AnyMessage


class Code(IntEnum):
    """The codes of google.rpc.Code, which ttrpc shares with gRPC."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Error(Exception):
    """Whatever this library raises about a call or a connection."""


class StatusError(Error):
    """A call ended with a status other than OK. A handler raises it to choose the status of its answer."""

    def __init__(self, code: int, message: str, details: tuple[AnyMessage, ...] = ()) -> None:
        super().__init__(code, message)
        self.code = code
        """A Code, or a number that this version does not know."""
        self.message = message
        self.details = details

    def __str__(self) -> str:
        name = Code(self.code).name if self.code in _KNOWN_CODES else f"code {self.code}"
        return f"{name}: {self.message}"


class Disconnected(Error, ConnectionError):
    """The connection is gone. Whether the peer acted on a call that was under way is unknown."""


class ProtocolError(Error):
    """The peer sent what the protocol forbids in this place."""


StatusOf: TypeAlias = Callable[[BaseException], tuple[int, str] | None]
"""Gives the code and message for a handler's exception, or None for one that it does not know."""

_KNOWN_CODES = frozenset(Code)


def known(error: Exception, status_of: StatusOf) -> StatusError | None:
    """Return the status that a handler's exception stands for, None if it is a defect."""
    if isinstance(error, StatusError):
        return error
    found = status_of(error)
    return StatusError(*found) if found is not None else None


def defect(error: Exception) -> StatusError:
    """Return the status of an exception that nobody has foreseen."""
    return StatusError(Code.UNKNOWN, str(error) or type(error).__name__)


_BY_TYPE: dict[type[BaseException], Code] = {
    FileExistsError: Code.ALREADY_EXISTS,
    FileNotFoundError: Code.NOT_FOUND,
    PermissionError: Code.PERMISSION_DENIED,
    TimeoutError: Code.DEADLINE_EXCEEDED,
}
"""As Go's server maps the errors of its standard library (convertCode in services.go)."""


def status_of(error: BaseException) -> tuple[int, str] | None:
    """Return the code and message for a StatusError and for a few built-in exceptions, else None."""
    if isinstance(error, StatusError):
        return error.code, error.message
    for kind, code in _BY_TYPE.items():
        if isinstance(error, kind):
            return code, str(error)
    return None
