"""Why a request fails: one exception per kind of the wire protocol, and how a defect is summed up in one line."""

from pymicro.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class RequestError(Exception):
    """A request that cannot be done; the subclass gives the reply's `kind`, the text its message."""

    kind = messages.INTERNAL


class NotFound(RequestError):
    kind = messages.NOT_FOUND


class AlreadyExists(RequestError):
    kind = messages.ALREADY_EXISTS


class Invalid(RequestError):
    kind = messages.INVALID


class WrongState(RequestError):
    kind = messages.WRONG_STATE


class RuntimeFailed(RequestError):
    """crun said no; the message is its own."""

    kind = messages.RUNTIME


def summary(error: BaseException) -> str:
    """Return the error and the places it came through as one line; the traceback module is too costly to import."""
    places = []
    traceback: TracebackType | None = error.__traceback__
    while traceback:
        code = traceback.tb_frame.f_code
        places.append(f"{code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return f"{type(error).__name__}: {error} ({' > '.join(places)})"
