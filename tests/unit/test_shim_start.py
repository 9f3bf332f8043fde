"""`start` and `delete` as containerd runs them: sockets, answers, and what they may import."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import given, settings
from hypothesis import strategies as st
from pymicro.protos import bootstrap_pb2, runtimeoptions_pb2, task_pb2
from pymicro.shim import answer, bootstrap, grouping, protocol, sockets, start, state
from pymicro.shim.arguments import Arguments

HEAVY = {"asyncio", "ctypes", "dataclasses", "google", "grpc", "logging", "msgspec", "pathlib", "psutil", "pyroute2"}
HEAVY |= {"qemu", "subprocess", "tempfile", "typing"}

PROGRAM_FILE = Path(__file__).resolve().parents[2] / "shim/bin/containerd-shim-pymicro-v1"

PROGRAM = """
import sys
from pymicro.shim import state
from pymicro.shim.__main__ import main
directory, run = sys.argv.pop(1), sys.argv.pop(1)
state.directory = lambda address, namespace, sandbox: f"{run}/{sandbox}"
if sys.argv[-1] == "start":
    from pymicro.shim import sockets, start
    sockets.DIRECTORY = directory
    start._become_daemon = lambda *arguments: (open("daemon", "w").close(), start.os._exit(0))
    fork, left = start.os.fork, [int(start.os.environ["FORKS"])]
    def limited():
        left[0] -= 1
        if left[0] < 0:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()
    start.os.fork = limited
status = main()
with open("modules", "w") as file:
    file.write(" ".join(sys.modules))
sys.exit(status)
"""


class Host:
    """A bundle, a socket directory and a run directory of our own, in which `start` and `delete` are run."""

    def __init__(self, directory: Path, socket_directory: Path) -> None:
        self.bundle, self.run, self.sockets = directory / "bundle", directory / "run", socket_directory
        self.bundle.mkdir()
        self.annotations({})

    def annotations(self, annotations: dict[str, str]) -> None:
        (self.bundle / "config.json").write_text(json.dumps({"annotations": annotations}))

    def begin(
        self, action: str, container_id: str = "c1", *, containerd: str = "/x", settings: str = "", forks: int = 99
    ) -> subprocess.Popen[bytes]:
        """`forks`: how often `start` may fork."""
        words = ["-namespace", "ns", "-address", "/run/containerd.sock", "-publish-binary", containerd]
        words += ["-id", container_id]
        (self.bundle / "settings").write_text(settings)
        environment = {"PYTHONPATH": ":".join(sys.path), "PYMICRO_CONFIG": str(self.bundle / "settings")}
        return subprocess.Popen(
            [sys.executable, "-S", "-c", PROGRAM, self.sockets, self.run, *words, "-bundle", self.bundle, action],
            cwd=self.bundle,
            env={**environment, "FORKS": str(forks)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def execute(
        self, action: str, container_id: str = "c1", *, stdin: bytes = b"", **how: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run to the end, which is when nobody holds the outputs any more. `how` as for begin()."""
        process = self.begin(action, container_id, **how)
        out, err = process.communicate(stdin, timeout=20)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def socket_path(self, sandbox_id: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sockets, "DIRECTORY", str(self.sockets))
            return sockets.path("/run/containerd.sock", "ns", sandbox_id)

    @property
    def imports(self) -> set[str]:
        return {name.partition(".")[0] for name in (self.bundle / "modules").read_text().split()}

    @property
    def heavy_imports(self) -> set[str]:
        return HEAVY & self.imports


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with tempfile.TemporaryDirectory() as directory:  # a path that fits into a socket's address
        yield Host(tmp_path, Path(directory))


@pytest.fixture
def listening(host: Host) -> Iterator[str]:
    """A shim that runs: its socket's path, for the sandbox `pod`."""
    path = host.socket_path("pod")
    listener = sockets.bind(path)
    assert listener
    yield path
    listener.close()


def test_start_answers_with_the_address_alone(host: Host) -> None:
    result = host.execute("start")
    address = f"unix://{host.socket_path('c1')}"
    assert (result.returncode, result.stdout, result.stderr) == (0, address.encode(), b"")
    assert (host.bundle / "address").read_text() == address
    assert stat.S_ISSOCK(os.stat(host.socket_path("c1")).st_mode)
    assert stat.S_IMODE((host.run / "c1").stat().st_mode) == 0o700
    assert (host.bundle / "daemon").exists()


def test_start_imports_little(host: Host) -> None:
    assert host.execute("start").returncode == 0
    assert host.heavy_imports == set()


def params(container_id: str, **changes: Any) -> bytes:  # of the fields' types
    """What containerd 2.3 writes to `start`'s stdin."""
    return bootstrap_pb2.BootstrapParams(instance_id=container_id, namespace="ns", **changes).SerializeToString()


def test_containerd_2_3_gets_a_bootstrap_result(host: Host) -> None:
    result = host.execute("start", stdin=params("c1", containerd_version="2.3.1"))
    assert (result.returncode, result.stderr) == (0, b"")
    said = bootstrap_pb2.BootstrapResult.FromString(result.stdout)
    assert (said.version, said.address, said.protocol) == (3, f"unix://{host.socket_path('c1')}", "ttrpc")
    assert (host.bundle / "address").read_text() == said.address, "who restarts as an older containerd reads it"
    assert host.heavy_imports == set()


def test_options_alone_are_answered_with_the_address_alone(host: Host) -> None:
    options = runtimeoptions_pb2.Options(config_path=str(host.bundle / "settings")).SerializeToString()
    stdin = AnyMessage(type_url="runtimeoptions.v1.Options", value=options).SerializeToString()
    result = host.execute("start", stdin=stdin)
    assert (result.stdout, result.stderr) == (f"unix://{host.socket_path('c1')}".encode(), b"")
    assert host.heavy_imports == set()


def test_stdin_that_makes_no_sense_starts_nothing(host: Host) -> None:
    result = host.execute("start", stdin=b"\x0a\xff")
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"start's stdin (2 bytes) is neither BootstrapParams nor an Any of runtime options" in result.stderr
    assert not os.path.exists(host.socket_path("c1"))


def test_socket_directory_that_containerd_names(host: Host) -> None:
    directory = f"{host.sockets}/own"
    result = host.execute("start", stdin=params("c1", socket_dir=directory))
    said = bootstrap_pb2.BootstrapResult.FromString(result.stdout)
    assert said.address == f"unix://{directory}/{os.path.basename(host.socket_path('c1'))}"
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert state.read(str(host.run / "c1"))["socket"] == said.address.removeprefix("unix://"), "`delete` looks there"


@pytest.mark.parametrize(("directory", "why"), [("/" + 42 * "s", b"too long"), ("s", b"no absolute path")])
def test_socket_directory_that_cannot_be(host: Host, directory: str, why: bytes) -> None:
    result = host.execute("start", stdin=params("c1", socket_dir=directory))
    assert result.returncode == 1
    assert why in result.stderr
    assert not host.run.exists()


def test_what_fails_before_there_is_a_daemon_leaves_nothing(host: Host) -> None:
    (host.bundle / "address.new").mkdir()
    result = host.execute("start")
    assert result.returncode == 1
    assert b"address.new" in result.stderr
    assert not os.path.exists(host.socket_path("c1"))
    assert not (host.run / "c1").exists()


@pytest.mark.parametrize("forks", [0, 1])
def test_want_of_processes_leaves_nothing_and_one_answer(host: Host, forks: int) -> None:
    """The first child forks the daemon after `start` has answered: it has nothing to add."""
    os.mkfifo(host.bundle / "log")
    log = os.open(host.bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        result = host.execute("start", forks=forks)
        said = os.read(log, 4096)
    finally:
        os.close(log)
    error = b"[Errno 11] Resource temporarily unavailable\n"
    address = f"unix://{host.socket_path('c1')}".encode()
    assert (result.stdout, result.stderr) == ((address, b"") if forks else (b"", b"pymicro: " + error))
    assert said == (b"pymicro: the shim's daemon cannot be started: " + error if forks else b"")
    assert not os.path.exists(host.socket_path("c1"))
    assert not (host.run / "c1").exists()


def test_a_run_directory_that_cannot_be_made_leaves_no_socket(host: Host) -> None:
    host.run.write_text("in its way")
    result = host.execute("start")
    assert (result.returncode, result.stdout) == (1, b"")
    assert not os.path.exists(host.socket_path("c1"))


def test_start_that_is_killed_while_it_asks_for_containerds_version_leaves_nothing(host: Host, tmp_path: Path) -> None:
    """It asks before it binds the socket: it may wait two seconds for the answer."""
    asked = tmp_path / "asked"
    process = host.begin("start", settings=GRPC, containerd=containerd(tmp_path, f": > {asked}; exec sleep 3"))
    assert process.stdin
    process.stdin.close()
    deadline = time.monotonic() + 10
    while not asked.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.stdin = None
    process.communicate(timeout=10)
    assert not os.path.exists(host.socket_path("c1"))
    assert not host.run.exists()


def test_start_over_a_leftover_sandbox_keeps_the_new_socket(host: Host) -> None:
    """A shim that was killed leaves its record, which names the very path that the new one listens at."""
    path = host.socket_path("c1")
    run = host.run / "c1"
    run.mkdir(parents=True)
    state.write(str(run), {"socket": path, "cgroups": [], "shim_pid": 4194304, "shim_start_time": 1})
    assert host.execute("start").returncode == 0
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    assert "shim_pid" not in state.read(str(run)), "the old record is gone"


def test_second_container_of_a_pod_joins_the_first(host: Host, listening: str) -> None:
    host.annotations({grouping.CONTAINER_TYPE: "container", grouping.SANDBOX_ID: "pod"})
    result = host.execute("start", "c2")
    assert (result.stdout, result.stderr) == (f"unix://{listening}".encode(), b"")
    assert (host.bundle / "address").read_text() == f"unix://{listening}"
    assert not (host.bundle / "daemon").exists()
    assert not host.run.exists()
    assert host.heavy_imports == set()


def test_second_container_of_a_pod_with_containerd_2_3(host: Host, listening: str) -> None:
    host.annotations({grouping.CONTAINER_TYPE: "container", grouping.SANDBOX_ID: "pod"})
    said = bootstrap_pb2.BootstrapResult.FromString(host.execute("start", "c2", stdin=params("c2")).stdout)
    assert (said.version, said.address, said.protocol) == (3, f"unix://{listening}", "ttrpc")


def test_container_of_a_pod_that_does_not_run(host: Host) -> None:
    host.annotations({grouping.CONTAINER_TYPE: "container", grouping.SANDBOX_ID: "pod"})
    result = host.execute("start", "c2")
    assert result.returncode == 1
    assert result.stderr == b"pymicro: the sandbox 'pod' of container 'c2' does not run\n"
    assert not os.path.exists(host.socket_path("pod"))


@pytest.mark.parametrize("config", ["", "{", "[1]", "null", '{"annotations": "x"}'])
def test_config_that_makes_no_sense_is_one_line_on_stderr(host: Host, config: str) -> None:
    (host.bundle / "config.json").write_text(config)
    result = host.execute("start")
    assert result.returncode == 1
    assert result.stdout == b""
    assert result.stderr.startswith(b"pymicro: ")
    assert result.stderr.count(b"\n") == 1


def test_group_that_is_no_identifier(host: Host) -> None:
    """Cgroups are named after it: `..` in it would lead to the hierarchy's root."""
    host.annotations({grouping.GROUP: "../../.."})
    result = host.execute("start")
    assert result.returncode == 1
    assert b"is no identifier" in result.stderr


def test_unknown_action(host: Host) -> None:
    result = host.execute("stop")
    assert result.returncode == 1
    assert b"unknown action 'stop'" in result.stderr


def test_delete_without_a_sandbox(host: Host) -> None:
    before = time.time()
    result = host.execute("delete")
    assert (result.returncode, result.stderr) == (0, b"")
    response = task_pb2.DeleteResponse.FromString(result.stdout)
    assert response.exit_status == 137
    assert before - 1 <= response.exited_at.seconds <= time.time()
    assert host.heavy_imports | ({"socket", "shutil"} & host.imports) == set()


def test_delete_frees_a_sandbox_any_number_of_times(host: Host) -> None:
    run = host.run / "c1"
    (run / "share/c1").mkdir(parents=True)
    state.write(str(run), {"socket": "/nowhere", "cgroups": [], "containers": ["c1"]})
    for _ in range(2):
        result = host.execute("delete")
        assert (result.returncode, result.stderr) == (0, b"")
        assert not run.exists()


def owing_sandbox(host: Host, script: str) -> Path:
    """Record a sandbox whose shim was killed before it ran its container's poststop hook."""
    run = host.run / "c1"
    run.mkdir(parents=True)
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 30}
    owed = {"hooks": [hook], "state": {"id": "c1", "bundle": str(host.bundle)}, "limit": 30}
    state.write(str(run), {"cgroups": [], "containers": ["c1"], "poststop": {"c1": owed}})
    return run


def test_delete_runs_the_poststop_hooks_of_a_shim_that_was_killed(host: Host, tmp_path: Path) -> None:
    run = owing_sandbox(host, f"cat >> {tmp_path}/seen; echo >> {tmp_path}/seen; echo no bridge; exit 2")
    first, second = host.execute("delete"), host.execute("delete")
    problem = b"pymicro: c1: error running poststop hook #0 (/bin/sh): exit status 2; it said: no bridge\n"
    assert (first.returncode, first.stderr) == (0, problem)
    assert task_pb2.DeleteResponse.FromString(first.stdout).exit_status == 137
    assert (second.returncode, second.stderr) == (0, b"")
    assert (tmp_path / "seen").read_text().count("\n") == 1
    assert not run.exists()


def test_delete_answers_within_five_seconds_and_frees_all_the_same(host: Host, tmp_path: Path) -> None:
    """Containerd kills it then, and keeps the bundle. Half a second is for a busy machine."""
    run = owing_sandbox(host, f"sleep 6; : > {tmp_path}/done")
    begun = time.monotonic()
    result = host.execute("delete")
    assert time.monotonic() - begun < 4.5, "it waited for the hook"
    assert result.returncode == 0
    assert result.stderr == b"pymicro: not all is freed after 4 s; it goes on, as do poststop hooks\n"
    assert task_pb2.DeleteResponse.FromString(result.stdout).exit_status == 137
    deadline = time.monotonic() + 10
    while run.exists():
        assert time.monotonic() < deadline, "the hook was given up"
        time.sleep(0.02)
    assert (tmp_path / "done").exists()


def test_start_after_a_shim_that_was_killed_runs_its_poststop_hooks_first(host: Host, tmp_path: Path) -> None:
    """And says what is wrong with them in the log, never in its answer."""
    owing_sandbox(host, f": > {tmp_path}/done; exit 2")
    os.mkfifo(host.bundle / "log")
    log = os.open(host.bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        result = host.execute("start")
        said = os.read(log, 4096)
    finally:
        os.close(log)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == f"unix://{host.socket_path('c1')}".encode()
    assert (tmp_path / "done").exists()
    assert said.startswith(b"pymicro: c1: error running poststop hook #0 (/bin/sh): exit status 2")


def test_delete_when_the_bundle_is_gone(host: Host) -> None:
    (host.bundle / "config.json").unlink()
    assert host.execute("delete").returncode == 0


def program_alone(host: Host) -> Path:
    """Copy the program to where no Python lies beside it."""
    alone = host.run / "bin" / PROGRAM_FILE.name
    alone.parent.mkdir(parents=True)
    shutil.copy(PROGRAM_FILE, alone)
    return alone


def test_delete_after_a_good_end_is_answered_without_python(host: Host) -> None:
    answer.leave_freed(str(host.bundle))
    command: list[str | Path] = [program_alone(host), "-namespace", "ns", "-id", "c1", "-bundle", host.bundle, "delete"]
    result = subprocess.run(command, cwd=host.bundle, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert task_pb2.DeleteResponse.FromString(result.stdout).exit_status == 137


@pytest.mark.parametrize("action", ["delete", "start"])
def test_everything_else_is_pythons(host: Host, action: str) -> None:
    if action == "start":
        answer.leave_freed(str(host.bundle))
    without = {"PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [program_alone(host), action], cwd=host.bundle, capture_output=True, env=without, check=False
    )
    assert (result.returncode, result.stdout) == (127, b"")
    assert b"no python3 beside it" in result.stderr and b"make a link" in result.stderr


def test_a_copy_of_the_program_belongs_to_the_installation_on_path(host: Host) -> None:
    installed, search = host.run / "installed", host.run / "search"
    for directory in (installed, search):
        directory.mkdir(parents=True)
    shutil.copy(PROGRAM_FILE, installed)
    (search / PROGRAM_FILE.name).symlink_to(installed / PROGRAM_FILE.name)
    python = installed / "python3"
    python.write_text('#!/bin/sh\necho "$0" "$2" "$3"\n')
    python.chmod(0o755)
    copy, path = program_alone(host), {"PATH": f"{search}:/usr/bin:/bin"}
    result = subprocess.run([copy, "-v"], cwd=host.bundle, capture_output=True, text=True, env=path, check=True)
    assert result.stdout.split() == [str(python), str(copy), "-v"]


def test_answer_for_a_bundle_that_is_gone(tmp_path: Path) -> None:
    answer.leave_freed(str(tmp_path / "gone"))


def test_start_forgets_the_end_of_an_earlier_pod(host: Host) -> None:
    answer.leave_freed(str(host.bundle))
    assert host.execute("start").returncode == 0
    assert not (host.bundle / answer.FREED).exists()


def running_sandbox(host: Host, containers: list[str]) -> tuple[Path, subprocess.Popen[bytes]]:
    """Record a sandbox whose shim (a stand-in) runs."""
    shim = subprocess.Popen(["sleep", "60"])
    run = host.run / "pod"
    run.mkdir(parents=True)
    state.write(
        str(run),
        {"shim_pid": shim.pid, "shim_start_time": state.start_time(shim.pid), "cgroups": [], "containers": containers},
    )
    return run, shim


@pytest.mark.parametrize(
    ("container", "annotations"),
    [
        ("c2", {grouping.CONTAINER_TYPE: "container", grouping.SANDBOX_ID: "pod"}),
        ("c2", {grouping.GROUP: "pod"}),
        ("pod", {}),
    ],
    ids=["a container of a pod", "a member of a group", "the container that the sandbox is named after"],
)
def test_delete_leaves_a_vm_that_others_use(host: Host, container: str, annotations: dict[str, str]) -> None:
    run, shim = running_sandbox(host, ["pod", "c1"])
    host.annotations(annotations)
    try:
        assert host.execute("delete", container).returncode == 0
        assert shim.poll() is None
        assert run.exists()
    finally:
        shim.kill()
        shim.wait()


def test_delete_ends_a_shim_that_hangs(host: Host) -> None:
    run, shim = running_sandbox(host, ["pod"])
    try:
        assert host.execute("delete", "pod").returncode == 0
        assert shim.wait(5) == -9
        assert not run.exists()
    finally:
        shim.kill()
        shim.wait()


# --- gRPC, where it is asked for

GRPC = '[shim]\nprotocol = "grpc"\n'


def containerd(directory: Path, says: str) -> str:
    """Make a program that says what containerd says of itself; return its path."""
    program = directory / "containerd"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    return str(program)


def of_version(directory: Path, version: str) -> str:
    return containerd(directory, f'[ "$*" = -v ] && echo containerd github.com/containerd/containerd {version} abcdef')


@pytest.mark.parametrize("version", ["1.7.24~ds1", "v1.7.29"])
def test_containerd_1_7_gets_grpc_and_a_bare_path(host: Host, tmp_path: Path, version: str) -> None:
    result = host.execute("start", settings=GRPC, containerd=of_version(tmp_path, version))
    assert (result.returncode, result.stderr) == (0, b"")
    expected = {"version": 2, "address": host.socket_path("c1"), "protocol": "grpc"}
    assert json.loads(result.stdout) == expected
    assert json.loads((host.bundle / "address").read_text()) == expected, "what it reads when it restarts"
    assert state.read(str(host.run / "c1"))["protocol"] == "grpc"


@pytest.mark.parametrize("version", ["1.6.20", "v2.1.9", "2.3.1", "10.7"])
def test_other_containerds_get_ttrpc(host: Host, tmp_path: Path, version: str) -> None:
    result = host.execute("start", settings=GRPC, containerd=of_version(tmp_path, version))
    assert (result.stdout, result.stderr) == (f"unix://{host.socket_path('c1')}".encode(), b"")
    assert state.read(str(host.run / "c1"))["protocol"] == "ttrpc"


@pytest.mark.parametrize("says", ["exit 1", "echo", "echo hello world", "printf '\\377 \\377 \\377'", "exec sleep 60"])
def test_containerd_that_does_not_tell_its_version_gets_ttrpc(host: Host, tmp_path: Path, says: str) -> None:
    result = host.execute("start", settings=GRPC, containerd=containerd(tmp_path, says))
    assert (result.stdout, result.stderr) == (f"unix://{host.socket_path('c1')}".encode(), b"")


def test_containerd_2_3_gets_ttrpc_without_being_asked_for_its_version(host: Host, tmp_path: Path) -> None:
    program = containerd(tmp_path, f": > {tmp_path}/asked")
    result = host.execute("start", settings=GRPC, containerd=program, stdin=params("c1", containerd_version="2.3.1"))
    assert bootstrap_pb2.BootstrapResult.FromString(result.stdout).protocol == "ttrpc"
    assert not (tmp_path / "asked").exists()


def test_a_container_of_a_pod_gets_what_the_pods_shim_speaks(host: Host, listening: str) -> None:
    """Whatever the settings say by now."""
    (host.run / "pod").mkdir(parents=True)
    state.write(str(host.run / "pod"), {"protocol": "grpc"})
    host.annotations({grouping.CONTAINER_TYPE: "container", grouping.SANDBOX_ID: "pod"})
    result = host.execute("start", "c2")
    assert json.loads(result.stdout) == {"version": 2, "address": listening, "protocol": "grpc"}
    assert result.stdout == (host.bundle / "address").read_bytes()


@pytest.mark.parametrize("settings", ['[shim]\nprotocol = "grcp"', "[shim", '[shim]\nprotocl = "grpc"'])
def test_settings_that_make_no_sense_are_the_daemons_to_report(host: Host, tmp_path: Path, settings: str) -> None:
    result = host.execute("start", settings=settings, containerd=of_version(tmp_path, "1.7.24"))
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == f"unix://{host.socket_path('c1')}".encode()


@pytest.mark.parametrize("settings", ['[shim]\nprotocol = "gr\\u0070c"', '[shim]\n"\\u0070rotocol" = "grpc"', GRPC])
def test_grpc_may_be_written_in_every_way_that_toml_has(settings: str, tmp_path: Path) -> None:
    (tmp_path / "settings").write_text(settings)
    said = bootstrap.parse(b"", "c1", "ns")
    said.options.config_path = str(tmp_path / "settings")
    assert protocol.choose(said, of_version(tmp_path, "1.7.24")).protocol == "grpc"


def test_grpc_in_the_runtime_options(tmp_path: Path) -> None:
    said = bootstrap.parse(b"", "c1", "ns")
    said.options.config_body = GRPC.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYMICRO_CONFIG", "/dev/null")
        assert protocol.choose(said, of_version(tmp_path, "1.7.24")).protocol == "grpc"
        choice = protocol.choose(said, of_version(tmp_path, "2.1.9"))
        assert choice.protocol == "ttrpc"
        assert "containerd 2.1.9 ends gRPC shims" in choice.warning
        assert "/x is cannot be told" in protocol.choose(said, "/x").warning


# --- the socket


def test_bound_socket_is_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "s" / "socket"
    mask = os.umask(0)
    try:
        listener = sockets.bind(str(path))
        assert os.umask(0) == 0, "the umask was not put back"
    finally:
        os.umask(mask)
    assert listener
    with listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert not os.get_inheritable(listener.fileno())


def test_leftover_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    listener = sockets.bind(path)
    assert listener
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_live_socket_is_found_and_left(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = sockets.bind(path)
    assert listener
    with listener:
        assert sockets.bind(path) is None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


def test_starts_at_the_same_time_make_one_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All find a leftover; each but the first must find the first one's socket instead, and not replace it."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    real = sockets.answers

    def slow(path: str) -> bool:
        answers = real(path)
        time.sleep(0.01)
        return answers

    monkeypatch.setattr(sockets, "answers", slow)
    results: list[socket.socket | None] = []
    threads = [threading.Thread(target=lambda: results.append(sockets.bind(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listeners = [result for result in results if result is not None]
    assert len(listeners) == 1
    listeners[0].close()


def test_socket_paths_are_short_and_differ() -> None:
    one = sockets.path("/run/containerd/containerd.sock", "ns", "x" * 200)
    assert len(one) <= 107, "the limit of sun_path"
    assert one != sockets.path("/run/containerd/containerd.sock", "ns", "y" * 200)


def test_log_is_opened_without_waiting_for_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert start._open_log() == -1
    os.mkfifo("log")
    fd = start._open_log()
    os.write(fd, b"line")
    os.close(fd)


# --- the answer of delete


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**62), st.integers(0, 2**32 - 1))
def test_delete_response_is_what_protobuf_writes(status: int, at_ns: int, pid: int) -> None:
    message = task_pb2.DeleteResponse.FromString(answer.delete_response(status, at_ns, pid))
    assert (message.exit_status, message.pid) == (status, pid)
    assert (message.exited_at.seconds, message.exited_at.nanos) == divmod(at_ns, 10**9)


@settings(deadline=None)
@given(st.integers(1, 2**32 - 1), st.integers(10**9, 2**62).filter(lambda ns: ns % 10**9), st.integers(0, 2**32 - 1))
def test_delete_response_byte_for_byte(status: int, at_ns: int, pid: int) -> None:
    message = task_pb2.DeleteResponse(exit_status=status, pid=pid)
    message.exited_at.seconds, message.exited_at.nanos = divmod(at_ns, 10**9)
    assert answer.delete_response(status, at_ns, pid) == message.SerializeToString()


def test_answer_of_a_bundle_by_what_is_known(tmp_path: Path) -> None:
    def told() -> tuple[int, int]:
        response = task_pb2.DeleteResponse.FromString(answer.of(str(tmp_path)))
        return response.pid, response.exit_status

    assert told() == (0, 137)
    (tmp_path / answer.PID).write_text("nonsense")
    assert told() == (0, 137)
    answer.leave_pid(str(tmp_path), 5)
    assert told() == (5, 137)
    answer.leave_exit(str(tmp_path), 3, 10**18, 5)
    assert told() == (5, 3)
    answer.leave_freed(str(tmp_path))
    assert (tmp_path / answer.FREED).read_bytes() == answer.delete_response(3, 10**18, 5)
    answer.leave_pid(str(tmp_path), 6)
    assert told() == (6, 137)
    assert [path.name for path in tmp_path.iterdir()] == [answer.PID]


def test_delete_tells_how_the_task_had_ended(host: Host) -> None:
    answer.leave_exit(str(host.bundle), 3, 10**18, 5)
    response = task_pb2.DeleteResponse.FromString(host.execute("delete").stdout)
    assert (response.pid, response.exit_status, response.exited_at.seconds) == (5, 3, 10**9)


# --- which sandbox


@pytest.mark.parametrize(
    ("annotations", "sandbox"),
    [
        ({}, "c1"),
        ({grouping.CONTAINER_TYPE: "sandbox", grouping.SANDBOX_ID: "c1"}, "c1"),
        ({grouping.CONTAINER_TYPE: "container", grouping.SANDBOX_ID: "pod"}, "pod"),
        ({grouping.CONTAINER_TYPE: "container"}, "c1"),
        ({grouping.SANDBOX_ID: "pod"}, "c1"),
        ({grouping.GROUP: "group"}, "group"),
        ({grouping.GROUP: ""}, "c1"),
    ],
)
def test_sandbox_of_a_container(annotations: dict[str, str], sandbox: str) -> None:
    assert grouping.sandbox_of(annotations, "c1") == sandbox


def test_the_kernel_prefers_the_daemon_to_containerd_when_memory_runs_out() -> None:
    score = "/proc/self/oom_score_adj"
    program = f"from pymicro.shim import start; start._adjust_oom_score(); print(open('{score}').read())"
    daemons = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    assert int(daemons) == min(1000, int(Path(score).read_text()) + 1)


@pytest.mark.parametrize(
    ("ttrpc", "grpc", "variable", "address"),
    [
        ("/said", "/grpc", "/variable", "/said"),
        ("", "/grpc", "/variable", "/variable"),
        ("", "/grpc", "", "/grpc.ttrpc"),
        ("", "", "", "/run/containerd.sock.ttrpc"),
    ],
)
def test_where_containerd_takes_events(
    ttrpc: str, grpc: str, variable: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTRPC_ADDRESS", variable)
    said = bootstrap.Bootstrap()
    said.ttrpc_address, said.grpc_address = ttrpc, grpc
    arguments = Arguments(["-namespace", "ns", "-address", "/run/containerd.sock", "-id", "c1", "start"])
    assert start._ttrpc_address(arguments, said) == address


def test_a_shim_that_takes_no_connection_any_more_is_there_all_the_same(host: Host) -> None:
    """Whoever waits for it would hold the lock on the sockets of the whole host."""
    path = host.socket_path("c1")
    listener = sockets.bind(path)
    assert listener
    waiting = []
    try:
        for _ in range(300):
            client = socket.socket(socket.AF_UNIX)
            waiting.append(client)
            client.setblocking(False)
            try:
                client.connect(path)
            except BlockingIOError:
                break
        else:
            pytest.fail("its queue is never full")
        assert sockets.bind(path) is None
        sockets.remove_dead(path)
        assert os.path.exists(path)
    finally:
        for client in (listener, *waiting):
            client.close()
    sockets.remove_dead(path)
    assert not os.path.exists(path)
