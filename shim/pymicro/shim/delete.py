"""`containerd-shim-pymicro-v1 delete`: free whatever a sandbox left, whoever was killed when.

containerd runs it after every normal end as well, and waits for it. There is nothing to do then, and the daemon leaves
the answer in the bundle: the program's first lines, in shell, say it. A container that shares its VM with others leaves
it alone while the shim lives: the shim knows when the last one is gone.
"""

import json
import os
import select
import time
from contextlib import suppress

from pymicro.shim import freeing, state
from pymicro.shim.arguments import Arguments
from pymicro.shim.grouping import sandbox_of
from pymicro.shim.protowire import field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KILLED = 137
ANSWER = "freed"
"""The file in a bundle with what `delete` is to answer. It says that nothing is left."""
_PATIENCE = 3.0
"""Seconds that containerd's client waits for poststop hooks of a shim that was killed."""


def delete_response(status: int, at_ns: int, pid: int = 0) -> bytes:
    """Return a containerd.task.v2.DeleteResponse as bytes: pid = 1, exit_status = 2, exited_at = 3 (seconds = 1,
    nanos = 2).
    """
    moment = field(1, at_ns // 10**9) + field(2, at_ns % 10**9)
    return field(1, pid) + field(2, status) + field(3, moment)


def delete(arguments: Arguments) -> None:
    """Free what nobody uses any more and answer on stdout."""
    sandbox_id = _sandbox_id(arguments)
    directory = state.directory(arguments.address, arguments.namespace, sandbox_id)
    recorded = freeing.recorded(directory, arguments.bundle)
    if not _in_use(recorded, arguments.id, shared=sandbox_id != arguments.id):
        for warning in _free(directory, arguments.bundle, recorded):
            os.write(2, f"pymicro: {warning}\n".encode())  # containerd logs it
    os.write(1, delete_response(KILLED, time.time_ns()))


def _free(directory: str, bundle: str, recorded: "dict[str, Any]") -> list[str]:
    """Free a sandbox; return what is worth a warning. Poststop hooks go on without us where they need long.

    containerd gives `delete` five seconds, kills it then and keeps the bundle.
    """
    if not os.path.isdir(directory):  # nor is there anything to lock, or to write into
        return freeing.free_recorded(directory, recorded) if recorded else []
    if not recorded.get("poststop"):
        return freeing.free(directory, bundle)
    said, say = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _free_alone(directory, bundle, say)
    os.close(say)
    with open(said, "rb") as pipe:
        if not select.select([pipe], [], [], _PATIENCE)[0]:
            return [f"poststop hooks still run after {_PATIENCE:g} s; they go on within their time-outs"]
        warnings = pipe.read().decode(errors="replace").splitlines()
    os.waitpid(pid, 0)
    return warnings


def _free_alone(directory: str, bundle: str, say: int) -> None:
    """Runs in the child, which nobody waits for or kills, and never returns."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # containerd waits until the last one has closed them
            os.dup2(null, fd)
        warnings = freeing.free(directory, bundle)
        with suppress(BrokenPipeError):
            os.write(say, "\n".join(warnings).encode())
    finally:
        os._exit(0)


def leave_answer(bundle: str) -> None:
    """Spare `delete` its work: all has been freed. The bundle may be gone by now."""
    path = os.path.join(bundle, ANSWER)
    with suppress(OSError):
        with open(f"{path}.new", "wb") as file:
            file.write(delete_response(KILLED, time.time_ns()))
        os.replace(f"{path}.new", path)


def _sandbox_id(arguments: Arguments) -> str:
    try:
        with open(os.path.join(arguments.bundle, "config.json"), encoding="utf-8") as file:
            return sandbox_of(json.load(file).get("annotations") or {}, arguments.id)
    except (OSError, ValueError, AttributeError):
        return arguments.id


def _in_use(recorded: "dict[str, Any]", container_id: str, *, shared: bool) -> bool:
    """Tell whether other containers live in the sandbox, or may be about to: then it is not ours to end."""
    if not state.shim_runs(recorded):
        return False
    containers = recorded.get("containers")
    others = [one for one in containers if one != container_id] if isinstance(containers, list) else []
    return shared or bool(others)
