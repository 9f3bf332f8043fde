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

from pymicro.shim import answer, freeing, state
from pymicro.shim.arguments import Arguments
from pymicro.shim.grouping import sandbox_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ANSWERED_IN = 4.0
"""Seconds, from the program's beginning, in which `delete` answers, however busy the host is and however slow a hook:
containerd kills it after five, and then keeps the bundle and may tell nobody of the end.
"""


def delete(arguments: Arguments, age: float = 0.0) -> None:
    """Free what nobody uses any more and answer on stdout, within _ANSWERED_IN: a child frees, and goes on alone where
    that takes longer. `age`: seconds that have gone by already.

    Raises SystemExit where the child has failed; it has said why on stderr.
    """
    sandbox_id = _sandbox_id(arguments)
    directory = state.directory(arguments.address, arguments.namespace, sandbox_id)
    held = freeing.hold(directory)  # now: a child that is late must not take a new sandbox of this name for the old
    said, say = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _free_alone(arguments, sandbox_id, directory, held, say)
    for fd in (say, held):
        if fd >= 0:
            os.close(fd)
    in_time = _relayed(said, _ANSWERED_IN - age)
    os.close(said)
    if not in_time:
        os.write(2, f"pymicro: not all is freed after {_ANSWERED_IN:g} s; it goes on, as do poststop hooks\n".encode())
    elif os.waitpid(pid, 0)[1]:
        raise SystemExit(1)
    os.write(1, answer.of(arguments.bundle))


def age_of_program() -> float:
    """Return for how many seconds this process has existed, its shell's first lines included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - state.start_time(os.getpid()) / os.sysconf("SC_CLK_TCK")


def _relayed(pipe: int, limit: float) -> bool:
    """Write to stderr, which containerd logs, what comes from `pipe`; return whether it ended in `limit` seconds."""
    deadline = time.monotonic() + limit
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(pipe, 4096)
        if not data:
            return True
        os.write(2, data)
    return False


def _free_alone(arguments: Arguments, sandbox_id: str, directory: str, held: int, say: int) -> None:
    """Runs in the child, which nobody waits for or kills, and never returns: whoever calls `delete` goes on once."""
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd, ours in ((0, null), (1, null), (2, say)):  # containerd waits until the last one has closed them
            os.dup2(ours, fd)
        _free(arguments, sandbox_id, directory, held)
        status = 0
    except (OSError, ValueError, RuntimeError) as error:
        with suppress(BrokenPipeError):
            os.write(2, f"pymicro: {error}\n".encode())
    finally:
        os._exit(status)


def _free(arguments: Arguments, sandbox_id: str, directory: str, held: int) -> None:
    """`held` is the directory, locked until this process ends, or -1 where there was none when `delete` began."""
    if held >= 0 and not freeing.lock(held, directory):
        return
    recorded = freeing.recorded(directory, arguments.bundle)
    if _in_use(recorded, arguments.id, shared=sandbox_id != arguments.id):
        return
    if held < 0 and (not recorded or os.path.isdir(directory)):  # a directory by now: what was found is a new sandbox's
        return
    warnings = freeing.free_recorded(directory, recorded)
    with suppress(BrokenPipeError):
        os.write(2, "".join(f"pymicro: {warning}\n" for warning in warnings).encode())


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
