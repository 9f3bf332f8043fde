"""The messages between shim and agent. At run time they are plain dicts; these types are for readers and checkers.

Connections. The agent dials the host (vsock CID 2) at a port that equals its own CID, once for control and once for
every stdio stream, and never listens. The first frame on a connection is a Hello. After a "stream" hello the
connection carries raw bytes; after a "control" hello it carries frames:

- host -> guest: Request, answered in any order by one Reply with the same id;
- guest -> host: Event, at any time.

End of a stream. A vsock transport may drop unread bytes when a side closes, so nobody learns of an end by a close. The
writer says over the control connection how many bytes it has sent in all ("eof" event, "close_stdin" request);
the reader takes exactly that many, then closes the connection; only then does the writer close its side.
"""

TYPE_CHECKING = False  # a constant that type checkers take as true; importing typing costs the guest 70 ms
if TYPE_CHECKING:
    from typing import Any, Literal, NotRequired, TypedDict

    class Hello(TypedDict):
        """First frame of a connection, guest to host."""

        hello: Literal["control", "stream"]
        version: NotRequired[int]  # control: PROTOCOL_VERSION
        kernel: NotRequired[str]  # control: the guest kernel's release
        boot_ms: NotRequired[int]  # control: guest uptime when PID 1's first line ran
        agent_ms: NotRequired[int]  # control: guest uptime when the agent dialled
        token: NotRequired[str]  # stream: the one-time token handed out with create or exec

    class Request(TypedDict):
        """Host to guest. `params` has the shape that the method's TypedDict below gives."""

        id: int
        now_ns: int  # the host's clock when it sent this, nanoseconds since the epoch; the guest's follows it
        method: str
        params: "dict[str, Any]"

    class ErrorBody(TypedDict):
        """Why a request failed. `kind` is one of ERROR_KINDS, `message` is for people."""

        kind: str
        message: str

    class Reply(TypedDict):
        """Guest to host: exactly one of result and error is present."""

        id: int
        result: NotRequired["dict[str, Any]"]
        error: NotRequired[ErrorBody]

    class Setup(TypedDict):
        """`setup`: once, before anything else. Makes this VM unlike any other, mounts the share. Result: {}."""

        entropy: str  # hex, at least 32 bytes: credited to the guest's random pool before any workload runs
        hostname: str
        machine_id: str  # 32 hex digits

    class Streams(TypedDict):
        """One-time tokens of a process's streams; None is /dev/null. With a terminal stderr is None."""

        stdin: "str | None"
        stdout: "str | None"
        stderr: "str | None"

    class Create(TypedDict):
        """`create`: run `crun create`. Result: Started (pid in the guest's first pid namespace)."""

        container: str
        spec: "dict[str, Any]"  # OCI runtime spec, paths as the guest sees them
        terminal: bool
        streams: Streams

    class Exec(TypedDict):
        """`exec`: start a further process in a container. Result: Started."""

        container: str
        exec: str
        process: "dict[str, Any]"  # OCI `process` object
        terminal: bool
        streams: Streams

    class Started(TypedDict):
        pid: int

    class Target(TypedDict):
        """A container (`start`, `pause`, `resume`, `pids`, `stats`, `delete`) or one of its execs (`delete`)."""

        container: str
        exec: NotRequired["str | None"]
        kill: NotRequired[bool]  # `delete` of an exec: also one that runs, or is being started

    class Release(TypedDict):
        """`release`: the host is going to unmount the root filesystem that the guest sees at `path`. Result: {}."""

        path: str

    class Signal(TypedDict):
        """`signal`: to a process, or with `all` to every process of the container."""

        container: str
        exec: "str | None"
        signal: int
        all: bool

    class CloseStdin(TypedDict):
        """`close_stdin`: the process's stdin ends after `bytes` bytes."""

        container: str
        exec: "str | None"
        bytes: int

    class Resize(TypedDict):
        """`resize`: the window size of a terminal, in characters."""

        container: str
        exec: "str | None"
        width: int
        height: int

    class Update(TypedDict):
        """`update`: new limits, an OCI `linux.resources` object."""

        container: str
        resources: "dict[str, Any]"

    class Pids(TypedDict):
        """Result of `pids`: every process of the container in the guest; `init` and `execs` name the known ones."""

        pids: "list[int]"
        init: int
        execs: "dict[str, int]"  # exec id -> pid, running execs only

    class Stats(TypedDict):
        """Result of `stats`: the text of cgroup v2 files by name (cpu.stat, memory.current, ...), absent ones left
        out.
        """

        files: "dict[str, str]"

    class ExitEvent(TypedDict):
        """A process ended and what it wrote before has been read from its pipes.

        `stdout` and `stderr` count the bytes sent on each stream so far: the host relays that many before it reports
        the exit. A child that still holds the pipe may write more afterwards.
        """

        event: Literal["exit"]
        container: str
        exec: "str | None"
        status: int  # 0..255; 128 + n after signal n
        stdout: int
        stderr: int

    class EofEvent(TypedDict):
        """A stream ended after `bytes` bytes: relay them all, then close its connection."""

        event: Literal["eof"]
        container: str
        exec: "str | None"
        stream: Literal["stdout", "stderr"]
        bytes: int

    class OomEvent(TypedDict):
        """The kernel has killed processes of a container for memory. Comes before their exits."""

        event: Literal["oom"]
        container: str


PROTOCOL_VERSION = 3
HOST_CID = 2
READY = "ready, waiting for a vsock device"
"""The console's line that says that nothing more happens in the guest until the host attaches the pod's devices."""
SHARE_TAG = "share"
GUEST_SHARE = "/run/pymicro/share"
"""Where the guest mounts the virtio-fs share; a container's root filesystem is a directory below, as its spec says."""

NOT_FOUND = "not_found"  # no such container or exec
ALREADY_EXISTS = "already_exists"
INVALID = "invalid"  # the request makes no sense
WRONG_STATE = "wrong_state"  # e.g. a signal to a process that has exited
RUNTIME = "runtime"  # crun failed; the message is its own
INTERNAL = "internal"  # a defect of the agent
ERROR_KINDS = (NOT_FOUND, ALREADY_EXISTS, INVALID, WRONG_STATE, RUNTIME, INTERNAL)
