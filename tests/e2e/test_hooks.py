"""OCI hooks, as nerdctl and Docker rely on them: each runs once, and one that fails or hangs leaves nothing."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.framework.ctr import Completed, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.sandbox import SHIM, Sandbox, eventually
from tests.framework.specs import Spec, run_arguments
from tests.framework.waiting import seconds

Hook = dict[str, Any]  # JSON of the runtime-spec

NOTE = """
state=$(cat)
pid=$(echo "$state" | sed -n 's/.*"pid": *\\([0-9]*\\).*/\\1/p')
echo "{kind} $(readlink /proc/${{pid:-self}}/ns/net) $(readlink /proc/self/ns/mnt) $state" >> {file}
{then}
"""


class Hooked:
    """Runs containers from specs with hooks, each of which takes a note of itself."""

    def __init__(self, ctr: Ctr, directory: Path) -> None:
        self.ctr = ctr
        self.directory = directory

    def hook(self, kind: str, then: str = "", **more: object) -> Hook:
        """Return a hook of the host's that takes its note and then does as it is told."""
        script = NOTE.format(kind=kind, file=self.directory / "notes", then=then)
        return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], **more}

    def run(self, *command: str, hooks: dict[str, list[Hook]], detach: bool = False) -> Completed:
        """Run a container, `ctr run --rm`, unless it is to be detached."""
        return self.ctr(*self.arguments(*command, hooks=hooks, detach=detach), check=False)

    def arguments(self, *command: str, hooks: dict[str, list[Hook]], detach: bool = False) -> list[str]:
        """Return what `ctr` is to be called with."""

        def change(spec: Spec) -> None:
            spec["hooks"] = hooks

        options = ("--detach", "--null-io") if detach else ("--rm",)
        return run_arguments(self.ctr, self.directory, *command, change=change, options=options)

    @property
    def notes(self) -> list[list[str]]:
        """Kind, network namespace, mount namespace and state of each hook that has run."""
        file = self.directory / "notes"
        return [line.split(" ", 3) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def kinds(self) -> list[str]:
        return [note[0] for note in self.notes]


@pytest.fixture
def hooked(ctr: Ctr) -> Iterator[Hooked]:
    with TemporaryDirectory(prefix="hooks-") as directory:
        yield Hooked(ctr, Path(directory))


@pytest.mark.every_containerd
def test_hooks_of_the_host_run_in_order_and_once(hooked: Hooked) -> None:
    kinds = ("prestart", "createRuntime", "poststart", "poststop")

    done = hooked.run("echo", "hello", hooks={kind: [hooked.hook(kind)] for kind in kinds})

    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert sorted(hooked.kinds) == sorted(kinds)  # runc runs poststart hooks before createRuntime's end
    assert hooked.kinds[-1] == "poststop"
    for kind, network, mounts, text in hooked.notes:
        state = json.loads(text)
        assert state["id"] == hooked.ctr.ids[-1]
        assert mounts == os.readlink("/proc/self/ns/mnt"), "a hook sees the host's mounts"
        assert (network != os.readlink("/proc/self/ns/net")) == (kind != "poststop"), "the task's pid is in the pod"


def test_a_hook_that_fails_is_the_error_and_leaves_nothing(hooked: Hooked, leftovers: Leftovers) -> None:
    failing = hooked.hook("createRuntime", "echo there is no bridge >&2; exit 5")

    done = hooked.run("true", hooks={"createRuntime": [failing], "poststop": [hooked.hook("poststop")]})

    assert done.returncode != 0
    assert "createRuntime hook #0" in done.stderr
    assert "exit status 5" in done.stderr
    assert "there is no bridge" in done.stderr
    assert hooked.kinds == ["createRuntime", "poststop"]
    leftovers.check()


def test_a_hook_that_hangs_is_killed_when_its_time_is_over(hooked: Hooked, leftovers: Leftovers) -> None:
    hanging = hooked.hook("createRuntime", "sleep 6543", timeout=1)
    begun = time.monotonic()

    done = hooked.run("true", hooks={"createRuntime": [hanging], "poststop": [hooked.hook("poststop")]})

    assert done.returncode != 0
    assert time.monotonic() - begun < 20
    assert hooked.kinds == ["createRuntime", "poststop"]
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and command_of(pid) == ["sleep", "6543"]]
    leftovers.check()


@pytest.mark.usefixtures("only_our_runtime")
def test_a_client_that_goes_away_while_a_hook_runs_leaves_nothing(hooked: Hooked, leftovers: Leftovers) -> None:
    """What the hook has taken, as an address for a network, is given back when it has ended, not before."""
    slow = hooked.hook("createRuntime", f"sleep 3; echo 'survived - - -' >> {hooked.directory}/notes")
    hooks = {"createRuntime": [slow], "poststop": [hooked.hook("poststop")]}
    client = hooked.ctr.client(*hooked.arguments("true", hooks=hooks))
    eventually(lambda: hooked.kinds == ["createRuntime"], "the hook runs", 20)

    client.kill()

    eventually(lambda: "poststop" in hooked.kinds, "the poststop hook runs", 20)
    leftovers.check()
    time.sleep(seconds(3.5))
    assert hooked.kinds == ["createRuntime", "poststop"], "the hook goes on after all is freed"


def test_a_poststart_hook_that_fails_ends_the_container(hooked: Hooked, leftovers: Leftovers) -> None:
    failing = hooked.hook("poststart", "echo too late >&2; exit 6")
    begun = time.monotonic()

    done = hooked.run("sleep", "100000", hooks={"poststart": [failing], "poststop": [hooked.hook("poststop")]})

    assert done.returncode != 0
    assert time.monotonic() - begun < seconds(30)
    assert "poststart hook #0" in done.stderr
    assert "too late" in done.stderr
    assert hooked.kinds == ["poststart", "poststop"]
    leftovers.check()


@pytest.mark.usefixtures("only_our_runtime")
def test_a_poststop_hook_that_hangs_holds_up_the_end_only_so_long(hooked: Hooked, leftovers: Leftovers) -> None:
    hanging = hooked.hook("poststop", "exec sleep 6544", timeout=2)
    begun = time.monotonic()

    done = hooked.run("sh", "-c", "exit 4", hooks={"poststop": [hanging, hooked.hook("last")]})

    assert done.returncode == 4
    assert time.monotonic() - begun < seconds(30)
    assert hooked.kinds == ["poststop", "last"]
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and command_of(pid) == ["sleep", "6544"]]
    leftovers.check()


def command_of(pid: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


@pytest.mark.usefixtures("only_our_runtime")
def test_poststop_hooks_run_once_when_the_shim_is_killed(hooked: Hooked, leftovers: Leftovers) -> None:
    hooks = {"createRuntime": [hooked.hook("createRuntime")], "poststop": [hooked.hook("poststop")]}
    done = hooked.run("sleep", "100000", hooks=hooks, detach=True)
    assert done.returncode == 0, done.stderr
    container_id = hooked.ctr.ids[-1]
    assert hooked.kinds == ["createRuntime"]

    Sandbox(hooked.ctr.containerd, container_id).kill(SHIM)

    eventually(lambda: hooked.kinds[1:] == ["poststop"], "the poststop hook runs", 20)
    leftovers.check()
    hooked.ctr("containers", "rm", container_id)
    time.sleep(2)  # the guard has looked too, by now
    assert hooked.kinds == ["createRuntime", "poststop"]


@pytest.mark.usefixtures("only_our_runtime")
def test_hooks_of_the_container_run_in_the_guest(hooked: Hooked) -> None:
    script = "uname -r > /kernel"
    inside = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}

    done = hooked.run("cat", "/kernel", hooks={"startContainer": [inside]})

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() not in {"", os.uname().release}


@pytest.mark.usefixtures("only_our_runtime")
def test_a_hook_that_the_guest_does_not_have_is_named(hooked: Hooked, leftovers: Leftovers) -> None:
    done = hooked.run("true", hooks={"createContainer": [{"path": "/no/such/hook"}]})

    assert done.returncode != 0
    assert "/no/such/hook" in done.stderr
    leftovers.check()
