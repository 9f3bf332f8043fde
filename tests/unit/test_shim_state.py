"""A sandbox's record, and freeing whatever it left: any number of times, after any crash, and nothing else."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymicro.shim import cgroup, freeing, state

from tests.framework.fakes import needs_root

Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "0123456789abcdef"
    (run / "share/c1").mkdir(parents=True)
    (run / "fs.sock").write_text("")
    return run


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take note of the cgroups that would be killed and removed."""
    freed: list[str] = []

    def take_note(verb: str, groups: list[str]) -> list[str]:
        freed.extend(f"{verb} {path}" for path in groups)
        return []

    monkeypatch.setattr(cgroup, "kill", partial(take_note, "kill"))
    monkeypatch.setattr(cgroup, "remove", partial(take_note, "remove"))
    return freed


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for a shim that runs."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_names_differ_by_containerd_namespace_and_sandbox() -> None:
    keys = {state.key(*words) for words in (("a", "b", "c"), ("b", "a", "c"), ("a", "c", "b"), ("ab", "", "c"))}
    assert len(keys) == 4
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
    assert state.directory("a", "b", "c", "/run/x") == f"/run/x/{state.key('a', 'b', 'c')}"


def test_what_is_written_is_read(run: Path) -> None:
    state.write(str(run), {"sandbox": "c1", "cgroups": ["/sys/fs/cgroup/memory/x"]})
    assert state.read(str(run)) == {"version": 1, "sandbox": "c1", "cgroups": ["/sys/fs/cgroup/memory/x"]}
    assert sorted(path.name for path in run.iterdir()) == ["fs.sock", "share", "state.json"]


def test_a_write_that_fails_leaves_the_old_record(run: Path) -> None:
    state.write(str(run), {"sandbox": "c1"})
    with pytest.raises(TypeError):
        state.write(str(run), {"sandbox": object()})
    assert state.read(str(run))["sandbox"] == "c1"


def test_freeing_twice_and_freeing_nothing(run: Path, freed: list[str]) -> None:
    group = f"{cgroup.ROOT}/memory/pymicro-c1"
    state.write(str(run), {"cgroups": [group]})
    freeing.free(str(run))
    assert freed == [f"kill {group}", f"remove {group}"]
    assert not run.exists()
    freeing.free(str(run))
    assert freed == [f"kill {group}", f"remove {group}"]


def test_freeing_with_the_record_cut_off_at_every_byte(run: Path, freed: list[str]) -> None:
    state.write(str(run), {"cgroups": [f"{cgroup.ROOT}/memory/x"], "socket": "/nowhere", "shim_pid": os.getpid()})
    whole = (run / state.STATE_FILE).read_bytes()
    for size in range(len(whole)):
        run.mkdir(exist_ok=True)
        (run / state.STATE_FILE).write_bytes(whole[:size])
        freeing.free(str(run))
        assert not run.exists(), f"cut off at byte {size}"
    assert freed == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"null", b"[]", b'"x"', b"7", b"{} {}"])
def test_records_that_are_none(run: Path, content: bytes) -> None:
    (run / state.STATE_FILE).write_bytes(content)
    assert state.read(str(run)) == {}
    freeing.free(str(run))
    assert not run.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    values=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("shim_pid", "shim_start_time", "cgroups", "socket", "poststop", "loggers"), Json)
    )
)
def test_records_with_any_values(tmp_path: Path, values: dict[str, object]) -> None:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / state.STATE_FILE).write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "kill"), (os, "killpg"), (signal, "pidfd_send_signal")):
            patch.setattr(module, name, lambda *_: pytest.fail("a process was killed on the word of nonsense"))
        freeing.free(str(run))
    assert not run.exists()


@pytest.mark.parametrize(
    "path",
    [
        "/etc",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/memory/",
        "/sys/fs/cgroup/memory/..",
        "/sys/fs/cgroup/memory/x/../..",
        "/sys/fs/cgroup/memory/./x",
        "/sys/fs/cgroup/../../etc",
        "/sys/fs/cgroupish/memory/x",
        "memory/x",
        "",
        None,
        7,
    ],
)
def test_cgroups_that_cannot_be_ours_are_left_alone(
    run: Path, freed: list[str], monkeypatch: pytest.MonkeyPatch, path: object
) -> None:
    """Killing what is in a hierarchy's root would be killing the host."""
    monkeypatch.setattr(cgroup, "is_v2", lambda root=cgroup.ROOT: False)
    state.write(str(run), {"cgroups": [path]})
    freeing.free(str(run))
    assert freed == []


def test_with_cgroups_v2_the_first_level_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "is_v2", lambda root=cgroup.ROOT: True)
    assert cgroup.is_ours("/sys/fs/cgroup/pymicro-c1")
    assert not cgroup.is_ours("/sys/fs/cgroup")


def test_only_a_socket_is_removed_as_the_socket(run: Path, tmp_path: Path) -> None:
    precious, path = tmp_path / "precious", tmp_path / "s"
    precious.write_text("keep")
    link = tmp_path / "link"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        link.symlink_to(path)
        for foreign in (precious, link):
            run.mkdir(exist_ok=True)
            state.write(str(run), {"socket": str(foreign)})
            freeing.free(str(run))
            assert foreign.exists()
        run.mkdir()
        state.write(str(run), {"socket": str(path)})
        freeing.free(str(run))
        assert not path.exists()


@pytest.fixture
def stuck(run: Path, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Record cgroups of which one has processes that no signal ends; return these."""
    groups = {name: f"{cgroup.ROOT}/memory/{name}" for name in ("helpers", "c1")}
    state.write(str(run), {"cgroups": [groups["helpers"]], "container_cgroups": [groups["c1"]]})
    pids = {4194304, 4194305}
    monkeypatch.setattr(cgroup, "processes", lambda paths: set(pids) if groups["helpers"] in paths else set())
    monkeypatch.setattr(cgroup, "KILL_TIMEOUT", 0.02)
    real = os.rmdir

    def rmdir(path: str, **options: int) -> None:
        if path in groups.values():
            raise OSError(errno.EBUSY, "busy") if pids and path == groups["helpers"] else FileNotFoundError
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    return pids


def test_what_cannot_be_killed_is_said_and_freed_by_the_next(run: Path, stuck: set[int]) -> None:
    (warning,) = freeing.free(str(run))
    said = "cannot be removed; processes in it that do not end: 4194304, 4194305"
    assert warning == f"the cgroup {cgroup.ROOT}/memory/helpers {said}"
    assert state.read(str(run))["cgroups"], "the record names them"
    stuck.clear()
    assert freeing.free(str(run)) == []
    assert not run.exists()


def test_what_cannot_be_killed_does_not_keep_its_place_from_a_new_shim(run: Path, stuck: set[int]) -> None:
    assert freeing.free(str(run), keep_socket=True)
    assert not run.exists()


@needs_root
def test_a_containers_cgroup_is_removed_when_its_anchor_is_gone(run: Path) -> None:
    """The anchor dies with its shim, but a busy host may take its time."""
    groups = cgroup.directories(f"pymicro-test-{os.getpid()}")
    cgroup.create(groups)
    with subprocess.Popen(["sleep", "0.4"], preexec_fn=lambda: cgroup.join(groups)) as anchor:  # noqa: PLW1509  # no threads here
        state.write(str(run), {"container_cgroups": groups})
        warnings = freeing.free(str(run))
    left = cgroup.remove(groups)  # nothing, or now
    assert (warnings, left) == ([], [])
    assert anchor.returncode == 0, "nobody has killed it"


def test_socket_that_a_new_shim_has_bound_is_kept(run: Path, tmp_path: Path) -> None:
    """A new sandbox of the same name listens at the same path as the one that it frees."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        state.write(str(run), {"socket": str(path)})
        freeing.free(str(run), keep_socket=True)
        assert path.exists()
        assert not run.exists()


def test_start_time_tells_processes_apart(sleeper: subprocess.Popen[bytes]) -> None:
    started = state.start_time(sleeper.pid)
    assert started > 0
    assert state.start_time(sleeper.pid) == started
    sleeper.kill()
    sleeper.wait()
    assert state.start_time(sleeper.pid) == 0


def test_shim_that_runs_is_killed(run: Path, sleeper: subprocess.Popen[bytes]) -> None:
    state.write(str(run), {"shim_pid": sleeper.pid, "shim_start_time": state.start_time(sleeper.pid)})
    assert state.shim_runs(state.read(str(run)))
    freeing.free(str(run))
    assert sleeper.wait(5) == -signal.SIGKILL


def test_process_that_took_over_a_shims_pid_is_left_alone(run: Path, sleeper: subprocess.Popen[bytes]) -> None:
    state.write(str(run), {"shim_pid": sleeper.pid, "shim_start_time": state.start_time(sleeper.pid) - 1})
    assert not state.shim_runs(state.read(str(run)))
    freeing.free(str(run))
    assert sleeper.poll() is None


@pytest.mark.parametrize("pid", [0, 1, -1, "7", None, True, 1 << 40])
def test_pids_that_cannot_be_a_shims(pid: object) -> None:
    assert not state.shim_runs({"shim_pid": pid, "shim_start_time": 1})
    assert not state.shim_runs({"shim_pid": pid, "shim_start_time": None})


def test_the_shim_does_not_kill_itself(run: Path) -> None:
    state.write(str(run), {"shim_pid": os.getpid(), "shim_start_time": state.start_time(os.getpid())})
    freeing.free(str(run))
    assert not run.exists()


# --- poststop hooks that a killed shim owes


def owed(script: str, timeout: float = 5) -> dict[str, object]:
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": timeout}
    return {"hooks": [hook], "state": {"id": "c1", "bundle": "/"}, "limit": 5}


def test_hooks_that_are_owed_run_once(run: Path, freed: list[str], tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    group = f"{cgroup.ROOT}/memory/pymicro-c1"
    hooks = {name: owed(f"echo {name} $(ls {run}) >> {seen}") for name in ("c1", "c2")}
    state.write(str(run), {"cgroups": [group], "poststop": hooks})
    assert freeing.free(str(run)) == []
    assert freeing.free(str(run)) == []
    assert [line.split()[0] for line in seen.read_text().splitlines()] == ["c1", "c2"]
    assert freed == [f"kill {group}", f"remove {group}"]
    assert not run.exists()


def test_a_hook_that_fails_is_worth_a_warning_and_nothing_is_left(run: Path) -> None:
    state.write(str(run), {"poststop": {"c1": owed("echo no bridge; exit 2"), "c2": 7}})
    first, second = freeing.free(str(run))
    assert first == "c1: error running poststop hook #0 (/bin/sh): exit status 2; it said: no bridge"
    assert "makes no sense" in second
    assert not run.exists()


def test_a_hook_that_hangs_is_given_up_and_nothing_is_left(run: Path) -> None:
    state.write(str(run), {"poststop": {"c1": owed("sleep 60", 0.2)}})
    (warning,) = freeing.free(str(run))
    assert "did not end in 0.2 s (its timeout) and was killed" in warning
    assert not run.exists()


FREE = "import sys; from pymicro.shim import freeing; freeing.free(sys.argv[1])"


def one_who_frees(run: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FREE, str(run)])


def wait_until_exists(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.005)


def opened(pid: int) -> list[str]:
    """Return what a process has open."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return found


def test_two_who_free_at_the_same_time_run_a_hook_once(run: Path, tmp_path: Path) -> None:
    seen, begun = tmp_path / "seen", tmp_path / "begun"
    state.write(str(run), {"poststop": {"c1": owed(f": > {begun}; sleep 0.5; echo ran >> {seen}")}})
    both = [one_who_frees(run), one_who_frees(run)]
    assert [each.wait(30) for each in both] == [0, 0]
    assert seen.read_text() == "ran\n"
    assert not run.exists()


def test_who_waited_leaves_a_new_sandbox_of_the_same_name_alone(run: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    state.write(str(run), {"poststop": {"c1": owed(f": > {begun}; sleep 1")}})
    first = one_who_frees(run)
    wait_until_exists(begun)
    second = one_who_frees(run)
    deadline = time.monotonic() + 20
    while str(run) not in opened(second.pid):
        assert time.monotonic() < deadline, "the second does not come to the lock"
        time.sleep(0.005)
    assert first.wait(30) == 0
    run.mkdir()
    state.write(str(run), {"sandbox": "new"})
    assert second.wait(30) == 0
    assert state.read(str(run))["sandbox"] == "new"


def test_a_hook_that_was_interrupted_is_run_by_the_next(run: Path, tmp_path: Path) -> None:
    seen, begun = tmp_path / "seen", tmp_path / "begun"
    hooks = {
        "c1": owed(f"echo c1 >> {seen}"),
        "c2": owed(f"test -e {begun} || {{ : > {begun}; sleep 60; }}; echo c2 >> {seen}"),
    }
    state.write(str(run), {"poststop": hooks})
    first = one_who_frees(run)
    wait_until_exists(begun)
    first.kill()
    first.wait()
    assert freeing.free(str(run)) == []
    assert seen.read_text() == "c1\nc2\n"
    assert not run.exists()


def test_the_shim_is_gone_before_its_record_is_believed(run: Path, tmp_path: Path) -> None:
    """It may be running the very hook, and note that it has."""
    seen = tmp_path / "seen"
    script = (
        "import os, sys, time; from pymicro.shim import state; run, hook = sys.argv[1], eval(sys.argv[2])\n"
        "record = state.Record(run); record.note(poststop={'c1': hook}, n=0); print('up', flush=True)\n"
        "while True: record.note(n=record.facts['n'] + 1)"
    )
    shim = subprocess.Popen(
        [sys.executable, "-c", script, str(run), repr(owed(f"echo ran >> {seen}"))], stdout=subprocess.PIPE
    )
    assert shim.stdout
    shim.stdout.readline()
    assert freeing.free(str(run)) == []
    assert shim.wait(5) == -signal.SIGKILL
    shim.stdout.close()
    assert not run.exists()
    assert seen.read_text() == "ran\n"


# --- log binaries of a killed shim


def logger(run: Path, script: str) -> subprocess.Popen[bytes]:
    """Start a stand-in in a session of its own, and record it."""
    process = subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    recorded = state.read(str(run)).get("loggers", {})
    state.write(str(run), {"loggers": {**recorded, str(process.pid): state.start_time(process.pid)}})
    return process


def ended(process: subprocess.Popen[bytes]) -> int:
    process.communicate(timeout=5)
    return process.returncode


def test_a_log_binary_has_a_moment_to_end_by_itself(run: Path) -> None:
    process = logger(run, "echo up; sleep 0.3; exit 7")
    freeing.free(str(run))
    assert ended(process) == 7


def test_log_binaries_that_do_not_end_are_asked_to_and_then_killed(run: Path) -> None:
    asked = logger(run, "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done")
    stubborn = logger(run, "trap '' TERM; echo up; while :; do sleep 0.05; done")
    freeing.free(str(run))
    assert ended(asked) == 5
    assert ended(stubborn) == -signal.SIGKILL
    assert not run.exists()


def test_process_that_took_over_a_log_binarys_pid_is_left_alone(run: Path, sleeper: subprocess.Popen[bytes]) -> None:
    state.write(str(run), {"loggers": {str(sleeper.pid): state.start_time(sleeper.pid) - 1}})
    freeing.free(str(run))
    assert sleeper.poll() is None
