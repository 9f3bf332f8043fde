"""What the guest says, as typed data. A guest may be its workload's by now: the form of a message is not believed.

`pymicro.wire.messages` describes the messages; fields that are not known are left out.
"""

from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct, ValidationError, convert
from pymicro.shim.errors import GuestError

T = TypeVar("T")

Bytes = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Status = Annotated[int, Meta(ge=0, le=255)]
Pid = Annotated[int, Meta(ge=1, lt=1 << 31)]


class Event(Struct, frozen=True):
    """Base of all events: which container."""

    container: str


class Exit(Event, frozen=True):
    """A process ended. `stdout` and `stderr` are the bytes that it had written; `exec` is None for the init."""

    exec: str | None
    status: Status
    stdout: Bytes
    stderr: Bytes


class Eof(Event, frozen=True):
    """An output ends after `bytes` bytes."""

    exec: str | None
    stream: Literal["stdout", "stderr"]
    bytes: Bytes


class Oom(Event, frozen=True):
    """The kernel has killed processes for memory."""


EVENTS: dict[object, type[Event]] = {"exit": Exit, "eof": Eof, "oom": Oom}


class Refusal(Struct, frozen=True):
    """Why a request failed: one of the wire's error kinds, and words for people."""

    kind: str
    message: str


class Reply(Struct, frozen=True):
    """The answer to the request `id`: exactly one of the two."""

    id: int
    result: dict[str, Any] | None = None
    error: Refusal | None = None

    def __post_init__(self) -> None:
        """Raise ValueError, which becomes a ValidationError."""
        if (self.result is None) is (self.error is None):
            raise ValueError("exactly one of result and error was expected")


class Started(Struct, frozen=True):
    """Result of `create` and `exec`."""

    pid: Pid


class Pids(Struct, frozen=True):
    """Result of `pids`: the container's processes; which is the init, and which ones are execs, by exec id."""

    pids: list[Pid]
    init: int
    execs: dict[str, Pid]


class Stats(Struct, frozen=True):
    """Result of `stats`: the texts of cgroup files by name."""

    files: dict[str, str]


def result_of(method: str, result: dict[str, Any], kind: type[T]) -> T:
    """Return the result of a request. Raises GuestError where it is no `kind`."""
    try:
        return convert(result, kind)
    except ValidationError as error:
        raise GuestError(f"the guest's answer to {method!r} makes no sense: {error}") from error
