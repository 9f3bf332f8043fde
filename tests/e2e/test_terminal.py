"""`ctr run -t` and `ctr task exec -t`: a terminal that echoes, resizes and passes on what is typed."""

import pytest

from tests.framework.ctr import PYMICRO, RUNC, Ctr
from tests.framework.pod import Pod
from tests.framework.terminal import Terminal
from tests.framework.waiting import until

SLEEP = ("sleep", "100000")
PROMPT = "# "


def size_becomes(terminal: Terminal, rows: int, columns: int) -> bool:
    """Ask the program on the terminal for its size."""
    terminal.send("stty size; echo done$((1+1))\n")
    return f"\n{rows} {columns}\r" in terminal.expect("done2")


@pytest.mark.every_containerd
def test_a_terminal_has_our_size_and_follows_it(pod: Pod) -> None:
    terminal = pod.terminal("sh", rows=33, columns=101)
    terminal.expect(PROMPT)
    until(lambda: size_becomes(terminal, 33, 101))

    terminal.resize(20, 60)

    until(lambda: size_becomes(terminal, 20, 60))
    terminal.send("exit 4\n")
    assert terminal.wait() == 4


def test_a_program_hears_of_a_new_size(pod: Pod) -> None:
    terminal = pod.terminal("sh", "-c", "trap 'echo changed; exit 0' WINCH; echo ready; while true; do sleep 0.1; done")
    terminal.expect("ready")

    terminal.resize(50, 50)

    terminal.expect("changed")
    assert terminal.wait() == 0


def test_what_runs_on_a_terminal_knows_it(pod: Pod) -> None:
    terminal = pod.terminal("sh", "-c", "for fd in 0 1 2; do test -t $fd && echo yes; done; test -c /dev/console; tty")

    assert terminal.wait() == 0
    assert terminal.output.split() == [b"yes", b"yes", b"yes", b"/dev/pts/0"]


@pytest.mark.parametrize("runtime", [PYMICRO, RUNC])
def test_a_terminal_that_nobody_has_open_for_a_while_goes_on(pod: Pod, runtime: str) -> None:
    let_go = "echo before; exec </dev/null >/dev/null 2>&1; sleep 0.5; echo after >/dev/console; sleep 0.5; exit 3"
    terminal = pod.terminal("sh", "-c", let_go, runtime=runtime)

    assert terminal.wait() == 3
    assert terminal.output.split() == [b"before", b"after"]


def test_a_terminal_is_set_up_as_runc_sets_it_up(pod: Pod) -> None:
    command = ("sh", "-c", "stty -g; ls -l /dev/console | cut -c 1; id; echo $TERM")
    ours, theirs = pod.terminal(*command), pod.terminal(*command, runtime=RUNC)

    assert (ours.wait(), theirs.wait()) == (0, 0)
    assert ours.output == theirs.output


def test_what_is_typed_is_echoed_once(pod: Pod) -> None:
    terminal = pod.terminal("sh", "-c", "echo ready; exec cat")
    terminal.expect("ready")
    terminal.send("typed\n")
    terminal.expect("typed")
    terminal.expect("typed")

    terminal.send("\x04")  # Ctrl-D at the start of a line: the input ends

    assert terminal.wait() == 0
    assert terminal.output.strip() == b""


def test_ctrl_c_interrupts_the_foreground_program(pod: Pod) -> None:
    terminal = pod.terminal("sh")
    terminal.expect(PROMPT)
    terminal.send("sh -c 'echo sleep${x}s; exec sleep 100000'\n")
    terminal.expect("sleeps")

    terminal.send("\x03")

    terminal.expect(PROMPT)
    terminal.send("echo code$?\n")
    terminal.expect("code130")
    terminal.send("exit\n")
    assert terminal.wait() == 0


def test_a_terminal_shows_everything_that_was_printed_just_before_the_end(pod: Pod) -> None:
    terminal = pod.terminal("sh", "-c", "seq 1 20000")

    assert terminal.wait() == 0
    assert terminal.output.decode().split() == [str(number) for number in range(1, 20001)]


@pytest.mark.every_containerd
def test_exec_gives_a_terminal_of_its_own(pod: Pod) -> None:
    container = pod.start(*SLEEP)
    terminal = pod.on_terminal("tasks", "exec", "--tty", "--exec-id", "shell", container.id, "sh", rows=30, columns=90)
    terminal.expect(PROMPT)
    until(lambda: size_becomes(terminal, 30, 90))

    terminal.resize(40, 70)

    until(lambda: size_becomes(terminal, 40, 70))
    terminal.send("exit 5\n")
    assert terminal.wait() == 5


def test_two_terminals_of_a_container_do_not_meet(pod: Pod) -> None:
    container = pod.start(*SLEEP)
    terminals = [
        pod.on_terminal("tasks", "exec", "--tty", "--exec-id", name, container.id, "sh") for name in ("one", "two")
    ]
    for number, terminal in enumerate(terminals):
        terminal.expect(PROMPT)
        terminal.send(f"me={number}; tty\n")
        terminal.expect("/dev/pts/")
    for number, terminal in enumerate(terminals):
        terminal.send("echo I am $me\n")
        terminal.expect(f"I am {number}")
        terminal.send("exit\n")
        assert terminal.wait() == 0


def test_ids_may_be_as_long_as_containerd_takes_them(pod: Pod) -> None:
    """The CRI's, Docker's and nerdctl's have 64 digits and more: no name that is made of them may be too long."""
    container_id = pod.new_id().ljust(76, "c")
    pod.ids.append(container_id)
    first = pod.on_terminal(*pod.run_arguments(["sh"], ["--tty"], None, container_id))
    first.expect(PROMPT)

    second = pod.on_terminal("tasks", "exec", "--tty", "--exec-id", "e" * 76, container_id, "sh")
    second.expect(PROMPT)

    for terminal, code in ((second, 3), (first, 4)):
        terminal.send(f"exit {code}\n")
        assert terminal.wait() == code


@pytest.mark.every_containerd
def test_a_detached_terminal_can_be_attached_to(pod: Pod) -> None:
    container_id = pod.new_id()
    starter = pod.on_terminal(*pod.run_arguments(["sh"], ["--detach", "--tty"], None, container_id))
    assert starter.wait() == 0

    terminal = pod.on_terminal("tasks", "attach", container_id)
    terminal.send("echo $((40 + 2)); exit 8\n")

    terminal.expect("42")
    assert terminal.wait() == 8


def test_a_client_that_hangs_up_does_not_end_the_container(ctr: Ctr) -> None:
    container_id = ctr.new_id()
    terminal = ctr.terminal("sh", container_id=container_id)
    terminal.expect(PROMPT)

    terminal.process.kill()
    terminal.close()

    assert ctr.tasks()[container_id] == "RUNNING"
    done = ctr("tasks", "exec", "--exec-id", "later", container_id, "echo", "still there")
    assert done.stdout == "still there\n"
