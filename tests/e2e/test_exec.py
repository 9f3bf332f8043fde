"""`ctr task exec`: further processes in a running container."""

import threading
from collections.abc import Iterator

import pytest

from tests.framework.ctr import Container, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.pod import Pod
from tests.framework.waiting import seconds, until

SLEEP = ("sleep", "100000")


@pytest.fixture
def container(pod: Pod) -> Iterator[Container]:
    """Yield a container that sleeps, with a name in its environment and a working directory."""
    yield pod.start(*SLEEP, options=["--env", "NAME=value", "--cwd", "/home"])


@pytest.mark.kvm
@pytest.mark.every_containerd
def test_exec_returns_the_exit_code_and_keeps_the_outputs_apart(container: Container) -> None:
    done = container.exec("sh", "-c", "echo out; echo err >&2; exit 7")

    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


@pytest.mark.kvm
@pytest.mark.every_containerd
def test_exec_reads_its_input_to_the_end(container: Container) -> None:
    assert container.exec("sh", "-c", "cat; echo ended", stdin="first\nsecond").stdout == "first\nsecondended\n"


@pytest.mark.kvm
@pytest.mark.every_containerd
def test_a_program_missing_at_exec_is_named_and_the_container_lives_on(container: Container) -> None:
    done = container.exec("nosuch")

    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert 'exec: "nosuch": executable file not found in $PATH' in line
    assert container.exec("echo", "alive").stdout == "alive\n"


def test_exec_runs_beside_the_first_process(container: Container) -> None:
    assert "1 root     sleep 100000" in container.exec("ps").stdout
    for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
        done = container.exec("sh", "-c", f"readlink /proc/1/ns/{kind}; readlink /proc/self/ns/{kind}")
        assert len(set(done.stdout.split())) == 1, done.stdout


def test_exec_sees_what_the_container_has_written(container: Container) -> None:
    assert container.exec("sh", "-c", "echo text >/tmp/file").returncode == 0

    assert container.exec("cat", "/tmp/file").stdout == "text\n"


@pytest.mark.kvm
def test_exec_has_the_containers_environment_and_a_directory_of_its_own(container: Container) -> None:
    assert container.exec("sh", "-c", "echo $NAME; pwd").stdout == "value\n/home\n"
    assert container.exec("pwd", options=["--cwd", "/tmp"]).stdout == "/tmp\n"


@pytest.mark.kvm
def test_exec_runs_as_the_user_that_is_asked_for(container: Container) -> None:
    assert container.exec("id", options=["--user", "1000"]).stdout.startswith("uid=1000(app)")


def test_exec_has_the_containers_limits_on_privilege(container: Container) -> None:
    first = container.exec("grep", "-E", "^(Cap|NoNewPrivs|Seccomp:)", "/proc/1/status").stdout

    assert container.exec("grep", "-E", "^(Cap|NoNewPrivs|Seccomp:)", "/proc/self/status").stdout == first
    assert "CapEff:\t00000000a80425fb" in first


def test_exec_is_in_the_containers_cgroup(pod: Pod) -> None:
    cgroups = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"
    container = pod.start(*SLEEP, options=["--mount", cgroups])

    done = container.exec("sh", "-c", "cat /proc/self/cgroup; grep -qx $$ /sys/fs/cgroup/cgroup.procs")

    assert (done.returncode, done.stdout) == (0, "0::/\n")


@pytest.mark.kvm
def test_term_ends_an_exec_with_143(container: Container) -> None:
    ended: list[int] = []
    waiting = threading.Thread(
        target=lambda: ended.append(container.exec("sleep", "4242", exec_id="sleeper").returncode)
    )
    waiting.start()
    until(lambda: "sleep 4242" in container.exec("ps").stdout)

    container.kill("SIGTERM", "--exec-id", "sleeper")

    waiting.join(seconds(30))
    assert ended == [143]
    assert container.status == "RUNNING"


@pytest.mark.kvm
def test_the_end_of_the_container_ends_its_execs(container: Container) -> None:
    ended: list[int] = []
    waiting = threading.Thread(target=lambda: ended.append(container.exec("sleep", "4242").returncode))
    waiting.start()
    until(lambda: "sleep 4242" in container.exec("ps").stdout)

    container.kill("SIGKILL")

    waiting.join(seconds(30))
    assert ended == [137]


def test_an_exec_id_can_be_used_once_at_a_time(container: Container) -> None:
    assert container.exec("true", exec_id="twice").returncode == 0
    assert container.exec("true", exec_id="twice").returncode == 0
    container.ctr("tasks", "exec", "--detach", "--exec-id", "held", container.id, *SLEEP)

    done = container.exec("true", exec_id="held")

    assert done.returncode != 0
    assert "held" in done.stderr
    assert "already" in done.stderr


@pytest.mark.kvm
def test_execs_run_at_the_same_time(container: Container) -> None:
    """Each one waits for the others, by way of a file that they all write to."""
    script = "echo x >>/tmp/met; while [ $(wc -l </tmp/met) -lt 5 ]; do sleep 0.05; done; exit 9"
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(container.exec("sh", "-c", script).returncode)) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds(60))

    assert codes == [9] * 5


@pytest.mark.kvm
def test_a_paused_container_takes_no_exec(container: Container) -> None:
    container.ctr("tasks", "pause", container.id)

    done = container.exec("true")

    container.ctr("tasks", "resume", container.id)
    assert done.returncode != 0
    assert "paused" in done.stderr
    assert container.exec("true").returncode == 0


def test_orphans_of_an_exec_live_on_and_end_with_the_container(ctr: Ctr, leftovers: Leftovers) -> None:
    container = ctr.start(*SLEEP)
    container.exec("sh", "-c", "sleep 4242 >/dev/null 2>&1 &")
    assert "sleep 4242" in container.exec("ps").stdout

    container.kill("SIGKILL")

    assert container.wait() == 137
    container.remove()
    leftovers.check()
