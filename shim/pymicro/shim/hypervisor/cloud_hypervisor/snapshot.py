"""A saved VM's files: Cloud Hypervisor's three as a template's two, and back.

Its `memory-ranges`, sparse, is the template's RAM. `config.json`, in one line, and `state.json` are the template's
state: what belongs to the VM that was saved is in the former, and is replaced for each clone.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from pymicro.shim.errors import SandboxDied
from pymicro.shim.hypervisor.base import Template
from pymicro.shim.hypervisor.cloud_hypervisor.requests import confinement

MEMORY, CONFIG, STATE = "memory-ranges", "config.json", "state.json"


def pack(directory: Path, template: Template) -> None:
    """Make `template` of what lies in `directory`, which is then gone. Raises OSError, ValueError."""
    config = json.loads((directory / CONFIG).read_bytes())
    with open(template.state, "xb") as file:
        file.write(json.dumps(config).encode() + b"\n" + (directory / STATE).read_bytes())
    os.replace(directory / MEMORY, template.memory)
    remove(directory)


def lay_out(template: Template, directory: Path, writable: Sequence[Path] | None) -> None:
    """Make in `directory` what a VM is restored from, confined to its own files. Raises OSError, SandboxDied."""
    line, _, state = template.state.read_bytes().partition(b"\n")
    try:
        config = json.loads(line)
    except ValueError as error:
        raise SandboxDied(f"{template.state} does not begin with a VM's description: {error}") from error
    remove(directory)
    directory.mkdir()
    (directory / CONFIG).write_text(json.dumps(config | confinement(writable)))
    (directory / STATE).write_bytes(state)
    (directory / MEMORY).symlink_to(template.memory)


def remove(directory: Path) -> None:
    """Remove `directory` with what was made in it. Idempotent."""
    for name in (MEMORY, CONFIG, STATE):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir():
        directory.rmdir()
