"""What `delete` answers, by what the shim has left in the container's bundle. Imported by `start` and `delete`.

containerd tells others from it how a task has ended whose shim was killed (shim contract, delete).
"""

import os
import time
from contextlib import suppress

from pymicro.shim.protowire import field

KILLED = 137
"""The status of a task of which nobody knows more than that it is gone."""
PID = "init.pid"
"""The file with the task's pid, named as by containerd's runc shim: other programs read it as well."""
EXITED = "exited"
"""The file with the answer about a task that has ended."""
FREED = "freed"
"""The file with the answer when nothing is left to be freed: the program's first lines, in shell, give it."""


def delete_response(status: int, at_ns: int, pid: int = 0) -> bytes:
    """Return a containerd.task.v2.DeleteResponse as bytes: pid = 1, exit_status = 2, exited_at = 3 (seconds = 1,
    nanos = 2).
    """
    moment = field(1, at_ns // 10**9) + field(2, at_ns % 10**9)
    return field(1, pid) + field(2, status) + field(3, moment)


def leave_pid(bundle: str, pid: int) -> None:
    """Leave the pid of a new task. The bundle may be gone."""
    forget(bundle)
    _write(bundle, PID, b"%d" % pid)


def leave_exit(bundle: str, status: int, at_ns: int, pid: int) -> None:
    """Leave how a task has ended."""
    _write(bundle, EXITED, delete_response(status, at_ns, pid))


def leave_freed(bundle: str) -> None:
    """Spare `delete` its work: all has been freed."""
    _write(bundle, FREED, of(bundle))


def of(bundle: str) -> bytes:
    """Return the answer about the bundle's task, as far as it is known: else that it has been killed just now."""
    with suppress(OSError), open(os.path.join(bundle, EXITED), "rb") as file:
        return file.read()
    pid = 0
    with suppress(OSError, ValueError), open(os.path.join(bundle, PID), "rb") as file:
        pid = int(file.read())
    return delete_response(KILLED, time.time_ns(), pid)


def forget(bundle: str) -> None:
    """Remove what an earlier task has left in this bundle."""
    for name in (PID, EXITED, FREED):
        with suppress(OSError):
            os.unlink(os.path.join(bundle, name))


def _write(bundle: str, name: str, content: bytes) -> None:
    path = os.path.join(bundle, name)
    with suppress(OSError):
        with open(f"{path}.new", "wb") as file:
            file.write(content)
        os.replace(f"{path}.new", path)
