"""The data that passes between the task service and the containers: frozen, without a trace of protobuf."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount as containerd describes it (containerd.types.Mount): snapshotters answer with a list of these."""

    type: str
    source: str
    target: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StdioPaths:
    """Where containerd wants a process's streams: FIFO paths or URIs, "" for none."""

    stdin: str
    stdout: str
    stderr: str
    terminal: bool


@dataclass(frozen=True, slots=True)
class CreateContainer:
    """A Create request."""

    id: str
    bundle: str
    rootfs: tuple[Mount, ...]
    stdio: StdioPaths


@dataclass(frozen=True, slots=True)
class ExecProcess:
    """An Exec request; `spec` is an OCI `process` object."""

    exec_id: str
    stdio: StdioPaths
    spec: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: 0..255, 128 + n after signal n; and when, by the host's clock."""

    status: int
    at: datetime


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One row of Pids; `exec_id` is "" for what no exec started."""

    pid: int
    exec_id: str = ""


@dataclass(frozen=True, slots=True)
class Deleted:
    """What Delete reports."""

    pid: int
    exit: Exit | None
