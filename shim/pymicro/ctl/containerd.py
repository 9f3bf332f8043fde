"""The containerd of this host: where it listens, which process it is, and where it looks for shims."""

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

SHIM = "containerd-shim-pymicro-v1"
DEFAULT_ADDRESS = "/run/containerd/containerd.sock"
_DIAL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running containerd; `path` is its PATH, as a list of directories."""

    pid: int
    program: str
    path: tuple[str, ...]


def address() -> str:
    """Return the path of containerd's socket: the one that CONTAINERD_ADDRESS names, as for ctr, else the usual one."""
    return os.environ.get("CONTAINERD_ADDRESS", DEFAULT_ADDRESS).removeprefix("unix://")


def running(address: str) -> Daemon | None:
    """Return who listens at `address`, None if nobody does."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_DIAL_SECONDS)
        try:
            connection.connect(address)
        except OSError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", credentials)[0]
    return Daemon(pid, _program(pid), _path(pid))


def _program(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:  # not root
        return "containerd"


def _path(pid: int) -> tuple[str, ...]:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return tuple(os.get_exec_path())
    value = next((entry[5:] for entry in environment.split(b"\0") if entry.startswith(b"PATH=")), b"")
    return tuple(os.fsdecode(value).split(":"))
