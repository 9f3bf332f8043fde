"""`containerd-shim-pymicro-v1 start`: bind the socket, fork the daemon, print the address.

containerd reads stdout and stderr together and until both are closed: one stray byte spoils the address, one inherited
descriptor blocks containerd. Nothing heavy is imported before the address is out.
"""

import json
import os
import socket
import sys
import time
from contextlib import ExitStack, suppress
from functools import partial

from pymicro.shim import answer, bootstrap, freeing, lean, protocol, sockets, state
from pymicro.shim.arguments import Arguments
from pymicro.shim.bootstrap import Bootstrap
from pymicro.shim.grouping import joins_running_sandbox, sandbox_of
from pymicro.shim.guard import GOOD_END, become_guard, tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def start(arguments: Arguments, begun_ns: int) -> None:
    """Start the daemon of this container's sandbox, or find the one that runs; print its address.

    Raises OSError, ValueError (stdin, config.json), RuntimeError with what is wrong.
    """
    said = bootstrap.parse(sys.stdin.buffer.read(), arguments.id, arguments.namespace)
    annotations = _annotations()
    sandbox_id = sandbox_of(annotations, arguments.id)
    path = sockets.path(arguments.address, arguments.namespace, sandbox_id, said.socket_dir)
    directory = state.directory(arguments.address, arguments.namespace, sandbox_id)
    joins = joins_running_sandbox(annotations)
    # before there is anything to be left: it may take two seconds
    choice = protocol.Choice(protocol.TTRPC) if joins else protocol.choose(said, arguments.containerd)
    listener = sockets.bind(path)
    if listener is None:
        spoken = str(state.read(directory).get("protocol") or protocol.TTRPC)
        _record_address(path, spoken)
        os.write(1, protocol.answer(path, spoken, said))
        return
    with ExitStack() as undo:  # until there is a daemon, which would free it
        undo.callback(listener.close)
        undo.callback(_remove, path)  # before the listener goes: another `start` may bind the path then
        if joins:
            raise RuntimeError(f"the sandbox {sandbox_id!r} of container {arguments.id!r} does not run")
        answer.forget(os.getcwd())
        tell(os.getcwd(), freeing.free(directory, keep_socket=True))  # a sandbox of this name that nobody deleted
        os.makedirs(directory, mode=0o700)
        undo.callback(freeing.free, directory, keep_socket=True)
        record = {"namespace": arguments.namespace, "sandbox": sandbox_id, "bundle": os.getcwd(), "socket": path}
        record |= {"protocol": choice.protocol}
        state.write(directory, record)
        _record_address(path, choice.protocol)
        if os.fork() == 0:
            _go_on(directory, partial(_become_daemon, arguments, said, choice, record, listener, begun_ns), undo)
        undo.pop_all()
    os.write(1, protocol.answer(path, choice.protocol, said))


def _annotations() -> dict[str, str]:
    with open("config.json", encoding="utf-8") as file:
        spec = json.load(file)
    annotations = (spec.get("annotations") or {}) if isinstance(spec, dict) else None
    if not isinstance(annotations, dict):
        raise ValueError("config.json holds no OCI spec")  # noqa: TRY004  # the file's content, not our types
    return annotations


def _record_address(path: str, spoken: str) -> None:
    """Write the address into the bundle, where containerd 1.6 and 1.7 look for it after a restart."""
    with open("address.new", "wb") as file:
        file.write(protocol.in_bundle(path, spoken))
    os.replace("address.new", "address")


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _go_on(directory: str, become_daemon: "Callable[[int], None]", undo: ExitStack) -> None:
    """Runs in the child and never returns: it forks the daemon and is its guard. Where that cannot be done `start` may
    have printed the address already, so the log is where to say it.
    """
    try:
        ended, end = os.pipe()
        daemon = os.fork()
        if daemon == 0:
            os.close(ended)
            become_daemon(end)
        become_guard(ended, directory, daemon)
    except OSError as error:
        undo.close()
        tell(os.getcwd(), [f"the shim's daemon cannot be started: {error}"])
    finally:
        os._exit(1)


def _become_daemon(
    arguments: Arguments,
    said: Bootstrap,
    choice: protocol.Choice,
    record: dict[str, str],
    listener: socket.socket,
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

        nothing_left = run(
            Start(
                namespace=arguments.namespace,
                sandbox_id=record["sandbox"],
                bundle=record["bundle"],
                directory=state.directory(arguments.address, arguments.namespace, record["sandbox"]),
                socket_path=record["socket"],
                protocol=choice.protocol,
                warning=choice.warning,
                ttrpc_address=_ttrpc_address(arguments, said),
                config_path=said.options.config_path,
                config_body=said.options.config_body,
                shim_cgroup=said.options.shim_cgroup,
                debug=arguments.debug or said.debug,
                begun_ns=begun_ns,
            ),
            listener,
        )
        if nothing_left:
            os.write(end, GOOD_END)
        status = 0
    except BaseException:  # noqa: BLE001  # this process must end here, and its log is the only place to say why
        import traceback

        with suppress(OSError, BlockingIOError):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _ttrpc_address(arguments: Arguments, said: Bootstrap) -> str:
    """Return where containerd takes events."""
    named = said.ttrpc_address or os.environ.get("TTRPC_ADDRESS")
    return named or f"{said.grpc_address or arguments.address}.ttrpc"


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
