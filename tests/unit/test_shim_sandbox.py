"""The life of a pod over a scripted guest: order of events, what clients are told, what is left when things fail."""

import asyncio
from contextlib import nullcontext, suppress
from datetime import UTC
from pathlib import Path

import pytest
from msgspec.structs import replace
from pymicro.protos import task_pb2
from pymicro.shim import answer, cgroup, folder, oom, state
from pymicro.shim import container as container_module
from pymicro.shim.errors import (
    AlreadyExists,
    GuestError,
    InvalidRequest,
    NotFound,
    SandboxDied,
    ShimError,
    StepTimeout,
    Unsupported,
    WrongState,
)
from pymicro.shim.hypervisor.fake import HELLO, FakeGuest, Refused
from pymicro.shim.process import Status, seen_from_host
from pymicro.shim.requests import ExecProcess, Mount, StdioPaths
from pymicro.wire import messages

from tests.framework.fakes import Fifo, asynchronous, no_descriptor_leaks, turns, until
from tests.unit.sandbox_harness import ALONE, SETTINGS, Json, Pod, pod, settings_with


@asynchronous
async def test_life_of_a_container(tmp_path: Path) -> None:
    with no_descriptor_leaks():
        async with pod(tmp_path) as p:
            container = await p.create()
            assert container.init.status is Status.CREATED
            pid = await p.sandbox.start("c1", "")
            assert pid == container.anchor.pid
            waiting = [asyncio.create_task(container.init.wait()) for _ in range(2)]
            await turns()
            assert not any(task.done() for task in waiting)
            await p.guest.exit(7, "c1")
            assert [(await task).status for task in waiting] == [7, 7]
            assert (await container.init.wait()).status == 7, "a second Wait answers the same"
            deleted = await p.sandbox.delete_container("c1")
            assert (deleted.pid, deleted.exit and deleted.exit.status) == (pid, 7)
            assert p.log == ["create c1", "start c1", "exit c1 7", "delete c1"]
            assert p.sandbox.idle
            with pytest.raises(NotFound):
                p.sandbox.container("c1")
            assert [event.pid for event in p.events.sent] == [pid] * 4  # type: ignore[attr-defined]  # all of them have one


@asynchronous
async def test_guest_is_set_up_before_anything_else(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.create()
        assert p.guest.methods()[:2] == ["setup", "create"]
        setup = p.guest.requests[0][1]
        assert len(bytes.fromhex(setup["entropy"])) >= 32
        assert len(bytes.fromhex(setup["machine_id"])) == 16


@asynchronous
async def test_each_guest_is_told_to_be_another_machine(tmp_path: Path) -> None:
    told = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        async with pod(tmp_path / name) as p:
            await p.create()
            told.append(p.guest.requests[0][1])
    for fact in ("entropy", "machine_id"):
        assert told[0][fact] != told[1][fact]


@asynchronous
async def test_paths_and_tokens_that_the_guest_gets(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.create()
        create = p.guest.requests[1][1]
        (mount,) = p.host.mounts
        below = mount.removeprefix(f"{tmp_path}/run/share/")
        assert create["spec"]["root"]["path"] == f"{messages.GUEST_SHARE}/{below}"
        assert create["streams"] == {"stdin": None, "stdout": None, "stderr": None}
        assert str(tmp_path) not in str(create), "a path of the host"


@asynchronous
async def test_exit_that_comes_before_the_answer_to_start(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.create()

        async def exits_at_once(_params: Json) -> None:
            await p.guest.exit(3, "c1")

        p.guest.answers["start"] = exits_at_once
        await p.sandbox.start("c1", "")
        assert (await container.init.wait()).status == 3
        assert p.log == ["create c1", "start c1", "exit c1 3"]
        assert container.init.status is Status.STOPPED


@asynchronous
async def test_exit_that_comes_before_the_answer_to_exec(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()

        async def exits_at_once(params: Json) -> Json:
            reply = await p.guest.do_exec(params)
            await p.guest.exit(4, "c1", "e1")
            return reply

        p.guest.answers["exec"] = exits_at_once
        await p.sandbox.start("c1", "e1")
        assert (await container.process("e1").wait()).status == 4
        assert p.log[2:] == ["execadded e1", "execstarted e1", "exit e1 4"]


@asynchronous
async def test_exit_that_comes_before_the_answer_to_create(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:

        async def exits_at_once(params: Json) -> Json:
            reply = await p.guest.do_create(params)
            await p.guest.exit(9, "c1")
            await asyncio.sleep(0.01)
            return reply

        p.guest.answers["create"] = exits_at_once
        container = await p.create()
        await container.init.wait()
        assert p.log == ["create c1", "exit c1 9"]


@asynchronous
async def test_execs_end_before_the_init(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        for exec_id in ("e1", "e2", "e3"):
            await p.add_exec(exec_id)
        for exec_id in ("e1", "e2"):
            await p.sandbox.start("c1", exec_id)
        await p.guest.exit(5, "c1", "e1")
        await p.until_logged("exit e1 5")
        await p.guest.exit(0, "c1")
        await container.init.wait()
        assert p.log[-2:] == ["exit e2 137", "exit c1 0"]
        assert (await container.process("e3").wait()).status == 137, "who waits for an exec that cannot start any more"
        assert "exit e3 137" not in p.log, "an exec that never started has no exit"


@asynchronous
async def test_exec_keeps_its_own_status_when_the_init_overtakes_it(tmp_path: Path) -> None:
    """Its output still waits for a slow client when the init's exit comes: the status is known all the same."""
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec(stdio=StdioPaths("", fifo.path, "", terminal=False))
        await p.sandbox.start("c1", "e1")
        p.guest.process("c1", "e1").sent["stdout"] = 1 << 20  # what the client has not taken yet
        await p.guest.exit(7, "c1", "e1", ends=False)
        await p.guest.exit(0, "c1")
        assert (await container.init.wait()).status == 0
        assert p.log[-2:] == ["exit e1 7", "exit c1 0"]
        await container.process("e1").close(p.sandbox.streams, 0)
    fifo.close()


@asynchronous
async def test_an_execs_output_is_out_before_its_exit_when_the_init_overtakes_it(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path, settings=settings_with(drain=5)) as p:
        container = await p.running()
        await p.add_exec(stdio=StdioPaths("", fifo.path, "", terminal=False))
        await p.sandbox.start("c1", "e1")
        await p.guest.write(b"last words", "c1", "e1")
        await p.guest.exit(7, "c1", "e1")
        await p.guest.exit(0, "c1")
        await asyncio.sleep(0.05)
        assert not [entry for entry in p.log if entry.startswith("exit")], "its client has not read"
        assert await fifo.read(10) == b"last words"
        assert (await container.init.wait()).status == 0
        assert p.log[-2:] == ["exit e1 7", "exit c1 0"]
        await container.process("e1").close(p.sandbox.streams, 0)
    fifo.close()


@asynchronous
async def test_exec_whose_client_never_comes_does_not_hold_up_the_init(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    async with pod(tmp_path, settings=settings_with(request=0.3)) as p:
        container = await p.running()
        await p.add_exec(stdio=StdioPaths("", fifo.path, "", terminal=False))
        starting = asyncio.create_task(p.sandbox.start("c1", "e1"))
        await asyncio.sleep(0.02)
        await p.guest.exit(0, "c1")
        await asyncio.wait_for(container.init.wait(), 0.2)
        with pytest.raises(ShimError):
            await starting
        assert "execstarted e1" not in p.log


@asynchronous
async def test_execs_come_and_go_while_the_init_exits(tmp_path: Path) -> None:
    """The exit's report waits for an exec that is being started; meanwhile clients add and delete others."""
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec("e1")
        go = asyncio.Event()

        async def slow(params: Json) -> Json:
            await go.wait()
            return await p.guest.do_exec(params)

        p.guest.answers["exec"] = slow
        starting = asyncio.create_task(p.sandbox.start("c1", "e1"))
        await until(lambda: "exec" in p.guest.methods())
        await p.add_exec("e2")
        await p.guest.exit(0, "c1")
        await asyncio.sleep(0.01)
        await p.add_exec("e3")
        await container.delete_exec("e2")
        go.set()
        await starting
        await asyncio.wait_for(container.init.wait(), 1)
        assert p.log[-3:] == ["execstarted e1", "exit e1 137", "exit c1 0"]


@asynchronous
async def test_exec_that_cannot_start_releases_who_waits_and_may_be_tried_again(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()

        async def refuses(_params: Json) -> Json:
            raise Refused(messages.RUNTIME, "exec: no such program")

        p.guest.answers["exec"] = refuses
        waiting = asyncio.create_task(container.process("e1").wait())
        with pytest.raises(GuestError, match="no such program"):
            await p.sandbox.start("c1", "e1")
        await waiting
        assert container.process("e1").status is Status.CREATED
        del p.guest.answers["exec"]
        await p.sandbox.start("c1", "e1")
        waiting = asyncio.create_task(container.process("e1").wait())
        await p.guest.exit(6, "c1", "e1")
        assert (await waiting).status == 6
        assert container.process("e1").status is Status.STOPPED
        await container.delete_exec("e1")


@asynchronous
@pytest.mark.parametrize("terminal", [True, False])
async def test_the_request_decides_whether_an_exec_has_a_terminal(tmp_path: Path, terminal: bool) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        process = {"args": ["ps"], "cwd": "/", "terminal": not terminal}  # as the container's own, passed on
        container.add_exec(ExecProcess("e1", StdioPaths("", "", "", terminal=terminal), process))
        await p.sandbox.start("c1", "e1")
        name, told = p.guest.requests[-1]
        assert (name, told["terminal"], told["process"]["terminal"]) == ("exec", terminal, terminal)


@asynchronous
async def test_a_container_whose_request_and_spec_disagree_on_a_terminal_is_refused(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        with pytest.raises(
            InvalidRequest, match=r"a terminal is asked for, but process\.terminal in the spec is false"
        ):
            await p.create(stdio=StdioPaths("", "", "", terminal=True))
        assert p.sandbox.idle


@asynchronous
async def test_exec_whose_output_nobody_opens_releases_who_waits(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    settings = settings_with(request=0.05)
    async with pod(tmp_path, settings=settings) as p:
        container = await p.running()
        await p.add_exec(stdio=StdioPaths("", fifo.path, "", terminal=False))
        waiting = asyncio.create_task(container.process("e1").wait())
        with pytest.raises(StepTimeout, match="nobody opened the FIFO"):
            await p.sandbox.start("c1", "e1")
        await waiting
        assert "exec" not in p.guest.methods()


@asynchronous
async def test_death_of_the_vm_ends_every_process_with_137(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        containers = [await p.running(name) for name in ("c1", "c2")]
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        waiting = [asyncio.create_task(process.wait()) for one in containers for process in one.processes]
        await turns()
        p.vm.die(-9)
        assert [(await task).status for task in waiting] == [137, 137, 137]
        assert [entry for entry in p.log if entry.startswith("exit")] == ["exit e1 137", "exit c1 137", "exit c2 137"]
        assert not p.host.anchors, "the task's process outlives the VM"
        with pytest.raises(SandboxDied, match="fake ended with signal 9"):
            await p.create("c3")
        for name in ("c1", "c2"):
            assert (await p.sandbox.delete_container(name)).exit is not None
        assert p.log[-2:] == ["delete c1", "delete c2"]


@asynchronous
async def test_what_a_vm_wrote_before_it_died_is_out_before_the_exit(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path, settings=settings_with(drain=5)) as p:
        container = await p.running(stdio=StdioPaths("", fifo.path, "", terminal=False))
        await p.guest.write(b"panic", "c1")
        p.vm.die(-9)
        await asyncio.sleep(0.05)
        assert container.init.status is Status.RUNNING, "its client has not read"
        assert await fifo.read(5) == b"panic"
        assert (await container.init.wait()).status == 137
    fifo.close()


@asynchronous
async def test_death_of_virtiofsd_is_the_death_of_the_vm(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        p.host.helpers[0].exit.set_result(-11)
        assert (await container.init.wait()).status == 137
        with pytest.raises(SandboxDied, match="virtiofsd ended with signal 11"):
            await p.sandbox.agent()


@asynchronous
async def test_agent_that_closes_its_connection_is_the_death_of_the_vm(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        p.guest.stop()
        assert (await container.init.wait()).status == 137
        with pytest.raises(SandboxDied, match=r"agent closed its .* its VM goes on.*a fake kernel says hello"):
            await p.sandbox.agent()


@pytest.mark.parametrize(
    ("method", "reply"),
    [
        ("create", {}),
        ("create", {"pid": "4"}),
        ("exec", {"pid": 0}),
        ("pids", {"pids": ["x"], "init": 1, "execs": {}}),
        ("stats", {"files": {"cpu.stat": 1}}),
    ],
)
@asynchronous
async def test_an_answer_that_makes_no_sense_is_an_error_of_that_call(tmp_path: Path, method: str, reply: Json) -> None:
    async def nonsense(_params: Json) -> Json:
        return reply

    async with pod(tmp_path) as p:
        p.guest.answers[method] = nonsense
        with pytest.raises(GuestError, match=f"the guest's answer to '{method}' makes no sense"):
            container = await p.running()
            if method == "exec":
                await p.add_exec()
                await p.sandbox.start("c1", "e1")
            await getattr(container, method)()


@asynchronous
async def test_a_guest_that_tells_of_one_thing_again_and_again_is_heard_once(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        for _ in range(3):
            await p.guest.exit(3, "c1")
        await container.init.wait()
        assert p.log.count("exit c1 3") == 1


@pytest.mark.parametrize(
    "event", [{"event": "exit"}, {"event": "eof", "container": "c1"}, {"event": "eof", "container": ["c1"]}]
)
@asynchronous
async def test_guest_that_talks_nonsense_is_taken_down(tmp_path: Path, event: Json) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.guest._say(event)
        assert (await container.init.wait()).status == 137
        await until(lambda: p.hypervisor.running == 0)


@asynchronous
async def test_events_of_strangers_are_ignored(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        name = {"container": "c1", "exec": "nobody"}
        for event in (
            {"event": "exit", "container": "nobody", "exec": None, "status": 0, "stdout": 0, "stderr": 0},
            {"event": "eof", **name, "stream": "stdout", "bytes": 1},
            {"event": "a kind of a newer agent", "container": "c1"},
        ):
            await p.guest._say(event)
        await asyncio.sleep(0.02)
        assert container.init.status is Status.RUNNING


@asynchronous
async def test_vm_that_dies_in_the_middle_of_start(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.create()

        async def never(_params: Json) -> None:
            await asyncio.sleep(60)

        p.guest.answers["start"] = never
        starting = asyncio.create_task(p.sandbox.start("c1", ""))
        await until(lambda: "start" in p.guest.methods())
        p.vm.die(1, "last words")
        with pytest.raises(SandboxDied, match="fake ended with status 1; its last lines: last words"):
            await starting
        assert (await container.init.wait()).status == 137
        assert "start c1" not in p.log


@asynchronous
async def test_vm_that_dies_in_the_middle_of_create(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:

        async def never(_params: Json) -> None:
            await asyncio.sleep(60)

        p.guest.answers["create"] = never
        creating = asyncio.create_task(p.create())
        await until(lambda: "create" in p.guest.methods())
        p.vm.die(1)
        with pytest.raises(SandboxDied):
            await creating
        await turns()
        assert p.sandbox.idle
        assert p.log == [], "events of a task that never was"


# --- failures of Create


@pytest.mark.parametrize("step", ["cgroup.create", "mount_rootfs", "anchor.start"])
@asynchronous
async def test_failed_create_leaves_nothing(tmp_path: Path, step: str) -> None:
    with no_descriptor_leaks():
        async with pod(tmp_path) as p:
            await p.sandbox.agent()
            before = (set(p.host.cgroups), set(p.host.mounts))
            p.host.fail = step
            with pytest.raises(InvalidRequest, match="was made to fail"):
                await p.create()
            assert (p.host.cgroups, p.host.mounts, p.host.anchors) == (*before, {})
            assert p.sandbox.idle
            assert p.log == []
            p.host.fail = ""
            await p.create()  # a second try finds nothing in its way


@asynchronous
async def test_create_that_the_guest_refuses_leaves_nothing(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path) as p:

        async def refuses(_params: Json) -> None:
            raise Refused(messages.RUNTIME, "crun: executable file `nope` not found")

        p.guest.answers["create"] = refuses
        with pytest.raises(GuestError, match="`nope` not found"):
            await p.create(stdio=StdioPaths("", fifo.path, "", terminal=False))
        assert not p.host.mounts
        assert not p.host.anchors
        assert p.log == []
        assert await fifo.read_to_end() == b"", "the client's FIFO stays open"
        with pytest.raises(NotFound):
            p.sandbox.container("c1")
    fifo.close()


@asynchronous
async def test_create_that_takes_too_long_is_undone_in_the_guest_too(tmp_path: Path) -> None:
    """Its VM goes on: only Delete or Shutdown end it."""
    async with pod(tmp_path, settings=settings_with(request=0.2)) as p:

        async def slow(params: Json) -> Json:
            await asyncio.sleep(0.3)
            return await p.guest.do_create(params)

        p.guest.answers["create"] = slow
        with pytest.raises(StepTimeout):
            await p.create()
        assert p.guest.methods()[-1] == "delete"


@asynchronous
async def test_exit_during_a_create_that_fails_is_not_reported(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:

        async def exits_and_refuses(params: Json) -> None:
            await p.guest.do_create(params)
            await p.guest.exit(9, "c1")
            await asyncio.sleep(0.01)
            raise Refused(messages.RUNTIME, "it was killed")

        p.guest.answers["create"] = exits_and_refuses
        with pytest.raises(GuestError):
            await p.create()
        await asyncio.sleep(0.01)
        assert p.log == [], "an exit of a task that never was"


@asynchronous
async def test_binds_of_the_spec(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        mounts = [
            {"destination": "/data", "type": "bind", "source": "in-the-bundle", "options": ["rbind", "ro"]},
            {"destination": "/host", "type": "bind", "source": "/elsewhere", "options": ["rbind", "rw"]},
        ]
        request = p.request("c1", mounts=mounts)
        await p.sandbox.create_container(request)
        assert p.host.binds == [(f"{request.bundle}/in-the-bundle", True), ("/elsewhere", False)]


@asynchronous
async def test_root_without_mounts_is_the_specs_own(tmp_path: Path) -> None:
    """Docker's graph drivers mount the root themselves and send an empty list."""
    async with pod(tmp_path) as p:
        request = replace(p.request("c1"), rootfs=())
        await p.sandbox.create_container(request)
        assert p.host.roots == [(Mount("bind", f"{request.bundle}/rootfs", "", ("rbind",)),)]


@asynchronous
async def test_cancelled_create_leaves_nothing(tmp_path: Path) -> None:
    with no_descriptor_leaks():
        async with pod(tmp_path) as p:

            async def never(_params: Json) -> None:
                await asyncio.sleep(60)

            p.guest.answers["create"] = never
            creating = asyncio.create_task(p.create())
            await until(lambda: "create" in p.guest.methods())
            creating.cancel()
            await asyncio.wait([creating])
            assert creating.cancelled()
            assert not p.host.mounts
            assert not p.host.anchors
            assert p.sandbox.idle
            assert p.log == []


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("step", ["stdio", "guest"])
@asynchronous
async def test_delete_while_it_is_being_created(tmp_path: Path, step: str, *, alone: bool) -> None:
    """A client that gives up Create deletes at once; what it gave up must not come into being after that."""
    nobody = Fifo(tmp_path / "out")
    async with pod(tmp_path) as p:
        if not alone:
            await p.running("other")
        go = asyncio.Event()

        async def slow(params: Json) -> Json:
            await go.wait()
            return await p.guest.do_create(params)

        p.guest.answers["create"] = slow
        stdio = StdioPaths("", nobody.path if step == "stdio" else "", "", terminal=False)
        creating = asyncio.create_task(p.create("c1", stdio))
        await until(lambda: step == "stdio" or ("create" in p.guest.methods()[1 if alone else 3 :]))
        await turns()
        with pytest.raises(NotFound):
            await p.sandbox.delete_container("c1")
        go.set()
        with pytest.raises(NotFound, match="'c1' was deleted while it was created"):
            await creating
        assert not [entry for entry in p.log if entry.endswith("c1")]
        assert len(p.host.anchors) == (0 if alone else 1)
        if alone:
            await until(lambda: p.hypervisor.running == 0)
        else:
            await p.sandbox.container("other").kill("", 9, everything=False)
    nobody.close()


@asynchronous
async def test_same_id_twice(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        results = await asyncio.gather(p.create(), p.create(), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["AlreadyExists", "Container"]
        with pytest.raises(AlreadyExists):
            await p.create()


@asynchronous
async def test_bundle_without_config(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        request = p.request("c1")
        (Path(request.bundle) / "config.json").unlink()
        with pytest.raises(InvalidRequest, match=r"cannot read .*config\.json"):
            await p.sandbox.create_container(request)
        assert p.sandbox.idle


# --- failures of the boot


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        ({**HELLO, "version": 99}, "speaks protocol 99.*rebuild the image"),
        ({"hello": "stream", "token": "guessed"}, r"said no hello in 0\.2 s"),
        ({"hello": "what"}, r"said no hello in 0\.2 s"),
        ({}, r"said no hello in 0\.2 s.*a fake kernel says hello"),
    ],
)
@asynchronous
async def test_guest_that_does_not_introduce_itself(tmp_path: Path, hello: Json, error: str) -> None:
    settings = settings_with(hello=0.2)
    with no_descriptor_leaks():
        async with pod(tmp_path, FakeGuest(hello), settings) as p:
            with pytest.raises(ShimError, match=error):
                await p.create()
            await until(lambda: p.hypervisor.running == 0)
            assert p.sandbox.idle


@asynchronous
async def test_vm_that_dies_while_it_boots_says_its_last_words(tmp_path: Path) -> None:
    async with pod(tmp_path, FakeGuest({})) as p:
        await until(lambda: p.hypervisor.vms)
        p.vm.die(1, "qemu: could not load kernel")
        with pytest.raises(SandboxDied, match="could not load kernel"):
            await p.create()


@asynchronous
async def test_second_control_connection_is_refused(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.running()
        intruder = p.vm.dial()
        await intruder.write(b"".join([len(body := b'{"hello":"control","version":1}').to_bytes(4, "big"), body]))
        assert await asyncio.get_running_loop().sock_recv(intruder.socket, 1) == b""
        intruder.close()
        assert (await p.sandbox.container("c1").pids())[0].pid == p.sandbox.container("c1").anchor.pid


@asynchronous
async def test_connection_that_says_nothing_is_closed_with_the_vm(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.running()
        silent = p.vm.dial()
        await asyncio.sleep(0.01)
        await p.sandbox.stop()
        assert await asyncio.get_running_loop().sock_recv(silent.socket, 1) == b""
        silent.close()


@asynchronous
async def test_stream_with_a_wrong_token_gets_nothing(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path) as p:
        await p.running(stdio=StdioPaths("", fifo.path, "", terminal=False))
        process = p.guest.process("c1")
        right, process.tokens["stdout"] = process.tokens["stdout"], "0" * 32
        intruder = await p.guest.stream("stdout", "c1")
        assert await asyncio.get_running_loop().sock_recv(intruder.socket, 1) == b""
        intruder.close()
        process.channels.clear()
        process.tokens["stdout"] = right
        await p.guest.write(b"right", "c1")
        assert await fifo.read(5) == b"right"
        # a token serves once
        process.channels["old"] = process.channels.pop("stdout")
        again = await p.guest.stream("stdout", "c1")
        assert await asyncio.get_running_loop().sock_recv(again.socket, 1) == b""
    fifo.close()


# --- output and exit


@asynchronous
async def test_output_is_with_the_client_before_the_exit_is_reported(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path) as p:
        container = await p.running(stdio=StdioPaths("", fifo.path, "", terminal=False))
        data = b"x" * 300_000
        await p.guest.write(data, "c1")
        await p.guest.exit(0, "c1")
        await container.init.wait()
        assert container.init._stdio is not None
        assert container.init._stdio.stdout is not None
        assert container.init._stdio.stdout.relayed == len(data)
        assert await fifo.read_to_end() == data
    fifo.close()


@asynchronous
async def test_client_that_does_not_read_delays_the_exit_only_so_long(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    settings = settings_with(drain=0.1)
    async with pod(tmp_path, settings=settings) as p:
        container = await p.running(stdio=StdioPaths("", fifo.path, "", terminal=False))
        p.guest.process("c1").sent["stdout"] = 1 << 30
        await p.guest.exit(0, "c1", ends=False)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await container.init.wait()
        assert 0.05 < loop.time() - begun < 1
    fifo.close()


@asynchronous
async def test_end_of_stdin_is_told_with_its_count(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "in")
    async with pod(tmp_path) as p:
        container = await p.running(stdio=StdioPaths(fifo.path, "", "", terminal=False))
        stdin = await p.guest.stream("stdin", "c1")
        fifo.open_writer()
        await fifo.write(b"hello")
        assert await stdin.read_exactly(5) == b"hello"
        fifo.close()
        await asyncio.sleep(0.02)
        assert "close_stdin" not in p.guest.methods(), "our own writer keeps the FIFO open until CloseIO"
        container.init.close_stdin_writer()
        await until(lambda: "close_stdin" in p.guest.methods())
        assert p.guest.requests[-1][1] == {"container": "c1", "exec": None, "bytes": 5}


@asynchronous
async def test_memory_is_out_before_the_exit(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.guest.run_out_of_memory("c1")
        await p.guest.exit(137, "c1")
        await container.init.wait()
        assert p.log[-2:] == ["oom c1", "exit c1 137"]


# --- what clients may ask when


@asynchronous
async def test_kill(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.create()
        await container.kill("", 15, everything=False)
        assert (await container.init.wait()).status == 143
        with pytest.raises(NotFound, match="already finished"):
            await container.kill("", 9, everything=True)
        with pytest.raises(NotFound):
            await container.kill("nobody", 9, everything=False)


@asynchronous
async def test_kill_between_an_exit_and_its_report(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        p.guest.process("c1").exited = True
        with pytest.raises(NotFound, match="has exited"):
            await container.kill("", 9, everything=False)


@asynchronous
async def test_kill_of_an_exec(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        with pytest.raises(WrongState, match="exec 'e1' of 'c1' is created"):
            await container.kill("e1", 9, everything=False)
        await p.sandbox.start("c1", "e1")
        await container.kill("e1", 9, everything=False)
        assert (await container.process("e1").wait()).status == 137
        assert container.init.status is Status.RUNNING
        with pytest.raises(NotFound):
            await container.kill("e1", 9, everything=False)


@asynchronous
async def test_start_needs_a_created_process(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.create()
        await p.add_exec()
        await p.sandbox.start("c1", "")
        with pytest.raises(WrongState, match="task 'c1' is running, not created"):
            await p.sandbox.start("c1", "")
        with pytest.raises(NotFound):
            await p.sandbox.start("c1", "nobody")
        with pytest.raises(NotFound):
            await p.sandbox.start("c9", "")
        await p.guest.exit(0, "c1")
        await container.init.wait()
        with pytest.raises(WrongState):
            await p.sandbox.start("c1", "e1")
        with pytest.raises(WrongState):
            await p.add_exec("e2")


@asynchronous
async def test_two_starts_at_the_same_time(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.create()
        results = await asyncio.gather(*(p.sandbox.start("c1", "") for _ in range(3)), return_exceptions=True)
        assert sum(isinstance(result, WrongState) for result in results) == 2
        assert p.guest.methods().count("start") == 1
        assert p.log.count("start c1") == 1


@asynchronous
async def test_exec_ids_are_unique(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        with pytest.raises(AlreadyExists):
            await p.add_exec()
        await container.delete_exec("e1")
        await p.add_exec()


@asynchronous
async def test_delete_waits_only_so_long_for_an_output_that_a_child_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_module, "IO_LIMIT", 0.1)
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path) as p:
        container = await p.running(stdio=StdioPaths("", fifo.path, "", terminal=False))
        await p.guest.write(b"hello", "c1")
        assert await fifo.read(5) == b"hello"
        await p.guest.exit(0, "c1", ends=False)
        await container.init.wait()
        deleting = asyncio.create_task(p.sandbox.delete_container("c1"))
        await asyncio.sleep(0.05)
        assert not deleting.done(), "the child may still write"
        await asyncio.wait_for(deleting, 1)
        assert await fifo.read_to_end() == b""
    fifo.close()


@asynchronous
async def test_delete_while_it_runs(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        with pytest.raises(WrongState):
            await p.sandbox.delete_container("c1")
        with pytest.raises(WrongState):
            await container.delete_exec("e1")
        assert container.init.status is Status.RUNNING


@asynchronous
async def test_delete_while_it_is_being_started(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.create()
        go = asyncio.Event()

        async def slow(_params: Json) -> None:
            await go.wait()

        p.guest.answers["start"] = slow
        starting = asyncio.create_task(p.sandbox.start("c1", ""))
        await until(lambda: "start" in p.guest.methods())
        with pytest.raises(WrongState, match="being started"):
            await p.sandbox.delete_container("c1")
        go.set()
        await starting
        assert p.log == ["create c1", "start c1"]


@asynchronous
async def test_nothing_starts_in_a_container_that_is_being_deleted(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.create("other")
        await p.create()
        await p.add_exec()
        go = asyncio.Event()

        async def slow(params: Json) -> None:
            await go.wait()
            await p.guest.do_delete(params)

        p.guest.answers["delete"] = slow
        deleting = asyncio.create_task(p.sandbox.delete_container("c1"))
        await until(lambda: "delete" in p.guest.methods())
        for attempt in (p.sandbox.start("c1", ""), p.sandbox.start("c1", "e1"), p.add_exec("e2")):
            with pytest.raises((WrongState, NotFound)):
                await attempt
        go.set()
        assert (await deleting).exit is None
        assert p.log[-1] == "delete c1"
        assert "start c1" not in p.log


@asynchronous
async def test_who_waits_for_what_is_given_up_is_released(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.create("other")

        async def never(_params: Json) -> None:
            await asyncio.sleep(3600)

        p.guest.answers["create"] = never
        creating = asyncio.create_task(p.create())
        await until(lambda: "c1" in p.sandbox.containers)
        waiting = asyncio.create_task(p.sandbox.container("c1").init.wait())
        with pytest.raises(NotFound):
            await p.sandbox.delete_container("c1")
        assert (await asyncio.wait_for(waiting, 1)).status == 137
        assert "exit c1 137" not in p.log
        with pytest.raises(NotFound):
            await creating


@asynchronous
async def test_delete_of_what_never_started(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.create()
        await p.add_exec()
        waiting = asyncio.create_task(container.init.wait())
        deleted_exec = await container.delete_exec("e1")
        assert (deleted_exec.pid, deleted_exec.exit) == (0, None)
        deleted = await p.sandbox.delete_container("c1")
        assert deleted.exit is None
        await waiting
        assert p.log == ["create c1", "execadded e1", "delete c1"]


@asynchronous
async def test_sigkill_ends_a_guest_that_does_not_answer(tmp_path: Path) -> None:
    async with pod(tmp_path, settings=settings_with(request=0.2)) as p:
        container = await p.running()

        async def silent(_params: Json) -> None:
            await asyncio.sleep(3600)

        p.guest.answers["signal"] = silent
        with pytest.raises(StepTimeout):
            await container.kill("", 15, everything=False)
        await container.kill("", 9, everything=True)
        assert (await container.init.wait()).status == 137
        assert p.hypervisor.running == 0


@pytest.mark.parametrize("answer", [None, messages.WRONG_STATE, messages.NOT_FOUND])
@asynchronous
async def test_sigkill_ends_a_guest_that_takes_it_and_does_not_obey(tmp_path: Path, answer: str | None) -> None:
    async with pod(tmp_path, settings=settings_with(request=0.1, drain=0.1)) as p:
        container = await p.running()

        async def pretends(_params: Json) -> None:
            if answer:
                raise Refused(answer, "it has ended, believe me")

        p.guest.answers["signal"] = pretends
        with suppress(NotFound):
            await container.kill("", 9, everything=False)
        assert (await container.init.wait()).status == 137
        assert p.hypervisor.running == 0


@asynchronous
async def test_an_exec_that_the_guest_does_not_let_go_keeps_nothing(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        await p.sandbox.start("c1", "e1")

        async def refuses(_params: Json) -> None:
            raise Refused(messages.INTERNAL, "no")

        p.guest.answers["delete"] = refuses
        await p.guest.exit(0, "c1", "e1")
        await p.guest.exit(0, "c1")
        await container.init.wait()
        await p.sandbox.delete_container("c1")
        assert p.log[-1] == "delete c1"
        await until(lambda: p.host.nothing_left)


@pytest.mark.parametrize("kind", [messages.INTERNAL, messages.WRONG_STATE, messages.INVALID])
@asynchronous
async def test_a_container_that_the_guest_does_not_let_go_is_deleted(tmp_path: Path, kind: str) -> None:
    async with pod(tmp_path) as p:
        await p.running("other")
        await p.create()

        async def refuses(_params: Json) -> None:
            raise Refused(kind, "no")

        p.guest.answers["delete"] = refuses
        await p.sandbox.delete_container("c1")
        assert p.log[-1] == "delete c1"
        assert len(p.host.anchors) == 1, "the other's"


@asynchronous
async def test_an_exec_of_a_container_that_is_never_started(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path) as p:
        await p.create()
        await p.add_exec(stdio=StdioPaths("", fifo.path, "", terminal=False))
        await p.sandbox.start("c1", "e1")
        await p.guest.write(b"hello", "c1", "e1")
        assert await fifo.read(5) == b"hello"
        await p.sandbox.delete_container("c1")
        assert p.log == ["create c1", "execadded e1", "execstarted e1", "exit e1 137", "delete c1"]
        assert await fifo.read_to_end() == b""
    fifo.close()


@asynchronous
async def test_guest_deletes_all_containers_but_the_last(tmp_path: Path) -> None:
    """The last one goes with the VM, which is quicker."""
    async with pod(tmp_path) as p:
        for name in ("c1", "c2"):
            await p.create(name)
        await p.sandbox.delete_container("c1")
        await p.sandbox.delete_container("c2")
        assert [params["container"] for method, params in p.guest.requests if method == "delete"] == ["c1"]


BLOCK_ROOT = (Mount("ext4", "/dev/dm-7", "", ()),)


@asynchronous
async def test_block_device_is_unmounted_when_delete_answers(tmp_path: Path) -> None:
    """Who deletes a container may mount its snapshot at once; a guest that remembers files would keep it mounted."""
    async with pod(tmp_path) as p:
        await p.create("c1")
        await p.sandbox.create_container(replace(p.request("c2"), rootfs=BLOCK_ROOT))
        uses = iter([True, True, False])
        p.host.in_use = lambda: "release" not in p.guest.methods() or next(uses)
        await p.sandbox.delete_container("c2")
        assert next(uses, None) is None, "Delete did not wait"
        assert p.guest.methods()[-2:] == ["delete", "release"]
        assert not [mount for mount in p.host.mounts if "c2" in mount]


@asynchronous
async def test_last_containers_block_device_goes_with_the_vm(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.sandbox.create_container(replace(p.request("c1"), rootfs=BLOCK_ROOT))
        p.host.in_use = lambda: bool(p.host.helpers)
        await p.sandbox.delete_container("c1")
        assert not p.host.helpers
        assert "release" not in p.guest.methods()


@asynchronous
async def test_block_device_that_stays_in_use_delays_delete_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder, "_LETS_GO", 0.05)
    async with pod(tmp_path) as p:
        await p.create("c1")
        await p.sandbox.create_container(replace(p.request("c2"), rootfs=BLOCK_ROOT))
        p.host.in_use = lambda: True
        await p.sandbox.delete_container("c2")
        assert "is still in use after 0.05 s" in caplog.text


@asynchronous
async def test_deleted_exec_has_its_exit(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        await p.guest.exit(2, "c1", "e1")
        await container.process("e1").wait()
        deleted = await container.delete_exec("e1")
        assert deleted.exit is not None
        assert (deleted.exit.status, deleted.pid) == (2, seen_from_host(102))
        with pytest.raises(NotFound):
            container.process("e1")


@asynchronous
async def test_two_deletes_at_the_same_time(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "out")
    fifo.open_reader()
    async with pod(tmp_path) as p:
        container = await p.running(stdio=StdioPaths("", fifo.path, "", terminal=False))
        await p.guest.exit(0, "c1", ends=False)
        await container.init.wait()
        deleting = [asyncio.create_task(p.sandbox.delete_container("c1")) for _ in range(2)]
        await asyncio.sleep(0.02)
        await p.guest.end("stdout", "c1")
        results = await asyncio.gather(*deleting, return_exceptions=True)
        assert not [result for result in results if isinstance(result, Exception) and not isinstance(result, ShimError)]
        assert p.log.count("delete c1") == 1
    fifo.close()


@asynchronous
async def test_pause_and_resume(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        with pytest.raises(WrongState):
            await container.resume()
        await container.pause()
        assert container.init.status is Status.PAUSED
        with pytest.raises(WrongState):
            await container.pause()
        await container.resume()
        assert container.init.status.name == "RUNNING"
        assert p.log[-2:] == ["paused c1", "resumed c1"]


@asynchronous
async def test_of_many_who_pause_at_the_same_time_one_does(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        ends = await asyncio.gather(*(container.pause() for _ in range(3)), return_exceptions=True)
        assert [type(end) for end in ends] == [type(None), WrongState, WrongState]
        assert p.log.count("paused c1") == 1


@pytest.mark.parametrize("operation", ["pause", "resume"])
@asynchronous
async def test_exit_in_the_middle_of_pause_or_resume(tmp_path: Path, operation: str) -> None:
    """The exit counts: a task that were paused for ever could never be deleted."""
    async with pod(tmp_path) as p:
        container = await p.running()
        if operation == "resume":
            await container.pause()

        async def exits_first(_params: Json) -> None:
            await p.guest.exit(137, "c1")
            await container.init.wait()

        p.guest.answers[operation] = exits_first
        await getattr(container, operation)()
        assert container.init.status is Status.STOPPED
        await p.sandbox.delete_container("c1")


@asynchronous
async def test_pids_name_the_anchor_and_the_execs(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        found = [(info.pid, info.exec_id) for info in await container.pids()]
        assert found == [(container.anchor.pid, ""), (seen_from_host(102), "e1")]
        await p.guest.exit(0, "c1")
        await container.init.wait()
        assert await container.pids() == []


def test_no_process_of_the_host_has_a_pid_that_clients_are_told_of_one_in_the_guest() -> None:
    assert seen_from_host(1) > int(Path("/proc/sys/kernel/pid_max").read_text())
    assert seen_from_host(1 << 22) < 1 << 31, "clients keep it in 32 bits"


@asynchronous
async def test_a_paused_container_takes_no_exec_and_those_that_run_are_paused_with_it(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        await container.pause()
        with pytest.raises(WrongState, match="paused"):
            await p.add_exec("e2")
        assert [container.state(process) for process in container.processes] == [Status.PAUSED] * 2
        await container.resume()
        assert [container.state(process) for process in container.processes] == [Status.RUNNING] * 2


@asynchronous
async def test_a_pause_waits_for_an_exec_that_is_being_started_and_the_next_exec_for_the_pause(tmp_path: Path) -> None:
    """An exec that is frozen half way would be neither started nor refused."""
    async with pod(tmp_path) as p:
        container = await p.running()
        go = {name: asyncio.Event() for name in ("exec", "pause")}

        async def starts(_params: Json) -> Json:
            await go["exec"].wait()
            return {"pid": 7}

        async def pauses(_params: Json) -> None:
            await go["pause"].wait()

        p.guest.answers.update(exec=starts, pause=pauses)
        for name in ("e1", "e2"):
            await p.add_exec(name)
        first = asyncio.create_task(p.sandbox.start("c1", "e1"))
        await until(lambda: "exec" in p.guest.methods())
        pausing = asyncio.create_task(container.pause())
        await asyncio.sleep(0.02)
        assert "pause" not in p.guest.methods()
        go["exec"].set()
        await first
        await until(lambda: "pause" in p.guest.methods())
        second = asyncio.create_task(p.sandbox.start("c1", "e2"))
        await asyncio.sleep(0.02)
        go["pause"].set()
        await pausing
        with pytest.raises(WrongState, match="paused"):
            await second
        assert p.guest.methods().count("exec") == 1
        await container.resume()
        assert await p.sandbox.start("c1", "e2") == seen_from_host(7)


@asynchronous
async def test_an_exec_that_the_guest_does_not_start_in_time_is_not_to_run_later(tmp_path: Path) -> None:
    async with pod(tmp_path, settings=settings_with(request=0.05)) as p:
        await p.running()
        await p.add_exec()

        async def never(_params: Json) -> None:
            await asyncio.sleep(60)

        p.guest.answers["exec"] = never
        with pytest.raises(StepTimeout):
            await p.sandbox.start("c1", "e1")
        await until(lambda: "delete" in p.guest.methods())
        assert p.guest.requests[-1] == ("delete", {"container": "c1", "exec": "e1", "kill": True})

        exit_ = {"event": "exit", "container": "c1", "exec": "e1", "status": 137, "stdout": 0, "stderr": 0}
        await p.guest._say(exit_)  # an agent may have said so before it heard of that
        await until(lambda: p.sandbox.container("c1").process("e1").guest_status == 137)
        del p.guest.answers["exec"]
        await p.sandbox.start("c1", "e1")
        await p.guest.exit(3, "c1", "e1")
        assert (await p.sandbox.container("c1").process("e1").wait()).status == 3


@asynchronous
async def test_a_signal_for_all_of_an_exec_is_for_the_exec(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        await container.kill("e1", 15, everything=True)
        assert p.guest.requests[-1][1] == {"container": "c1", "exec": "e1", "signal": 15, "all": False}


@asynchronous
async def test_a_guest_that_hangs_is_not_waited_for_by_who_asks_all_containers_of_a_host(tmp_path: Path) -> None:
    async with pod(tmp_path, settings=settings_with(request=0.3)) as p:
        container = await p.running()

        async def never(_params: Json) -> None:
            await asyncio.sleep(60)

        p.guest.answers.update(pids=never, stats=never)
        async with asyncio.timeout(0.25):
            assert [info.pid for info in await container.pids()] == [container.anchor.pid]
            with pytest.raises(StepTimeout):
                await container.stats()


@asynchronous
async def test_a_cpu_quota_is_one_of_the_period_that_was_set_before(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        resources = {"cpu": {"quota": 10_000, "period": 50_000}}
        container = await p.sandbox.create_container(p.request("c1", linux={**ALONE, "resources": resources}))
        await container.update({"cpu": {"quota": 50_000}})
        with pytest.raises(Unsupported, match=r"1\.2 CPUs"):
            await container.update({"cpu": {"quota": 60_000}})
        await container.update({"cpu": {"period": 100_000}})
        await container.update({"cpu": {"quota": 60_000}})


@asynchronous
async def test_limits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        for limits in ({"memory": {"limit": "much"}}, {"cpu": {"quota": [1]}}, {"cpu": 5}):
            with pytest.raises(InvalidRequest):
                await container.update(limits)


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        ({"memory": {"limit": (256 << 20) + 1}}, "the VM has 256 MiB"),
        ({"cpu": {"quota": 150_000, "period": 100_000}}, "a limit of 1.5 CPUs: the VM has 1"),
        ({"cpu": {"quota": 100_001}}, "the VM has 1"),
        ({"memory": {"limit": 256 << 20}, "cpu": {"quota": 100_000}}, ""),
        ({"memory": {"limit": -1}, "cpu": {"quota": -1}}, ""),
    ],
)
@asynchronous
async def test_limits_beyond_the_vm_are_refused_unless_they_were_so_before(
    tmp_path: Path, limits: Json, refused: str
) -> None:
    async with pod(tmp_path) as p:
        large = await p.sandbox.create_container(p.request("large", linux={**ALONE, "resources": limits}))
        await large.update(limits)
        container = await p.running()
        with pytest.raises(Unsupported, match=refused) if refused else nullcontext():
            await container.update(limits)
        assert p.guest.methods().count("update") == (1 if refused else 2)


@asynchronous
async def test_the_pod_is_as_expendable_as_its_most_expendable_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pod(tmp_path) as p:
        scores: list[tuple[set[int], int]] = []
        monkeypatch.setattr(oom, "adjust", lambda pids, score: scores.append((set(pids), score)))
        monkeypatch.setattr("pymicro.shim.cgroup.processes", lambda _: {1, 2})
        pids = []
        for name, score in (("a", -998), ("b", 1000), ("c", 5), ("d", None)):
            process = {"args": ["sh"], "cwd": "/", **({} if score is None else {"oomScoreAdj": score})}
            container = await p.sandbox.create_container(p.request(name, process=process))
            pids.append({container.anchor.pid})
        assert scores == [
            *((pids[0], -998), ({1, 2}, -998)),
            *((pids[1], 1000), ({1, 2}, 1000)),
            *((pids[2], 5), ({1, 2}, 1000)),
        ]


@asynchronous
async def test_delete_of_the_program_knows_how_the_task_has_ended(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        told = task_pb2.DeleteResponse.FromString(answer.of(container.bundle))
        assert (told.pid, told.exit_status) == (container.anchor.pid, 137)
        await p.guest.exit(7, "c1")
        ended = await container.init.wait()
        await p.until_logged("exit c1 7")
        told = task_pb2.DeleteResponse.FromString(answer.of(container.bundle))
        assert (told.pid, told.exit_status) == (container.anchor.pid, 7)
        assert told.exited_at.ToDatetime(UTC) == ended.at


@asynchronous
async def test_resize_without_a_terminal_does_nothing(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await container.resize("", 80, 25)
        assert "resize" not in p.guest.methods()
        await p.guest.exit(0, "c1")
        await container.init.wait()
        await container.resize("", 80, 25)  # it was quicker than its client, which is no error


@asynchronous
async def test_resize_of_an_exec_that_has_stopped(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.add_exec()
        await p.sandbox.start("c1", "e1")
        await p.guest.exit(0, "c1", "e1")
        await container.process("e1").wait()
        with pytest.raises(WrongState):
            await container.resize("e1", 80, 25)


@asynchronous
async def test_anchor_that_somebody_kills_is_the_containers_end(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        p.host.anchors[container.anchor.pid].die()
        assert (await container.init.wait()).status == 137
        assert p.log[-1] == "exit c1 137"
        signal = dict(p.guest.requests)["signal"]
        assert (signal["signal"], signal["all"]) == (9, True)


@asynchronous
async def test_containers_of_a_pod_come_and_go(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.running("c1")
        for _ in range(3):
            other = await p.running("c2")
            await other.kill("", 9, everything=True)
            await other.init.wait()
            await p.sandbox.delete_container("c2")
        assert p.hypervisor.running == 1, "the VM is everybody's"
        assert p.sandbox.container("c1").init.status is Status.RUNNING
        assert len(p.hypervisor.vms) == 1


@asynchronous
async def test_vm_goes_down_with_the_last_container(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        container = await p.running()
        await p.guest.exit(0, "c1")
        await container.init.wait()
        await p.sandbox.delete_container("c1")
        await asyncio.sleep(0.002)  # Shutdown comes while the VM is being taken down
        await p.sandbox.stop()
        await p.sandbox.stop()
        assert p.hypervisor.running == 0
        assert not p.host.helpers
        with pytest.raises(SandboxDied, match="was stopped"):
            await p.create("c2")


@asynchronous
async def test_stopped_before_it_has_booted(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await turns(1)
        await p.sandbox.stop()
        with pytest.raises(SandboxDied):
            await p.create()


def record(pod: Pod) -> Json:
    return state.read(str(pod.directory / "run"))


@asynchronous
async def test_record_names_what_delete_has_to_free(tmp_path: Path) -> None:
    async with pod(tmp_path) as p:
        await p.running("c1")
        await p.create("c2")
        kept = record(p)
        assert p.host.cgroups == {*kept["cgroups"], *kept["container_cgroups"]}
        assert sorted(set(kept["containers"])) == ["c1", "c2"]
        assert kept["socket"] == str(tmp_path / "socket")
        await p.sandbox.delete_container("c2")
        assert record(p)["containers"] == ["c1"]


@asynchronous
async def test_record_forgets_the_cgroups_of_containers_that_are_gone(tmp_path: Path) -> None:
    """A pod may live for months, and its containers come and go."""
    async with pod(tmp_path) as p:
        await p.running("c1")
        before = record(p)["container_cgroups"]
        await p.create("c2")
        await p.sandbox.delete_container("c2")
        assert record(p)["container_cgroups"] == before
        p.host.fail = "anchor.start"
        with pytest.raises(InvalidRequest, match="was made to fail"):
            await p.create("c3")
        assert record(p)["container_cgroups"] == before


@asynchronous
async def test_cgroups_are_recorded_before_they_exist(tmp_path: Path) -> None:
    seen: list[bool] = []

    def prepare(p: Pod) -> None:
        real = p.host.create_cgroups

        def check(groups: tuple[str, ...], _root: str = "") -> None:
            kept = record(p)
            seen.append(set(groups) <= {*kept.get("cgroups", ()), *kept.get("container_cgroups", ())})
            real(groups)

        cgroup.create = check  # type: ignore[assignment]  # the harness's patch puts it back

    async with pod(tmp_path, prepare=prepare) as p:
        await p.create()
    assert seen == [True, True]


assert SETTINGS.timeouts.drain < 1, "the tests would be slow"
