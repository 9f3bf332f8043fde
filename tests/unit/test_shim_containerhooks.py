"""Hooks in a container's life: which run when, what stands and what is gone by then, and what their failure does."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pymicro.shim import state
from pymicro.shim.errors import AlreadyExists, HookFailed, InvalidRequest, NotFound, StepTimeout
from pymicro.shim.process import Status

from tests.framework.fakes import asynchronous, until
from tests.unit.sandbox_harness import Json, Pod, pod, settings_with

KINDS = ("prestart", "createRuntime", "poststart", "poststop")


class Notes:
    """A file in which each hook notes its kind and the state that it got."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "notes"

    def hook(self, kind: str, then: str = "exit 0", **more: Any) -> Json:  # JSON
        """Return a hook that takes a note and then does as it is told."""
        script = f'echo "{kind} $(cat)" >> {self.file}; {then}'
        return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], **more}

    def hooks(self, **then: str) -> dict[str, list[Json]]:
        return {kind: [self.hook(kind, then.get(kind, "exit 0"))] for kind in KINDS}

    @property
    def taken(self) -> list[tuple[str, Json]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [(kind, json.loads(text)) for kind, _, text in (line.partition(" ") for line in lines)]

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.taken]


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path)


async def create(p: Pod, hooks: dict[str, list[Json]], container_id: str = "c1") -> None:
    await p.sandbox.create_container(p.request(container_id, hooks=hooks, annotations={"a": "b", "io.x": "y"}))


def owed(p: Pod) -> list[str]:
    """The containers whose poststop hooks `delete` would run now."""
    return list(state.read(str(p.directory / "run")).get("poststop", {}))


@asynchronous
async def test_hooks_run_in_the_order_of_the_life_cycle(tmp_path: Path, notes: Notes) -> None:
    async with pod(tmp_path) as p:
        order: list[tuple[list[str], str]] = []
        for method in ("create", "start"):

            async def answer(params: Json, method: str = method) -> Json | None:
                order.append((notes.kinds, method))
                reply: Json | None = await getattr(p.guest, f"do_{method}")(params)
                return reply

            p.guest.answers[method] = answer
        await create(p, notes.hooks())
        pid = p.sandbox.container("c1").anchor.pid
        await p.sandbox.start("c1", "")
        assert order == [(["prestart", "createRuntime"], "create"), (["prestart", "createRuntime"], "start")]
        assert notes.kinds == ["prestart", "createRuntime", "poststart"]
        assert p.log == ["create c1", "start c1"]
        await p.guest.exit(0, "c1")
        await p.until_logged("exit c1 0")
        await p.sandbox.delete_container("c1")
        assert notes.kinds == list(KINDS)
        assert p.log[-1] == "delete c1"
        known = {"ociVersion": "1.1.0", "id": "c1", "bundle": p.bundle("c1"), "annotations": {"a": "b", "io.x": "y"}}
        assert [got for _, got in notes.taken] == [
            {**known, "status": "creating", "pid": pid},
            {**known, "status": "creating", "pid": pid},
            {**known, "status": "running", "pid": pid},
            {**known, "status": "stopped"},
        ]


@asynchronous
async def test_poststop_hooks_are_owed_from_before_the_first_hook_until_after_the_last(
    tmp_path: Path, notes: Notes
) -> None:
    async with pod(tmp_path) as p:
        record = tmp_path / "run" / "state.json"
        hooks = {
            kind: [notes.hook(kind, f"grep -q poststop {record}")] for kind in ("prestart", "createRuntime", "poststop")
        }
        await create(p, hooks)
        assert owed(p) == ["c1"]
        await p.sandbox.delete_container("c1")
        assert notes.kinds == ["prestart", "createRuntime", "poststop"]
        assert owed(p) == []


@asynchronous
async def test_poststop_comes_when_nothing_of_the_container_is_left(tmp_path: Path, notes: Notes) -> None:
    async with pod(tmp_path) as p:
        await p.create("c0")  # the VM stays
        hold = tmp_path / "hold"
        await create(p, {"poststop": [notes.hook("poststop", f"while [ ! -e {hold} ]; do sleep 0.05; done")]})
        deletion = asyncio.create_task(p.sandbox.delete_container("c1"))
        await until(lambda: notes.kinds)
        assert len(p.host.anchors) == len(p.host.mounts) == 1, "c0's"
        assert "delete c1" not in p.log
        assert not deletion.done()
        hold.touch()
        await deletion


@asynchronous
async def test_who_deletes_again_waits_for_all_that_the_first_delete_does(tmp_path: Path, notes: Notes) -> None:
    """NotFound would say that nothing is left, and with no container left the shim may be shut down."""
    async with pod(tmp_path) as p:
        hold = tmp_path / "hold"
        await create(p, {"poststop": [notes.hook("poststop", f"while [ ! -e {hold} ]; do sleep 0.05; done")]})
        deletions = [asyncio.create_task(p.sandbox.delete_container("c1"))]
        await until(lambda: notes.kinds)
        deletions.append(asyncio.create_task(p.sandbox.delete_container("c1")))
        with pytest.raises(AlreadyExists):
            await p.create()
        assert not p.sandbox.idle
        stopping = asyncio.create_task(p.sandbox.stop())
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in (*deletions, stopping))
        hold.touch()
        first, second = await asyncio.gather(*deletions)
        await stopping
        assert first == second
        assert p.log == ["create c1", "delete c1"]
        assert notes.kinds == ["poststop"]


@pytest.mark.parametrize("kind", ["prestart", "createRuntime"])
@asynchronous
async def test_failure_of_a_hook_of_creation_is_the_failure_of_create(tmp_path: Path, notes: Notes, kind: str) -> None:
    async with pod(tmp_path) as p:
        with pytest.raises(HookFailed, match=rf"{kind} hook #0 \(/bin/sh\): exit status 4; it said: no bridge"):
            await create(p, notes.hooks(**{kind: "echo no bridge >&2; exit 4"}))
        with pytest.raises(NotFound):
            await p.sandbox.delete_container("c1")
        assert notes.kinds == [*KINDS[: KINDS.index(kind) + 1], "poststop"], "what was begun is cleaned up, once"
        assert "create" not in p.guest.methods()
        assert not p.host.anchors
        assert not p.host.mounts
        assert owed(p) == []
        assert p.log == []


@asynchronous
async def test_impatient_clients_do_not_disturb_the_cleaning_up_after_a_failed_create(
    tmp_path: Path, notes: Notes
) -> None:
    """A network that the poststop hook gives back half would be lost: nobody runs it again."""
    done, hold = tmp_path / "done", tmp_path / "hold"
    hooks = {
        "createRuntime": [notes.hook("createRuntime", "exit 4")],
        "poststop": [notes.hook("poststop", f"while [ ! -e {hold} ]; do sleep 0.02; done; touch {done}")],
    }
    async with pod(tmp_path) as p:
        creating = asyncio.create_task(create(p, hooks))
        await until(lambda: "poststop" in notes.kinds)
        deletions = [asyncio.create_task(p.sandbox.delete_container("c1")) for _ in range(2)]
        await asyncio.sleep(0.05)
        hold.touch()
        with pytest.raises(HookFailed):
            await creating
        for deletion in deletions:
            with pytest.raises(NotFound):
                await deletion
        assert done.exists()
        assert owed(p) == []


@asynchronous
async def test_a_second_delete_does_not_disturb_the_first_that_gives_up_a_create(tmp_path: Path, notes: Notes) -> None:
    done, hold = tmp_path / "done", tmp_path / "hold"
    hooks = {
        "createRuntime": [notes.hook("createRuntime", "sleep 100")],
        "poststop": [notes.hook("poststop", f"while [ ! -e {hold} ]; do sleep 0.02; done; touch {done}")],
    }
    async with pod(tmp_path) as p:
        creating = asyncio.create_task(create(p, hooks))
        await until(lambda: "createRuntime" in notes.kinds)
        first = asyncio.create_task(p.sandbox.delete_container("c1"))
        await until(lambda: "poststop" in notes.kinds)
        second = asyncio.create_task(p.sandbox.delete_container("c1"))
        await asyncio.sleep(0.05)
        hold.touch()
        for call in (creating, first, second):
            with pytest.raises(NotFound):
                await call
        assert done.exists()
        assert owed(p) == []


@asynchronous
async def test_a_hook_of_creation_that_hangs_is_killed(tmp_path: Path, notes: Notes) -> None:
    async with pod(tmp_path, settings=settings_with(hook=0.3)) as p:
        with pytest.raises(StepTimeout, match=r"createRuntime hook #0 .* in 0\.3 s \(timeouts\.hook\) and was killed"):
            await create(p, {"createRuntime": [notes.hook("createRuntime", "sleep 60")]})
        await create(p, {})


@asynchronous
async def test_create_that_fails_before_its_hooks_runs_none(tmp_path: Path, notes: Notes) -> None:
    async with pod(tmp_path) as p:
        p.host.fail = "anchor.start"
        with pytest.raises(InvalidRequest):
            await create(p, notes.hooks())
        assert notes.kinds == []
        p.host.fail = ""


@asynchronous
async def test_failure_of_a_poststart_hook_ends_the_container(tmp_path: Path, notes: Notes) -> None:
    async with pod(tmp_path) as p:
        await create(p, notes.hooks(poststart="echo unhappy; exit 1"))
        with pytest.raises(HookFailed, match=r"poststart hook #0 .* it said: unhappy"):
            await p.sandbox.start("c1", "")
        assert p.sandbox.container("c1").init.status is Status.STOPPED
        assert p.log == ["create c1", "start c1", "exit c1 137"]
        await p.sandbox.delete_container("c1")
        assert notes.kinds == list(KINDS)


@asynchronous
async def test_failure_of_a_poststop_hook_is_logged_and_the_next_one_runs(
    tmp_path: Path, notes: Notes, caplog: pytest.LogCaptureFixture
) -> None:
    async with pod(tmp_path) as p:
        await create(p, {"poststop": [notes.hook("one", "exit 3"), notes.hook("two")]})
        await p.sandbox.delete_container("c1")
        assert notes.kinds == ["one", "two"]
        assert "c1: error running poststop hook #0 (/bin/sh): exit status 3" in caplog.text


@asynchronous
async def test_poststop_runs_once_when_two_delete(tmp_path: Path, notes: Notes) -> None:
    async with pod(tmp_path) as p:
        await create(p, notes.hooks())
        await asyncio.gather(p.sandbox.delete_container("c1"), p.sandbox.delete_container("c1"))
        assert notes.kinds.count("poststop") == 1


@asynchronous
async def test_poststop_runs_when_the_vm_has_died(tmp_path: Path, notes: Notes) -> None:
    async with pod(tmp_path) as p:
        await create(p, notes.hooks())
        await p.sandbox.start("c1", "")
        p.vm.die(1)
        await p.until_logged("exit c1 137")
        assert notes.kinds == ["prestart", "createRuntime", "poststart"]
        await p.sandbox.delete_container("c1")
        assert notes.kinds == list(KINDS)


@asynchronous
async def test_poststop_of_containers_that_nobody_deleted_runs_at_the_end(tmp_path: Path, notes: Notes) -> None:
    async with pod(tmp_path) as p:
        await create(p, notes.hooks())
        await create(p, notes.hooks(), "c2")
        assert owed(p) == ["c1", "c2"]
        await p.sandbox.stop()
        assert sorted(got["id"] for kind, got in notes.taken if kind == "poststop") == ["c1", "c2"]
