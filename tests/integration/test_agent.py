"""The agent in a real VM, driven over the wire protocol: what the shim relies on, container by container."""

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.framework.guest import AgentError, Guest, booted_guest, oci_process, oci_spec

pytestmark = pytest.mark.e2e

SIGKILL, SIGTERM = 9, 15
EVERY_CAPABILITY = ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN"]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    # Short: a unix socket's path is limited to 107 bytes.
    with booted_guest(tmp_path_factory.mktemp("vm")) as guest:
        before = inventory(guest)
        yield guest
        left = inventory(guest)
        assert left == before, "the tests left something in the guest"


@pytest.fixture
def name(request: pytest.FixtureRequest, guest: Guest) -> Iterator[str]:
    """Return a container id of the test's own; what is left under it is removed."""
    name = re.sub(r"[^a-z0-9_.-]+", "-", str(request.node.name).removeprefix("test_"))[:60].strip("-")
    yield name
    if (guest.share / name).exists():
        try:
            guest.remove(name)
        except AgentError as error:
            assert error.kind == "not_found"  # the test has deleted it


def inventory(guest: Guest) -> str:
    """Return the guest's processes, the agent's descriptors, the cgroups and crun's state, seen from inside."""
    script = (
        "ps -o args | grep -v -e '\\[' -e '^sh ' -e '^ps ' -e '^grep ';"
        "ls /proc/1/fd | wc -l; grep Threads /proc/1/status; ls /guest/crun /guest/pymicro/containers /cgroup/pymicro"
    )
    spec = oci_spec("inventory", ("sh", "-c", script), terminal=False)
    spec["linux"]["namespaces"] = [{"type": "mount"}]
    spec["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), EVERY_CAPABILITY)
    spec["mounts"] += [
        {"destination": "/guest", "type": "bind", "source": "/run", "options": ["bind", "ro"]},
        {"destination": "/cgroup", "type": "bind", "source": "/sys/fs/cgroup", "options": ["bind", "ro"]},
    ]
    time.sleep(0.5)  # pumps end when the host's close of the connection has arrived
    process = guest.run("inventory", process=spec["process"], mounts=spec["mounts"], linux=spec["linux"])
    output = process.read().decode() + process.read("stderr").decode()
    assert process.wait() == 0
    guest.remove("inventory")
    return output


def error_of(function: Any, *arguments: Any, **options: Any) -> AgentError:
    with pytest.raises(AgentError) as caught:
        function(*arguments, **options)
    return caught.value


def test_exit_code_and_output(guest: Guest, name: str) -> None:
    process = guest.run(name, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert process.read() == b"out\n"
    assert process.read("stderr") == b"err\n"
    event = process.exit_event()
    assert (event["status"], event["stdout"], event["stderr"]) == (7, 4, 4)


def test_signal_is_128_plus_n(guest: Guest, name: str) -> None:
    process = guest.run(name, "sleep", "1000")
    process.signal(SIGKILL)
    assert process.wait() == 128 + SIGKILL


def test_created_container_waits_for_start(guest: Guest, name: str) -> None:
    process = guest.container(name, "echo", "ran")
    time.sleep(0.5)
    assert guest.events_of(name) == []
    guest.call("start", container=name)
    assert process.read() == b"ran\n"


def test_created_container_can_be_killed(guest: Guest, name: str) -> None:
    process = guest.container(name, "true")
    process.signal(SIGKILL)
    assert process.wait() == 137


def test_kill_after_exit_is_not_found(guest: Guest, name: str) -> None:
    process = guest.run(name, "true")
    process.wait()
    for everyone in (False, True):
        error = error_of(process.signal, SIGTERM, everyone=everyone)
        assert (error.kind, error.message) == ("not_found", "process already finished")


def test_number_that_is_no_signal_is_invalid(guest: Guest, name: str) -> None:
    process = guest.run(name, "sleep", "1000")
    assert error_of(process.signal, 99).kind == "invalid"


def test_kill_all_reaches_every_process(guest: Guest, name: str) -> None:
    process = guest.run(
        name, "sh", "-c", "trap '' TERM; (trap 'exit 0' TERM; while :; do sleep 0.1; done) & wait; wait; exit 9"
    )
    time.sleep(0.5)
    process.signal(SIGTERM, everyone=True)
    assert process.wait() == 9


def test_unknown_container_is_not_found(guest: Guest) -> None:
    for method in ("start", "pause", "resume", "pids", "stats", "delete"):
        assert error_of(guest.call, method, container="nobody").kind == "not_found"


def test_second_create_is_already_exists(guest: Guest, name: str) -> None:
    guest.container(name, "true")
    assert error_of(guest.container, name, "true").kind == "already_exists"


def test_delete_while_it_is_being_created(guest: Guest, name: str) -> None:
    """The host does that when a client gives up Create."""
    guest.add_rootfs(name)
    streams = {"stdin": None, "stdout": None, "stderr": None}
    spec = oci_spec(name, ("sleep", "1000"), terminal=False)
    create = guest.send("create", container=name, spec=spec, terminal=False, streams=streams)
    time.sleep(0.05)
    delete = guest.send("delete", container=name)
    assert guest.reply(create)["pid"] > 0
    guest.reply(delete)
    assert error_of(guest.call, "pids", container=name).kind == "not_found"


def test_bad_requests_are_invalid(guest: Guest) -> None:
    assert error_of(guest.call, "fly", container="x").kind == "invalid"
    streams = {"stdin": None, "stdout": None, "stderr": None}
    error = error_of(guest.call, "create", container="../x", spec={}, terminal=False, streams=streams)
    assert error.kind == "invalid"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("nope", 'exec: "nope": executable file not found in $PATH'),
        ("/bin/nope", 'exec: "/bin/nope": no such file or directory'),
        ("/etc/passwd", 'exec: "/etc/passwd": permission denied'),
    ],
)
def test_missing_program_in_runcs_words(guest: Guest, name: str, program: str, words: str) -> None:
    error = error_of(guest.container, name, program)
    assert error.kind == "runtime"
    assert words in error.message
    process = guest.run(name, "sleep", "1000")  # the failed create left nothing: the id is free
    error = error_of(guest.execute, name, "e", program)
    assert words in error.message
    again = guest.execute(name, "e", "true")
    assert again.wait() == 0
    process.signal(SIGKILL)


def test_user_may_reopen_its_stdio(guest: Guest, name: str) -> None:
    process = oci_process(("sh", "-c", "echo x > /dev/stdout; echo y > /proc/self/fd/2"), terminal=False)
    process["user"] = {"uid": 1000, "gid": 1000}
    run = guest.run(name, process=process)
    assert run.read() == b"x\n"
    assert run.read("stderr") == b"y\n"


def test_stdin_ends_at_its_count(guest: Guest, name: str) -> None:
    data = os.urandom(300_000)
    process = guest.run(name, "sh", "-c", "md5sum; echo end", stdin=True)
    process.write(data)
    process.close_stdin()
    assert process.read().endswith(b"-\nend\n")
    assert process.wait() == 0


def test_empty_stdin_ends(guest: Guest, name: str) -> None:
    process = guest.run(name, "cat", stdin=True)
    process.close_stdin()
    assert process.read() == b""


def test_input_comes_back_whole(guest: Guest, name: str) -> None:
    guest.run(name, "sleep", "1000")
    data = os.urandom(1_000_000)
    echo = guest.execute(name, "e", "cat", stdin=True)
    reader: list[bytes] = []
    thread = threading.Thread(target=lambda: reader.append(echo.read()))
    thread.start()
    echo.write(data)
    echo.close_stdin()
    thread.join()
    assert reader == [data]
    assert echo.wait() == 0
    guest.call("delete", container=name, exec="e")


def test_process_that_does_not_read_its_stdin(guest: Guest, name: str) -> None:
    process = guest.run(name, "sh", "-c", "exec <&-; echo closed; sleep 1", stdin=True)
    assert process.connection("stdout").exactly(7) == b"closed\n"
    process.write(b"x" * 1_000_000)  # nobody blocks: the agent drops what no one can read
    process.close_stdin()
    assert process.wait() == 0


def test_large_output_is_whole(guest: Guest, name: str) -> None:
    process = guest.run(name, "sh", "-c", "seq 1 300000")
    assert process.read() == b"".join(b"%d\n" % number for number in range(1, 300_001))


def test_unread_output_blocks_the_writer_and_not_the_exit(guest: Guest, name: str) -> None:
    process = guest.run(name, "sh", "-c", "yes")
    connection = process.connection("stdout")
    time.sleep(1)
    began = time.monotonic()
    process.signal(SIGKILL)  # also the proof that a writer blocked on us can be killed
    event = process.exit_event()
    assert time.monotonic() - began < 5
    assert event["status"] == 137
    data = bytearray()
    while len(data) < event["stdout"]:
        data += connection.socket.recv(1 << 16)
    assert set(data) == set(b"y\n")


def test_background_child_does_not_delay_the_exit(guest: Guest, name: str) -> None:
    guest.run(name, "sleep", "1000")
    began = time.monotonic()
    shell = guest.execute(name, "e", "sh", "-c", "sleep 1000 & echo started")
    event = shell.exit_event()
    assert time.monotonic() - began < 2
    assert event["stdout"] == len("started\n")
    guest.call("delete", container=name, exec="e")


def test_terminal(guest: Guest, name: str) -> None:
    script = "tty; stty size; read line; echo got $line; stty size; exit 5"
    process = oci_process(("sh", "-c", script), terminal=True)
    process["consoleSize"] = {"width": 100, "height": 40}
    run = guest.run(name, process=process, terminal=True, stdin=True)
    stdout = run.connection("stdout")
    assert stdout.exactly(20) == b"/dev/pts/0\r\n40 100\r\n"
    guest.call("resize", container=name, exec=None, width=80, height=24)
    run.write(b"word\n")
    assert stdout.exactly(23) == b"word\r\ngot word\r\n24 80\r\n"
    assert run.wait() == 5
    assert guest.event("eof", name, stream="stdout")["bytes"] == 43
    stdout.socket.close()


def test_exec_terminal_and_close(guest: Guest, name: str) -> None:
    guest.run(name, "sleep", "1000")
    exec_id = "e" * 76  # containerd takes no longer one; the CRI's have 64 digits
    shell = guest.execute(name, exec_id, "sh", "-c", "stty -echo; cat", terminal=True, stdin=True)
    time.sleep(0.3)
    shell.write(b"line\n\x04")  # the end of a terminal's input is a character, not a close
    assert shell.read().endswith(b"line\r\n")
    assert shell.wait() == 0
    guest.call("delete", container=name, exec=exec_id)


def test_large_terminal_output_is_whole(guest: Guest, name: str) -> None:
    process = guest.run(name, "seq", "1", "50000", terminal=True)
    assert process.read() == b"".join(b"%d\r\n" % number for number in range(1, 50_001))


def test_without_streams(guest: Guest, name: str) -> None:
    guest.add_rootfs(name)
    streams = {"stdin": None, "stdout": None, "stderr": None}
    spec = oci_spec(name, ("sh", "-c", "cat; echo lost; echo lost >&2"), terminal=False)
    guest.call("create", container=name, spec=spec, terminal=False, streams=streams)
    guest.call("start", container=name)
    event = guest.event("exit", name)
    assert (event["status"], event["stdout"], event["stderr"]) == (0, 0, 0)


def test_pids_name_init_and_execs(guest: Guest, name: str) -> None:
    init = guest.run(name, "sh", "-c", "sleep 1000; true")
    shell = guest.execute(name, "e", "sh", "-c", "sleep 1000; true")
    time.sleep(0.3)
    pids = guest.call("pids", container=name)
    assert len(pids["pids"]) == 4
    assert pids["init"] == init.pid
    assert pids["execs"] == {"e": shell.pid}
    assert {init.pid, shell.pid} < set(pids["pids"])
    assert error_of(guest.call, "delete", container=name, exec="e").kind == "wrong_state"


def test_init_exit_is_the_last(guest: Guest, name: str) -> None:
    init = guest.run(name, "sleep", "1000")
    for number in range(3):
        guest.execute(name, f"e{number}", "sleep", "1000")
    init.signal(SIGKILL)
    init.exit_event()
    exits = [event["exec"] for event in guest.events_of(name) if event["event"] == "exit"]
    assert sorted(exits[:-1]) == ["e0", "e1", "e2"]
    assert exits[-1] is None


def test_init_exit_is_the_last_in_a_shared_pid_namespace(guest: Guest, name: str) -> None:
    linux = oci_spec(name, (), terminal=False)["linux"]
    linux["namespaces"] = [{"type": "mount"}]
    init = guest.run(name, "sh", "-c", "sleep 1000 & read x", stdin=True, linux=linux)
    guest.execute(name, "e", "sleep", "1000")
    init.close_stdin()
    init.exit_event()
    exits = [event["exec"] for event in guest.events_of(name) if event["event"] == "exit"]
    assert exits == ["e", None]
    assert guest.call("pids", container=name)["pids"] == []


def test_exec_after_exit_is_wrong_state(guest: Guest, name: str) -> None:
    guest.run(name, "true").wait()
    assert error_of(guest.execute, name, "e", "true").kind == "wrong_state"
    assert error_of(guest.call, "start", container=name).kind == "wrong_state"
    assert error_of(guest.call, "update", container=name, resources={}).kind == "wrong_state"


def test_pause_and_resume(guest: Guest, name: str) -> None:
    process = guest.run(name, "sh", "-c", "while :; do echo tick; sleep 0.05; done")
    stdout = process.connection("stdout").socket
    guest.call("pause", container=name)
    stdout.settimeout(0.5)
    with pytest.raises(TimeoutError):
        while stdout.recv(1000):
            pass
    guest.call("resume", container=name)
    assert b"tick\n" in stdout.recv(1000)
    guest.call("pause", container=name)
    process.signal(SIGKILL)  # a paused container can be killed
    assert process.wait() == 137


def test_stats_until_delete(guest: Guest, name: str) -> None:
    process = guest.run(name, "true")
    process.wait()
    files = guest.call("stats", container=name)["files"]
    assert {"cpu.stat", "memory.current", "memory.stat", "memory.events", "pids.current"} <= files.keys()
    assert "usage_usec" in files["cpu.stat"]


def test_update_changes_limits(guest: Guest, name: str) -> None:
    guest.run(name, "sleep", "1000")
    resources = {"memory": {"limit": 64 << 20}, "pids": {"limit": 20}, "cpu": {"quota": 50000, "period": 100000}}
    guest.call("update", container=name, resources=resources)
    files = guest.call("stats", container=name)["files"]
    assert files["memory.max"] == f"{64 << 20}\n"
    assert files["pids.max"] == "20\n"
    assert files["cpu.max"] == "50000 100000\n"


def test_out_of_memory_is_told(guest: Guest, name: str) -> None:
    linux = oci_spec(name, (), terminal=False)["linux"]
    linux["resources"]["memory"] = {"limit": 20 << 20}
    process = guest.run(name, "dd", "if=/dev/zero", "of=/dev/null", "bs=60M", "count=1", linux=linux)
    assert process.exit_event()["status"] == 137
    told = [event["event"] for event in guest.events_of(name) if event["event"] != "eof"]
    assert told == ["oom", "exit"]


def test_out_of_memory_of_a_child_is_told_at_once(guest: Guest, name: str) -> None:
    linux = oci_spec(name, (), terminal=False)["linux"]
    linux["resources"]["memory"] = {"limit": 20 << 20}
    hog = "dd if=/dev/zero of=/dev/null bs=60M count=1; echo $?; sleep 1000"
    process = guest.run(name, "sh", "-c", hog, linux=linux)
    assert process.connection("stdout").socket.recv(100) == b"137\n"
    assert [event["event"] for event in guest.events_of(name)] == ["oom"]


def test_delete_of_a_running_container(guest: Guest, name: str) -> None:
    process = guest.run(name, "sh", "-c", "sleep 1000 & sleep 1000")
    guest.call("delete", container=name)
    assert process.wait() == 137  # the exit is told before the reply to the delete
    assert error_of(guest.call, "pids", container=name).kind == "not_found"


def test_ids_can_be_used_again(guest: Guest, name: str) -> None:
    for number in range(3):
        process = guest.run(name, "echo", str(number))
        assert process.read() == b"%d\n" % number
        assert process.wait() == 0
        guest.call("delete", container=name)  # not its files: the guest would see stale ones for a second


def test_short_lived_containers_side_by_side(guest: Guest, name: str) -> None:
    names = [f"{name}-{number}" for number in range(4)]
    for each in names:
        guest.add_rootfs(each)
    processes = {each: guest.container(each, "echo", each) for each in names}
    replies = [guest.send("start", container=each) for each in names]
    for number in replies:
        guest.reply(number)
    for each, process in processes.items():
        assert process.read() == f"{each}\n".encode()
        assert process.wait() == 0
    for number in [guest.send("delete", container=each) for each in names]:
        guest.reply(number)


def test_many_execs_at_once(guest: Guest, name: str) -> None:
    guest.run(name, "sleep", "1000")

    def run_one(number: int) -> tuple[bytes, bytes, int]:
        process = guest.execute(name, f"e{number}", "sh", "-c", f"cat; echo {number}; exit {number}", stdin=True)
        process.write(b"z" * 50_000)
        process.close_stdin()
        result = process.read(), process.read("stderr"), process.wait()
        guest.call("delete", container=name, exec=f"e{number}")
        return result

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(run_one, range(24)))
    assert results == [(b"z" * 50_000 + b"%d\n" % number, b"", number) for number in range(24)]


def test_exit_is_told_after_the_replies(guest: Guest, name: str) -> None:
    """A process that ends at once must not be reported before the host knows that it started."""
    guest.container(name, "true")
    number = guest.send("start", container=name)
    guest.event("exit", name)
    guest.reply(number, timeout=0.0)


def test_unique_after_setup(guest: Guest, name: str) -> None:
    linux = oci_spec(name, (), terminal=False)["linux"]
    linux["namespaces"] = [{"type": "mount"}]
    mounts = [{"destination": "/etc/machine-id", "type": "bind", "source": "/etc/machine-id", "options": ["bind"]}]
    process = guest.run(name, "sh", "-c", "hostname; date +%s; cat /etc/machine-id", linux=linux, mounts=mounts)
    hostname, seconds, machine_id = process.read().decode().split()
    assert hostname == "guest"
    assert abs(int(seconds) - time.time()) < 5
    assert machine_id == guest.machine_id


def test_devices_plugged_into_a_waiting_vm(tmp_path: Path) -> None:
    """The agent waits for its devices: the place where a snapshot is taken."""
    with Guest(tmp_path / "vm") as guest:
        guest.boot(attach=False)
        guest.wait_for_console("ready, waiting for a vsock device")
        plugged = time.monotonic()
        guest.attach()
        guest.setup()
        assert time.monotonic() - plugged < 5
        process = guest.run("c", "echo", "ok")
        assert process.read() == b"ok\n"


def test_vm_ends_when_the_host_hangs_up(tmp_path: Path) -> None:
    with Guest(tmp_path / "vm") as guest:
        guest.boot()
        guest.setup()
        guest.hang_up()
        assert guest.qemu.wait(timeout=20) == 0
