"""`containerd-shim-pymicro-v1 delete`: free whatever a sandbox left, whoever was killed when.

containerd runs it after every normal end as well, so it is quick when there is nothing to do. A container that shares
its VM with others has no sandbox of its own: it ends with its pod, whose `delete` frees everything.
"""

import os
import time

from pymicro.shim import state
from pymicro.shim.arguments import Arguments

KILLED = 137


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def delete_response(status: int, at_ns: int, pid: int = 0) -> bytes:
    """Return a containerd.task.v2.DeleteResponse as bytes: pid = 1, exit_status = 2, exited_at = 3 (seconds = 1,
    nanos = 2).

    Written out by hand because importing protobuf would take longer than everything else that `delete` does.
    """
    moment = b"\x08" + _varint(at_ns // 10**9) + b"\x10" + _varint(at_ns % 10**9)
    fields = b"\x10" + _varint(status) + b"\x1a" + _varint(len(moment)) + moment
    return (b"\x08" + _varint(pid) if pid else b"") + fields


def delete(arguments: Arguments) -> None:
    """Free the sandbox and answer on stdout."""
    directory = state.directory(arguments.address, arguments.namespace, arguments.id)
    if os.path.isdir(directory):
        state.free(directory)
    os.write(1, delete_response(KILLED, time.time_ns()))
