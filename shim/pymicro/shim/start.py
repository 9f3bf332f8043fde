"""`containerd-shim-pymicro-v1 start`: bind the socket, fork the daemon, print the address.

containerd reads stdout and stderr together and until both are closed: one stray byte spoils the address, one inherited
descriptor blocks containerd. Nothing heavy is imported before the address is out.
"""

import fcntl
import hashlib
import json
import os
import socket
import struct
import sys
import time
from contextlib import suppress

from pymicro.shim import freeing, lean, state
from pymicro.shim.arguments import Arguments
from pymicro.shim.delete import ANSWER
from pymicro.shim.grouping import joins_running_sandbox, sandbox_of
from pymicro.shim.guard import GOOD_END, become_guard, tell

SOCKET_DIRECTORY = "/run/containerd/s"
_BACKLOG = 128


def start(arguments: Arguments, begun_ns: int) -> None:
    """Start the daemon of this container's sandbox, or find the one that runs; print its address.

    Raises OSError, ValueError (config.json), RuntimeError with what is wrong.
    """
    options = sys.stdin.buffer.read()
    annotations = _annotations()
    sandbox_id = sandbox_of(annotations, arguments.id)
    path = socket_path(arguments.address, arguments.namespace, sandbox_id)
    listener = bind(path)
    if listener is None:
        _record_address(path)
        _answer(path)
        return
    if joins_running_sandbox(annotations):
        listener.close()
        os.unlink(path)
        raise RuntimeError(f"the sandbox {sandbox_id!r} of container {arguments.id!r} does not run")
    directory = state.directory(arguments.address, arguments.namespace, sandbox_id)
    with suppress(FileNotFoundError):
        os.unlink(ANSWER)  # of an earlier pod in this bundle
    tell(os.getcwd(), freeing.free(directory, keep_socket=True))  # a sandbox of this name that nobody deleted
    os.makedirs(directory, mode=0o700)
    record = {"namespace": arguments.namespace, "sandbox": sandbox_id, "bundle": os.getcwd(), "socket": path}
    state.write(directory, {**record, "start_pid": os.getpid()})
    _record_address(path)  # before there is a daemon: what can fail must not leave one behind
    start_pid = os.getpid()
    if os.fork() == 0:
        ended, end = os.pipe()
        daemon = os.fork()
        if daemon == 0:
            os.close(ended)
            _become_daemon(arguments, sandbox_id, path, listener, options, begun_ns, end)
        become_guard(ended, directory, daemon, start_pid)
    _answer(path)


def _annotations() -> dict[str, str]:
    with open("config.json", encoding="utf-8") as file:
        spec = json.load(file)
    annotations = (spec.get("annotations") or {}) if isinstance(spec, dict) else None
    if not isinstance(annotations, dict):
        raise ValueError("config.json holds no OCI spec")  # noqa: TRY004  # the file's content, not our types
    return annotations


def socket_path(address: str, namespace: str, sandbox_id: str) -> str:
    """Return where the sandbox's shim listens: the place that containerd's own shims use."""
    name = hashlib.sha256(f"{address}/{namespace}/{sandbox_id}".encode()).hexdigest()
    return f"{SOCKET_DIRECTORY}/{name}"


def bind(path: str) -> socket.socket | None:
    """Return a socket that listens at `path`, or None when a shim of ours listens there already.

    A leftover socket that nobody listens at is replaced. Raises OSError.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    lock = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            if _answers(path):
                return None
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        return listener
    finally:
        os.close(lock)


def _answers(path: str) -> bool:
    """Tell whether a process of our own user listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        size = struct.calcsize("3i")
        _pid, uid, _gid = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return bool(uid == os.geteuid())


def _record_address(path: str) -> None:
    """Write the address into the bundle, where containerd 1.6 and 1.7 look for it after a restart."""
    with open("address.new", "w", encoding="ascii") as file:
        file.write(f"unix://{path}")
    os.replace("address.new", "address")


def _answer(path: str) -> None:
    """Tell containerd the address."""
    os.write(1, f"unix://{path}".encode())


def _become_daemon(
    arguments: Arguments,
    sandbox_id: str,
    path: str,
    listener: socket.socket,
    options: bytes,
    begun_ns: int,
    end: int,
) -> None:
    """Runs in the child and never returns. A good end is said on the descriptor `end`."""
    status = 1
    try:
        os.setsid()
        log = _open_log()
        null = os.open(os.devnull, os.O_RDWR)
        for fd, source in ((0, null), (1, null), (2, null if log < 0 else log)):
            os.dup2(source, fd)
        os.close(null)
        _adjust_oom_score()

        lean.import_msgspec()
        from pymicro.shim.daemon import Start, run

        run(
            Start(
                namespace=arguments.namespace,
                sandbox_id=sandbox_id,
                containerd_address=arguments.address,
                bundle=os.getcwd(),
                directory=state.directory(arguments.address, arguments.namespace, sandbox_id),
                socket_path=path,
                options=options,
                debug=arguments.debug,
                begun_ns=begun_ns,
            ),
            listener,
        )
        os.write(end, GOOD_END)
        status = 0
    except BaseException:  # noqa: BLE001  # this process must end here, and its log is the only place to say why
        import traceback

        with suppress(OSError, BlockingIOError):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _open_log() -> int:
    """Open the bundle's `log` FIFO, whose reader is containerd; -1 without one.

    For reading too, so that it neither needs nor loses its reader, and non-blocking: a containerd that is down must
    not stop us.
    """
    try:
        return os.open("log", os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return -1


def _adjust_oom_score() -> None:
    """Let the kernel prefer us to containerd when memory runs out, as containerd's own shim does: its parent's score
    + 1.
    """
    with suppress(OSError, ValueError):
        with open(f"/proc/{os.getppid()}/oom_score_adj", encoding="ascii") as file:
            score = int(file.read())
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(min(1000, score + 1)))


def now_ns() -> int:
    """CLOCK_MONOTONIC, which timelines count from."""
    return time.monotonic_ns()
