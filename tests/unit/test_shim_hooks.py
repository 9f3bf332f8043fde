"""The host's hooks: what they get, what their failure says, and that they end in bounded time and leave nothing."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pymicro.shim import containerhooks, hooks
from pymicro.shim.errors import HookFailed, InvalidRequest, StepTimeout
from pymicro.shim.hooks import Attempt, Call, Hook

from tests.framework.fakes import asynchronous, descriptors, needs_root, no_descriptor_leaks

STATE = {"ociVersion": "1.1.0", "id": "c1", "status": "creating", "pid": 7, "bundle": "/", "annotations": {"a": "b"}}

Run = Callable[..., None]


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


def plainly(called: Call, hook: Hook, state: dict[str, Any]) -> None:  # JSON
    attempt = Attempt(called, hook, state)
    try:
        attempt.wait()
    finally:
        attempt.end()
    attempt.check()


def in_the_loop(called: Call, hook: Hook, state: dict[str, Any]) -> None:  # JSON
    @asynchronous
    async def run() -> None:
        await containerhooks.run(called, hook, state)

    run()


@pytest.fixture(params=[plainly, in_the_loop])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a hook, in each of the two ways."""

    def run(hook: Hook, state: dict[str, Any] | None = None, limit: float = 5) -> None:  # JSON
        request.param(Call("createRuntime", 1, limit), hook, STATE if state is None else state)

    return run


def shell(script: str, timeout: float | None = None) -> Hook:
    return Hook("/bin/sh", ("hook", "-c", script), ("PATH=/usr/bin:/bin",), timeout)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    return gone(pid)


def test_a_hook_reads_the_state_on_its_stdin(run: Run, tmp_path: Path) -> None:
    run(shell(f"cat > {tmp_path}/seen"))
    assert json.loads((tmp_path / "seen").read_text()) == STATE


def test_a_hook_gets_its_arguments_and_environment_and_nothing_else(run: Run, tmp_path: Path) -> None:
    script = (
        f"import os, sys; open('{tmp_path}/seen', 'w').write(repr((sys.orig_argv[0], sys.argv[1:],"
        " dict(os.environ), os.getcwd(), os.getpid() == os.getsid(0))))"
    )
    interpreter = os.path.realpath(sys.executable)
    state = STATE | {"bundle": str(tmp_path)}
    run(Hook(interpreter, ("name", "-ISc", script, "x"), ("A=b=c", "LC_CTYPE=C.UTF-8", "nonsense")), state)
    expected = ("name", ["x"], {"A": "b=c", "LC_CTYPE": "C.UTF-8"}, str(tmp_path), True)
    assert (tmp_path / "seen").read_text() == repr(expected)


def test_a_hook_without_arguments_is_called_by_its_path(run: Run, tmp_path: Path) -> None:
    program = tmp_path / "hook"
    program.write_text(f'#!/bin/sh\necho "$0 $#" > {tmp_path}/seen\n')
    program.chmod(0o755)
    run(Hook(str(program)))
    assert (tmp_path / "seen").read_text() == f"{program} 0\n"


def test_a_hook_inherits_its_three_descriptors_alone(run: Run, tmp_path: Path) -> None:
    stray = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(stray, True)
    run(shell(f"ls /proc/self/fd > {tmp_path}/seen"))
    os.close(stray)
    assert (tmp_path / "seen").read_text().split() == ["0", "1", "2", "3"], "3 is the listing's own"


def test_a_hook_whose_bundle_is_gone_runs_all_the_same(run: Run, tmp_path: Path) -> None:
    run(shell(f"pwd > {tmp_path}/seen"), STATE | {"bundle": str(tmp_path / "gone")})
    assert (tmp_path / "seen").read_text() == "/\n"


def test_a_hook_that_fails_is_named_with_what_it_said(run: Run) -> None:
    with pytest.raises(HookFailed) as caught:
        run(shell("echo out; printf 'no\\033[31m such\\n  bridge' >&2; exit 3"))
    words = "error running createRuntime hook #1 (/bin/sh): exit status 3; it said: out no [31m such bridge"
    assert str(caught.value) == words


def test_a_hook_that_is_killed_is_named_with_the_signal(run: Run) -> None:
    with pytest.raises(HookFailed, match=r"hook #1 \(/bin/sh\): signal 9; it said: nothing"):
        run(shell("kill -9 $$"))


@pytest.mark.parametrize(
    ("path", "reason"), [("/no/such/hook", "No such file or directory"), ("/etc", "Permission denied")]
)
def test_a_hook_that_cannot_be_run_is_named_with_the_reason(run: Run, path: str, reason: str) -> None:
    with pytest.raises(HookFailed, match=rf"createRuntime hook #1 \({path}\): cannot run '{path}': {reason}"):
        run(Hook(path))


@pytest.mark.parametrize(("timeout", "whose"), [(0.2, "its timeout"), (None, "timeouts.hook")])
def test_a_hook_that_hangs_is_killed_with_all_its_children(
    run: Run, tmp_path: Path, timeout: float | None, whose: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(StepTimeout, match=rf"did not end in 0\.2 s \({whose}\) and was killed; it said: waiting"):
        run(shell(f"echo waiting; sleep 60 & echo $! > {tmp_path}/child; wait", timeout), limit=0.2)
    assert time.monotonic() - begun < 5
    assert eventually_gone(int((tmp_path / "child").read_text()))


def test_a_hook_that_fails_leaves_no_child(run: Run, tmp_path: Path) -> None:
    with pytest.raises(HookFailed):
        run(shell(f"sleep 60 & echo $! > {tmp_path}/child; exit 1"))
    assert eventually_gone(int((tmp_path / "child").read_text()))


def test_a_hook_that_went_well_may_leave_a_daemon_that_holds_its_output(run: Run, tmp_path: Path) -> None:
    begun = time.monotonic()
    run(shell(f"sleep 60 & echo $! > {tmp_path}/child"))
    assert time.monotonic() - begun < 5, "its end was waited for"
    child = int((tmp_path / "child").read_text())
    assert not gone(child)
    os.kill(child, signal.SIGKILL)


def test_a_hook_that_reads_nothing_and_says_much_holds_nobody_up(run: Run) -> None:
    state = STATE | {"annotations": {"large": "x" * 1_000_000}}
    with pytest.raises(HookFailed, match=r"it said: (x)+$") as caught:
        run(shell("head -c 1000000 /dev/zero | tr '\\0' x; exit 1"), state)
    assert len(str(caught.value)) < 3000


def test_a_hook_that_closes_its_output_is_waited_for(run: Run, tmp_path: Path) -> None:
    run(shell(f"exec >&- 2>&-; sleep 0.2; : > {tmp_path}/done"))
    assert (tmp_path / "done").exists()


def test_a_hook_ends_with_a_shim_that_is_killed() -> None:
    script = (
        "import os\nfrom pymicro.shim.hooks import *\n"
        "attempt = Attempt(Call('prestart', 0, 5), Hook('/bin/sleep', ('sleep', '60')), {'bundle': '/'})\n"
        "print(attempt.running.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    shim = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert shim.returncode == -signal.SIGKILL, shim.stderr
    assert eventually_gone(int(shim.stdout))


@needs_root
def test_a_hook_of_the_daemon_sees_the_mounts_that_containerd_sees() -> None:
    script = (
        "import asyncio, sys\nfrom pymicro.shim import rootfs, containerhooks\nfrom pymicro.shim.hooks import *\n"
        "rootfs.private_namespace()\n"
        "hook = Hook('/bin/sh', ('sh', '-c', 'readlink /proc/self/ns/mnt; exit 1'), ('PATH=/usr/bin:/bin',))\n"
        "asyncio.run(containerhooks.run(Call('prestart', 0, 5), hook, {'bundle': '/'}))"
    )
    shim = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert shim.stderr.strip().endswith(f"it said: {os.readlink('/proc/self/ns/mnt')}")


# --- what a spec and a record may say


def test_hooks_of_a_spec_are_taken_with_what_they_leave_out() -> None:
    parsed = hooks.parse("poststop", [{"path": "/a"}, {"path": "/b", "args": ["b", ""], "env": None, "timeout": 3}])
    assert parsed == (Hook("/a"), Hook("/b", ("b", ""), None, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"path": "relative"},
        {"path": 7},
        {"path": "/a", "timeout": 0},
        {"path": "/a", "timeout": -1},
        {"path": "/a", "args": "a"},
        {"path": "/a", "env": {"A": "b"}},
    ],
)
def test_hooks_that_make_no_sense_are_refused_by_kind_and_number(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="the spec's prestart hook #1 is wrong: "):
        hooks.parse("prestart", [{"path": "/a"}, wrong])


def test_the_state_names_no_pid_of_a_container_that_has_none() -> None:
    spec = {"ociVersion": "1.1.0", "annotations": {"k": "v"}}
    known = {"ociVersion": "1.1.0", "id": "c", "bundle": "/b", "annotations": {"k": "v"}}
    assert hooks.state(spec, "c", "/b", "stopped") == {**known, "status": "stopped"}
    assert hooks.state(spec, "c", "/b", "creating", 5) == {**known, "status": "creating", "pid": 5}


def test_owed_hooks_run_in_order_and_a_failure_keeps_none_from_running(tmp_path: Path) -> None:
    def said(text: str, then: str) -> dict[str, object]:
        return {"path": "/bin/sh", "args": ["sh", "-c", f"echo {text} >> {shlex.quote(str(tmp_path))}/seen; {then}"]}

    recorded = {"hooks": [said("one", "exit 2"), said("two", "exit 0")], "state": {**STATE, "id": "c9"}, "limit": 5}
    problems = hooks.run_owed(json.loads(json.dumps(recorded)))
    assert problems == ["c9: error running poststop hook #0 (/bin/sh): exit status 2; it said: nothing"]
    assert (tmp_path / "seen").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("recorded", [None, 7, [], {}, {"hooks": [{}], "state": {}, "limit": 1}, {"hooks": []}])
def test_a_record_that_makes_no_sense_runs_nothing_and_says_so(recorded: object) -> None:
    before = descriptors()
    (problem,) = hooks.run_owed(recorded)
    assert "makes no sense, they do not run" in problem
    assert descriptors() == before
