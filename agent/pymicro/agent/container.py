"""One container: its bundle and cgroup in the guest, its init and its execs, and the steps of their lives."""

import time
from _thread import allocate_lock

from pymicro.agent import cgroups, files
from pymicro.agent.concurrency import log
from pymicro.agent.crun import Crun, in_runc_words
from pymicro.agent.errors import AlreadyExists, NotFound, RuntimeFailed, WrongState
from pymicro.agent.memory import Watch
from pymicro.agent.process import Process
from pymicro.wire.frames import PREFIX_SIZE, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pymicro.agent.control import Control
    from pymicro.agent.memory import Watcher
    from pymicro.agent.reaper import Reaper
    from pymicro.wire.messages import Streams

BUNDLES = "/run/pymicro/containers"
EXEC_EXIT_LIMIT = 5.0
"""Seconds that the init's exit event waits at most for the exit events of the container's execs."""


class Container:
    """Wraps crun's container of the same id. The host serialises what must be: this guards its own data only."""

    def __init__(
        self, control: "Control", reaper: "Reaper", memory: "Watcher", container_id: str, spec: "dict[str, Any]"
    ) -> None:
        """Take an OCI spec; nothing is done yet."""
        self.id = container_id
        self.directory = f"{BUNDLES}/{container_id}"
        self.execs: dict[str, Process] = {}
        self._control = control
        self._reaper = reaper
        self._memory = memory
        self._watch: Watch | None = None
        self._crun = Crun(reaper, self.directory)
        self._lock = allocate_lock()
        linux = spec.setdefault("linux", {})
        path = linux.get("cgroupsPath") or f"{cgroups.PARENT}/{container_id}"
        linux["cgroupsPath"] = path = f"/{path.strip('/')}"
        self._spec = spec
        self._group = cgroups.ROOT + path
        namespaces = linux.get("namespaces") or []
        self._own_pids = any(item.get("type") == "pid" and not item.get("path") for item in namespaces)
        self.init = Process(control, reaper, container_id, None)

    def __repr__(self) -> str:
        return f"<Container {self.id} {self.init!r} execs={list(self.execs)}>"

    def create(self, streams: "Streams", terminal: bool) -> None:
        """Run `crun create`. Nothing is left of it if that raises."""
        files.make_directories(self.directory, 0o700)
        write_json(f"{self.directory}/config.json", self._spec)
        self._reaper.expect()
        try:
            self._launch_init(streams, terminal)
            self._watch_memory()
            self.init.watch(self._before_init_report)
        except BaseException:
            self._undo_create()
            raise
        finally:
            self._reaper.forget()
            self._spec = {}

    def _launch_init(self, streams: "Streams", terminal: bool) -> None:
        def command(pid_file: str, console_socket: str, stdio: "tuple[int, int, int] | None") -> None:
            options = ["--console-socket", console_socket] if console_socket else []
            self._crun.run("create", "--bundle", self.directory, "--pid-file", pid_file, *options, self.id, stdio=stdio)

        try:
            self.init.launch(streams, terminal, self.directory, command)
        except RuntimeFailed as error:
            raise RuntimeFailed(in_runc_words(str(error), first_word(self._spec.get("process")))) from error

    def _watch_memory(self) -> None:
        """Have the host told of each want of memory, unless the group is one that does not count it."""
        try:
            self._watch = Watch(self._group, self._tell_want_of_memory)
        except FileNotFoundError:
            return
        self._memory.add(self._watch)

    def _tell_want_of_memory(self) -> None:
        self._control.send({"event": "oom", "container": self.id})

    def _look_at_memory(self) -> None:
        """Tell of a want of memory before what came of it."""
        if self._watch:
            self._watch.look()

    def _forget_memory(self) -> None:
        if self._watch:
            self._memory.remove(self._watch)

    def _undo_create(self) -> None:
        self.init.close()
        self._forget_memory()
        try:  # noqa: SIM105  # contextlib is not imported
            self._crun.run("delete", "--force", self.id)
        except RuntimeFailed:  # it may never have existed
            pass
        try:
            cgroups.remove(self._group)
        except OSError as error:  # why it could not be created matters more
            log(f"{self!r}: {error}")
        files.remove_tree(self.directory)

    def start(self) -> None:
        """Run `crun start`. Raises WrongState if the init has exited."""
        if self.init.exited:
            raise WrongState("the container's init has exited")
        try:
            self._crun.run("start", self.id)
        except RuntimeFailed:
            if self.init.exited:
                raise WrongState("the container's init has exited") from None
            raise

    def start_exec(self, process: Process, spec: "dict[str, Any]", streams: "Streams", terminal: bool) -> None:
        """Run `crun exec` for a process made by `add_exec`. Nothing is left of it if that raises."""
        spec_file = f"{self.directory}/exec-{process.exec_id}.json"

        def command(pid_file: str, console_socket: str, stdio: "tuple[int, int, int] | None") -> None:
            options = ["--console-socket", console_socket] if console_socket else []
            self._crun.run(
                "exec", "--process", spec_file, "--detach", "--pid-file", pid_file, *options, self.id, stdio=stdio
            )

        self._reaper.expect()
        try:
            write_json(spec_file, spec)
            process.launch(streams, terminal, self.directory, command)
            process.watch(self._look_at_memory)
            self._require_wanted(process)
        except BaseException as error:
            self.forget_exec(process)
            if self.init.exited:
                raise WrongState("the container's init has exited") from error
            if isinstance(error, RuntimeFailed):
                raise RuntimeFailed(in_runc_words(str(error), first_word(spec))) from error
            raise
        finally:
            self._reaper.forget()
            files.unlink(spec_file)

    def add_exec(self, exec_id: str) -> Process:
        """Return a new process. Raises AlreadyExists."""
        with self._lock:
            if exec_id in self.execs:
                raise AlreadyExists(f"container {self.id} has an exec {exec_id} already")
            process = Process(self._control, self._reaper, self.id, exec_id)
            self.execs[exec_id] = process
            return process

    def end_exec(self, process: Process) -> None:
        """Kill an exec, as soon as it has been started if that is still going on, and forget it."""
        with self._lock:
            process.unwanted = True
            starting = not process.pid
        if not starting:
            self._kill(process)
            process.reported.wait(EXEC_EXIT_LIMIT)
            self.forget_exec(process)

    @staticmethod
    def _kill(process: Process) -> None:
        try:  # noqa: SIM105  # contextlib is not imported
            process.send_signal(cgroups.SIGKILL)
        except NotFound:
            pass

    def _require_wanted(self, process: Process) -> None:
        """End an exec that the host has given up meanwhile. Raises WrongState then."""
        with self._lock:
            unwanted = process.unwanted
        if unwanted:
            self._kill(process)
            raise WrongState(f"exec {process.exec_id} was given up while it was started")

    def forget_exec(self, process: Process) -> None:
        """Close an exec's streams and forget it."""
        process.close()
        with self._lock:
            if self.execs.get(process.exec_id or "") is process:
                del self.execs[process.exec_id or ""]

    def find(self, exec_id: "str | None") -> Process:
        """Return the init, or the exec of that id. Raises NotFound."""
        if exec_id is None:
            return self.init
        process = self.execs.get(exec_id)
        if process is None:
            raise NotFound(f"container {self.id} has no exec {exec_id}")
        return process

    def _before_init_report(self) -> None:
        """Let the init's exit be the container's last."""
        if not self._own_pids:
            cgroups.send_signal(self._group, cgroups.SIGKILL)  # the kernel does it where the init had the namespace
        deadline = time.monotonic() + EXEC_EXIT_LIMIT
        for process in list(self.execs.values()):
            if process.pid:
                process.reported.wait(max(0.0, deadline - time.monotonic()))
        self._look_at_memory()

    def signal_all(self, number: int) -> None:
        """Send a signal to every process of the container. Raises NotFound if there is none."""
        if not cgroups.send_signal(self._group, number):
            raise NotFound("process already finished")

    def pause(self) -> None:
        self._crun.run("pause", self.id)

    def resume(self) -> None:
        self._crun.run("resume", self.id)

    def update(self, resources: "dict[str, Any]") -> None:
        """Apply an OCI `linux.resources` object. Raises RuntimeFailed, WrongState."""
        if self.init.exited:
            raise WrongState("the container's init has exited")
        path = f"{self.directory}/resources.json"
        write_json(path, resources)
        self._crun.run("update", "--resources", path, self.id)

    def pids(self) -> "list[int]":
        return cgroups.pids(self._group)

    def stats(self) -> "dict[str, str]":
        return cgroups.stats(self._group)

    def delete(self) -> None:
        """Kill what is left, run `crun delete` and remove every trace, whatever of it fails. Raises RuntimeFailed,
        OSError.
        """
        self._forget_memory()
        try:
            try:
                self._crun.run("delete", "--force", self.id)
            finally:
                cgroups.remove(self._group)
            if self.init.pid:
                self.init.reported.wait(EXEC_EXIT_LIMIT)
        finally:
            for process in (*list(self.execs.values()), self.init):
                process.close()
            files.remove_tree(self.directory)


def first_word(process: "dict[str, Any] | None") -> str:
    """Return the program of an OCI `process` object."""
    arguments = (process or {}).get("args") or [""]
    return str(arguments[0])


def write_json(path: str, value: "dict[str, Any]") -> None:
    files.write_bytes(path, encode(value)[PREFIX_SIZE:])
