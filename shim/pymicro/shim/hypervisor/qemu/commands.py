"""What QEMU is told over its monitors, by whoever tells it. Pure: names and JSON as in QEMU's QMP reference."""

from pathlib import Path
from typing import Any

from pymicro.shim.errors import SandboxDied

Command = tuple[str, dict[str, Any]]
"""A command's name and its arguments: JSON of any kind."""

DEVICES_ALONE: Command = (
    "migrate-set-capabilities",
    {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
)
"""Leave RAM out of the state: it is in a file of its own."""


def add_chardev(name: str, path: Path) -> Command:
    """Connect to the socket at `path`, for a device that is to use it."""
    address = {"type": "unix", "data": {"path": str(path)}}
    return "chardev-add", {"id": name, "backend": {"type": "socket", "data": {"addr": address, "server": False}}}


def add_device(port: int, properties: dict[str, Any]) -> Command:
    """Plug a device in, at the root port with the number `port`."""
    return "device_add", {"id": f"device-port{port}", "bus": f"port{port}", **properties}


def migrated(progress: object) -> bool:
    """Tell from the answer to `query-migrate` whether the state has been moved. Raises SandboxDied if it never will
    be.
    """
    status = progress.get("status") if isinstance(progress, dict) else None
    if status in {"failed", "cancelled"}:
        raise SandboxDied(f"QEMU could not move the VM's state: {progress}")
    return status == "completed"
