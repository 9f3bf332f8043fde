"""The data that passes between the task service and the containers: frozen, without a trace of protobuf."""

from datetime import datetime
from typing import Any

from msgspec import Struct


class Mount(Struct, frozen=True):
    """A mount as containerd describes it (containerd.types.Mount): snapshotters answer with a list of these."""

    type: str
    source: str
    target: str
    options: tuple[str, ...]


class StdioPaths(Struct, frozen=True):
    """Where containerd wants a process's streams: FIFO paths or URIs, "" for none."""

    stdin: str
    stdout: str
    stderr: str
    terminal: bool


class CreateContainer(Struct, frozen=True):
    """A Create request."""

    id: str
    bundle: str
    rootfs: tuple[Mount, ...]
    stdio: StdioPaths


class ExecProcess(Struct, frozen=True):
    """An Exec request; `spec` is an OCI `process` object."""

    exec_id: str
    stdio: StdioPaths
    spec: dict[str, Any]


class Exit(Struct, frozen=True):
    """How a process ended: 0..255, 128 + n after signal n; and when, by the host's clock."""

    status: int
    at: datetime

    @property
    def at_ns(self) -> int:
        """Nanoseconds since the epoch; the last three digits are 0."""
        return round(self.at.timestamp() * 10**6) * 1000


class ProcessInfo(Struct, frozen=True):
    """One row of Pids; `exec_id` is "" for what no exec started."""

    pid: int
    exec_id: str = ""


class Deleted(Struct, frozen=True):
    """What Delete reports."""

    pid: int
    exit: Exit | None
