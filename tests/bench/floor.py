"""The floor of a start: the same VM, brought up by hand, that runs the same container to its end.

No containerd, no shim process, no stdio, and nothing that has to be imported on the way: what is left is QEMU, the
helpers, the guest and crun. The VM's end does not count.
"""

import asyncio
import functools
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from pymicro.shim import guestmessages, guestspec, host, rootfs, syscalls
from pymicro.shim.agent import AgentClient
from pymicro.shim.boot import Booted, boot, setup_message
from pymicro.shim.channel.base import Channel
from pymicro.shim.config import Settings, load
from pymicro.shim.hypervisor.base import Boot
from pymicro.shim.ignition import Ignition, ignite, make_plan
from pymicro.shim.timeline import Timeline

from tests.bench.workload import Workload, prepared
from tests.framework.containerd import Containerd

RUN = Path("/run/pymicro-bench")
FOLDER = "floor"
"""The container's part of the pod's share."""

Json = dict[str, Any]
"""An object of JSON: its values are of any kind."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds from nothing to the agent's hello, and to the exit of the container's process."""

    ready: float
    run: float


def by_hand(containerd: Containerd, start: str) -> Floor:
    """Bring a VM up for a container that runs `true`; `start` is "boot" or "snapshot". Raises RuntimeError.

    The first call of each kind is not to be counted: what it had to import is imported here for the later ones.
    """
    settings = load(str(containerd.settings))
    vm = msgspec.structs.replace(settings.vm, start=start, accel=choose_accel(settings.vm.accel))
    settings = msgspec.structs.replace(settings, vm=vm)
    with prepared(containerd, "true") as workload:
        answer = _in_child(lambda: _measure(settings, workload))
    if "error" in answer:
        raise RuntimeError(f"the floor could not be measured (start = {start}): {answer['error']}")
    for name in answer["imported"]:
        importlib.import_module(name)
    return Floor(answer["ready"], answer["run"])


choose_accel = functools.cache(host.choose_accel)
"""Once for all floors: its warning would be repeated."""


# -- the one place that knows how a VM is brought up -------------------------------------------------------------------


def _start(settings: Settings, directory: Path, workload: Workload) -> tuple[float, float]:
    """Bring the VM up, run the container; return the seconds until the hello and until the exit."""
    begun = time.monotonic()
    timeline = Timeline(time.monotonic_ns())
    plan = make_plan(workload.bundle, settings)
    with closing(ignite(plan, str(directory), workload.id, _ignore, timeline)) as ignition:
        return asyncio.run(_rise(ignition, timeline, workload, begun))


async def _rise(ignition: Ignition, timeline: Timeline, workload: Workload, begun: float) -> tuple[float, float]:
    settings, directory = ignition.plan.settings, ignition.place.directory
    async with boot(ignition, _no_streams, _ignore, timeline) as booted:
        ready = time.monotonic() - begun
        if isinstance(booted.origin, Boot) != (settings.vm.start == "boot"):
            raise RuntimeError(f"the VM was not started as asked but from {booted.origin}")
        await _run(booted, settings, directory, workload)
        return ready, time.monotonic() - begun


async def _run(booted: Booted, settings: Settings, directory: Path, workload: Workload) -> None:
    """Create and start the container and wait for its exit."""
    exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def take(event: guestmessages.Event) -> None:
        if isinstance(event, guestmessages.Exit):
            exited.set_result(event.status)

    agent = AgentClient(booted.control, take, settings.timeouts.request)
    try:
        await agent.call("setup", setup_message(workload.id))
        plan = guestspec.build(workload.bundle.spec, workload.id, folder=FOLDER)
        rootfs.mount_rootfs(workload.rootfs, str(directory / "share" / FOLDER / "rootfs"))
        streams = {"stdin": None, "stdout": None, "stderr": None}
        container = {"container": workload.id}
        await agent.call("create", {**container, "spec": plan.spec, "terminal": False, "streams": streams})
        await agent.call("start", container)
        async with asyncio.timeout(settings.timeouts.request):
            status = await exited
    finally:
        await agent.close()
    if status:
        raise RuntimeError(f"the container ended with status {status}")


def _ignore(**_facts: object) -> None: ...


def _no_streams(_token: object, channel: Channel) -> None:
    channel.close()


# -- a process of its own ----------------------------------------------------------------------------------------------


def _measure(settings: Settings, workload: Workload) -> Json:
    """Runs in the child, whose mounts nobody else sees."""
    directory = RUN / str(os.getpid())
    directory.mkdir(parents=True)
    imported = set(sys.modules)
    rootfs.private_namespace()
    try:
        ready, run = _start(settings, directory, workload)
    finally:
        rootfs.unmount_below(str(directory))
        shutil.rmtree(directory)
        with suppress(OSError):
            RUN.rmdir()
    return {"ready": ready, "run": run, "imported": sorted(set(sys.modules) - imported)}


def _in_child(work: Callable[[], Json]) -> Json:
    """Return what `work` returns in a forked process, or the `error` that it raised; an interrupt is passed on."""
    parent = os.getpid()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become_child(work, write_end, parent)
    os.close(write_end)
    try:
        with open(read_end, "rb") as answer:
            text = answer.read()
    except BaseException:
        os.kill(pid, signal.SIGINT)
        raise
    finally:
        os.waitpid(pid, 0)
    found: Json = json.loads(text) if text else {"error": "its process was killed"}
    return found


def _become_child(work: Callable[[], Json], write_end: int, parent: int) -> None:
    """Runs in the child and never returns. One SIGINT, from its parent or because that is gone, has it clean up."""
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        syscalls.set_parent_death_signal(signal.SIGINT)
        if os.getppid() == parent:
            os.write(write_end, json.dumps(work()).encode())
    except BaseException:  # noqa: BLE001  # whatever it is, the parent says it and this process must end
        os.write(write_end, json.dumps({"error": traceback.format_exc()}).encode())
    finally:
        os._exit(0)
