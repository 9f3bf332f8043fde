"""What the sandbox's tests share: a pod whose VM, mounts, cgroups and anchors are stand-ins that keep account."""

import asyncio
import itertools
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf.message import Message
from pymicro.shim import anchor, boot, cgroup, host, ignition, rootfs
from pymicro.shim.bundle import Bundle
from pymicro.shim.config import Settings, Timeouts, Vm
from pymicro.shim.container import Container
from pymicro.shim.errors import InvalidRequest
from pymicro.shim.events import Event, Publisher
from pymicro.shim.forward import message
from pymicro.shim.hypervisor import registry, virtiofsd
from pymicro.shim.hypervisor.base import VmSpec
from pymicro.shim.hypervisor.fake import FakeGuest, FakeHypervisor, FakeVm
from pymicro.shim.requests import CreateContainer, ExecProcess, Mount, StdioPaths
from pymicro.shim.sandbox import Sandbox
from pymicro.shim.state import Record
from pymicro.shim.timeline import Timeline

from tests.framework.fakes import no_descriptor_leaks, until

Json = dict[str, Any]  # JSON of any kind

NO_STDIO = StdioPaths("", "", "", terminal=False)
ALONE: Json = {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]}
"""The part `linux` of a spec that shares nothing with the host."""
SPEC = VmSpec("/qemu", Path("/kernel"), Path("/image"), 1, 256, "tcg")
SETTINGS = Settings(vm=Vm(start="boot"), timeouts=Timeouts(vmm=2, hello=2, request=2, drain=0.5))


def settings_like(**sections: Any) -> Settings:  # a struct of config.py each
    """Return the tests' settings with other sections."""
    return msgspec.structs.replace(SETTINGS, **sections)


def settings_with(**timeouts: float) -> Settings:
    """Return the tests' settings with other time-outs."""
    return msgspec.structs.replace(SETTINGS, timeouts=msgspec.structs.replace(SETTINGS.timeouts, **timeouts))


class Events(Publisher):
    """Takes note of what would be sent to containerd, as `topic id`."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.log: list[str] = []

    def _publish(self, what: Event) -> None:
        event = message(what)
        self.sent.append(event)
        name = type(event).__name__.removeprefix("Task").lower()
        who = getattr(event, "exec_id", "") or getattr(event, "id", "") or getattr(event, "container_id", "")
        status = f" {event.exit_status}" if name == "exit" else ""  # type: ignore[attr-defined]  # only TaskExit gets there
        self.log.append(f"{name} {who}{status}")


class FakeAnchor:
    """Stands for a container's host process."""

    pids = itertools.count(5000)

    def __init__(self, host: "FakeHost", on_death: Callable[[], None]) -> None:
        self.pid = next(self.pids)
        self._host = host
        self._on_death = on_death
        host.anchors[self.pid] = self

    def end(self) -> None:
        self._host.anchors.pop(self.pid, None)

    def die(self) -> None:
        """End as when somebody kills it."""
        self.end()
        self._on_death()


class FakeHelper:
    """Stands for virtiofsd, as a child and as the helper that watches it."""

    name = "virtiofsd"
    last_lines: list[str] = []  # noqa: RUF012  # the same for all

    def __init__(self, host: "FakeHost") -> None:
        self.exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._host = host
        host.helpers.append(self)

    def end(self) -> None:
        if self in self._host.helpers:
            self._host.helpers.remove(self)

    def send_signal(self, number: int) -> None:
        """Take note of nothing: what ends it is end()."""

    async def wait(self) -> int:
        return await asyncio.shield(self.exit)


class FakeHost:
    """Keeps account of what a sandbox takes of the host. `fail` names the call that raises."""

    def __init__(self) -> None:
        self.cgroups: set[str] = set()
        self.mounts: set[str] = set()
        self.roots: list[tuple[Mount, ...]] = []
        self.in_use: Callable[[], bool] = lambda: False
        self.binds: list[tuple[str, bool]] = []
        self.anchors: dict[int, FakeAnchor] = {}
        self.helpers: list[FakeHelper] = []
        self.namespaces = 0
        self.fail = ""

    @property
    def nothing_left(self) -> bool:
        return not (self.cgroups or self.mounts or self.anchors or self.helpers or self.namespaces)

    def _check(self, call: str) -> None:
        if self.fail == call:
            raise InvalidRequest(f"{call} was made to fail")

    def create_cgroups(self, groups: tuple[str, ...]) -> None:
        self.cgroups.update(groups)
        self._check("cgroup.create")

    def remove_cgroups(self, groups: tuple[str, ...]) -> list[str]:
        self.cgroups.difference_update(groups)
        return []

    def mount_rootfs(self, mounts: tuple[Mount, ...], target: str) -> None:
        self.roots.append(mounts)
        self.mounts.add(target)
        self._check("mount_rootfs")

    def bind(self, source: str, target: str, *, read_only: bool, recursively: bool = False) -> None:
        self.binds.append((source, read_only))
        self.mounts.add(target)
        self._check("bind")

    def let_go(self, directory: str) -> bool:
        if self.in_use():
            return False
        self.remove_tree(os.path.dirname(directory))
        return True

    def remove_tree(self, directory: str) -> None:
        self.mounts = {mount for mount in self.mounts if not mount.startswith(f"{directory}/")}

    def start_anchor(self, _root: str, _place: object, on_death: Callable[[], None]) -> FakeAnchor:
        self._check("anchor.start")
        return FakeAnchor(self, on_death)

    @contextmanager
    def netns(self, _path: str) -> Iterator[None]:
        self.namespaces += 1
        try:
            yield None
        finally:
            self.namespaces -= 1

    def virtiofsd(self, *_: object) -> FakeHelper:
        return FakeHelper(self)

    @asynccontextmanager
    async def watched(self, helper: FakeHelper) -> AsyncIterator[FakeHelper]:
        try:
            yield helper
        finally:
            await asyncio.sleep(0.005)  # to kill a process takes a moment
            helper.end()

    def put_in_place(self, patch: pytest.MonkeyPatch, hypervisor: FakeHypervisor, spec: VmSpec) -> None:
        """Replace what needs root or a VM."""
        patch.setattr(cgroup, "create", self.create_cgroups)
        patch.setattr(cgroup, "remove", self.remove_cgroups)
        patch.setattr(cgroup, "kill", lambda _groups: set())
        patch.setattr(cgroup, "write_limits", lambda _groups, _resources: None)
        patch.setattr(rootfs, "make_share", lambda *_: None)
        patch.setattr(rootfs, "mount_rootfs", self.mount_rootfs)
        patch.setattr(rootfs, "bind", self.bind)
        patch.setattr(rootfs, "let_go", self.let_go)
        patch.setattr(rootfs, "remove_tree", self.remove_tree)
        patch.setattr(anchor, "start", self.start_anchor)
        patch.setattr(ignition, "pod_netns", self.netns)
        patch.setattr(ignition, "vm_spec", lambda *_: spec)
        patch.setattr(host, "find_virtiofsd", lambda _settings: None)
        patch.setattr(host, "verify_artifact", lambda _path: None)
        patch.setattr(virtiofsd, "start", self.virtiofsd)
        patch.setattr(boot, "watched", self.watched)
        patch.setattr(registry, "hypervisor", lambda _settings: hypervisor)


class Pod:
    """A sandbox under test, and everything around it."""

    def __init__(self, directory: Path, guest: FakeGuest, settings: Settings) -> None:
        self.directory = directory
        self.guest = guest
        self.host = FakeHost()
        self.hypervisor = FakeHypervisor(guest)
        self.events = Events()
        self.settings = settings
        self.sandbox: Sandbox

    @property
    def log(self) -> list[str]:
        """The events so far."""
        return self.events.log

    @property
    def vm(self) -> FakeVm:
        return self.hypervisor.vms[0]

    def bundle(self, container_id: str, **changes: Any) -> str:  # a spec: JSON of any kind
        """Write a bundle and return its path."""
        path = self.directory / f"bundle-{container_id}"
        path.mkdir(exist_ok=True)
        spec = {
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"args": ["sh"], "cwd": "/"},
            "linux": ALONE,
            **changes,
        }
        (path / "config.json").write_text(json.dumps(spec))
        return str(path)

    def request(self, container_id: str, stdio: StdioPaths = NO_STDIO, **changes: Any) -> CreateContainer:  # JSON
        mounts = (Mount("bind", "/somewhere", "", ("rbind",)),)
        return CreateContainer(container_id, self.bundle(container_id, **changes), mounts, stdio)

    async def create(self, container_id: str = "c1", stdio: StdioPaths = NO_STDIO) -> Container:
        return await self.sandbox.create_container(self.request(container_id, stdio))

    async def running(self, container_id: str = "c1", stdio: StdioPaths = NO_STDIO) -> Container:
        """Return a container that runs."""
        container = await self.create(container_id, stdio)
        await self.sandbox.start(container_id, "")
        return container

    async def add_exec(self, exec_id: str = "e1", container_id: str = "c1", stdio: StdioPaths = NO_STDIO) -> None:
        self.sandbox.container(container_id).add_exec(ExecProcess(exec_id, stdio, {"args": ["ps"], "cwd": "/"}))

    async def until_logged(self, entry: str) -> None:
        await until(lambda: entry in self.log)


@asynccontextmanager
async def pod(
    tmp_path: Path,
    guest: FakeGuest | None = None,
    settings: Settings = SETTINGS,
    prepare: Callable[[Pod], None] = lambda _pod: None,
    spec: VmSpec = SPEC,
) -> AsyncIterator[Pod]:
    """Yield a pod whose sandbox boots; afterwards nothing of it may be left. `prepare` comes before the boot."""
    run = tmp_path / "run"
    run.mkdir()
    pod = Pod(tmp_path, guest or FakeGuest(), settings)
    with no_descriptor_leaks(), pytest.MonkeyPatch.context() as patch:
        pod.host.put_in_place(patch, pod.hypervisor, spec)
        prepare(pod)
        record, timeline = Record(str(run), namespace="ns", sandbox="c1", socket=str(tmp_path / "socket")), Timeline(0)
        plan = ignition.make_plan(Bundle.load(pod.bundle("c1")), settings)
        lit = ignition.ignite(plan, str(run), "c1", record.note, timeline)
        pod.sandbox = Sandbox("c1", lit, record, pod.events, timeline)
        try:
            yield pod
        finally:
            await pod.sandbox.stop()
        assert pod.hypervisor.running == 0
        assert pod.host.nothing_left, vars(pod.host)


__all__ = [
    "ALONE",
    "NO_STDIO",
    "SETTINGS",
    "Events",
    "FakeHost",
    "Json",
    "Pod",
    "pod",
    "settings_like",
    "settings_with",
]
