"""The first half of a pod's start: its place on the host, its VM's processes, and the guest let run.

All of it is plain code: what serves the pod is imported while the guest finds its devices. `boot` is the second half.
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct
from pymicro.shim import cgroup, early, host, rootfs
from pymicro.shim.bundle import Bundle
from pymicro.shim.config import Settings, VmSize, vm_size
from pymicro.shim.errors import SandboxDied, ShimError, StepTimeout
from pymicro.shim.hypervisor import registry, virtiofsd
from pymicro.shim.hypervisor.base import Boot, Hypervisor, Origin, Spawned, VmSpec
from pymicro.shim.netns import pod_netns
from pymicro.shim.spawn import Child, Place
from pymicro.shim.templates import Store, key
from pymicro.shim.timeline import Timeline


class Note(Protocol):
    """Records facts in the run directory before they are true."""

    def __call__(self, **facts: Any) -> None: ...  # JSON of any kind


class Plan(Struct, frozen=True):
    """What a pod's VM is to be on this host."""

    bundle: Bundle
    settings: Settings
    spec: VmSpec
    hypervisor: Hypervisor
    virtiofsd: host.Virtiofsd

    @property
    def templates(self) -> Store:
        return template_store(self.settings)

    def diagnosed(self, error: ShimError) -> ShimError:
        """Return why a cold boot failed, with what is wrong with the kernel or image, else which they are: looked at
        only now.
        """
        files = (self.spec.kernel, self.spec.image)
        if findings := [finding for path in files if (finding := host.verify_artifact(path))]:
            return type(error)("; ".join([*findings, str(error)]))
        return type(error)(f"{error} (kernel {files[0]}, image {files[1]})")


def make_plan(bundle: Bundle, settings: Settings) -> Plan:
    """Return what this pod wants of this host. Raises HostMissing, InvalidSettings."""
    spec, hypervisor = vm_spec(bundle, settings), registry.hypervisor(settings)
    return Plan(bundle, settings, spec, hypervisor, host.find_virtiofsd(settings))


def vm_spec(bundle: Bundle, settings: Settings) -> VmSpec:
    """Return the VM that a pod gets. Raises HostMissing, InvalidSettings."""
    return vm_of_size(settings, vm_size(settings, bundle.resources, bundle.annotations))


def vm_of_size(settings: Settings, size: VmSize) -> VmSpec:
    """Return a VM of that size, as this host makes them. Raises HostMissing, InvalidSettings."""
    kernel, image = host.guest_files(settings)
    return VmSpec(
        binary=registry.binary(settings),
        kernel=kernel,
        image=image,
        vcpus=size.vcpus,
        memory_mib=size.memory_mib,
        accel=registry.accel(settings),
    )


def template_store(settings: Settings) -> Store:
    """Return this host's templates."""
    return Store(Path(settings.templates.directory), settings.templates.most, settings.templates.most_mib)


class Started(Struct, frozen=True):
    """A VM whose guest runs, since `resumed_ns` (CLOCK_MONOTONIC), and that nobody drives yet."""

    origin: Origin
    share: Child
    vmm: Spawned
    resumed_ns: int

    def end(self) -> None:
        """End those that nobody has taken over. Idempotent."""
        self.vmm.end()
        self.share.end()


class Ignition:
    """A pod's place, and its VM if that could be started already: to make a template first takes asyncio."""

    def __init__(self, plan: Plan, place: Place, timeline: Timeline) -> None:
        self.plan = plan
        self.place = place
        self._timeline = timeline
        self.resources = ExitStack()
        self._started: Started | None = None

    def __repr__(self) -> str:
        return f"<Ignition {self.place.directory} {self._started}>"

    def close(self) -> None:
        """Free the place, and the VM if nobody has taken it. Idempotent."""
        if started := self.take():
            started.end()
        self.resources.close()

    def light(self) -> None:
        """Start the VM if its origin is there. Raises as start()."""
        if origin := self._origin():
            self._started = self.start(origin)

    def _origin(self) -> Origin | None:
        if self.plan.settings.vm.start == "boot":
            return Boot()
        with suppress(OSError):  # whoever makes the template meets it again, and says it
            return self.plan.templates.look_up(key(self.plan.spec, self.plan.hypervisor))
        return None

    def start(self, origin: Origin) -> Started:
        """Start virtiofsd and the VMM and let the guest run: from `origin`, or cold if a template fails.

        Raises HostMissing, SandboxDied, StepTimeout, OSError; then nothing of it is left.
        """
        try:
            return self._start(origin)
        except (SandboxDied, StepTimeout, OSError) as error:
            return self.start_cold(origin, error)

    def start_cold(self, failed: Origin, error: Exception) -> Started:
        """Start anew, after a VM from a template has failed with `error`: that template is discarded. Raises what is
        known of the error if it was no template's.
        """
        if isinstance(failed, Boot):
            raise self.plan.diagnosed(error) if isinstance(error, ShimError) else error from error
        self.plan.templates.discard(failed.memory.parent.name, f"a VM restored from it failed: {error}")
        return self.start(Boot())

    def _start(self, origin: Origin) -> Started:
        begun = time.monotonic_ns()
        plan, place = self.plan, self.place
        with ExitStack() as undo:
            vmm = plan.hypervisor.spawn(plan.spec, origin, place, vsock=True)
            undo.callback(vmm.end)
            begun = self._timeline.span("spawn", begun)
            vmm.wake()
            resumed = self._timeline.span("vmm", begun)
            # not earlier: the VMM needs the CPU more, and the guest looks for its share when it has said hello
            share = virtiofsd.start(plan.virtiofsd, place.directory / "view", place.directory / "fs.sock", place)
            undo.pop_all()
        return Started(origin, share, vmm, resumed)

    def take(self) -> Started | None:
        """Return what has been started, once: it is the caller's."""
        started, self._started = self._started, None
        return started


def ignite(plan: Plan, directory: str, sandbox_id: str, note: Note, timeline: Timeline) -> Ignition:
    """Make the pod's place in the run directory `directory` and start its VM as far as that goes without asyncio.

    Raises HostMissing, InvalidRequest (its network namespace), SandboxDied, StepTimeout, OSError; then nothing is left.
    """
    spec = plan.spec
    with ExitStack() as stack:
        groups = _cgroups(directory, sandbox_id, plan.bundle)
        shape = {"vcpus": spec.vcpus, "memory_mib": spec.memory_mib, "accel": spec.accel}
        note(cgroups=list(groups), templates=plan.settings.templates.directory, **shape)
        place = stack.enter_context(_pod_place(Path(directory), groups, plan.bundle))
        share, view = place.directory / "share", place.directory / "view"
        for path in (share, view):
            path.mkdir(exist_ok=True)
        rootfs.make_share(str(share), str(view))
        ignition = Ignition(plan, place, timeline)
        ignition.light()
        ignition.resources = stack.pop_all()
        return ignition


def _cgroups(directory: str, sandbox_id: str, bundle: Bundle) -> tuple[str, ...]:
    """Return the helpers' cgroup. It lies beside the container's, not in it: the container's limits are the guest's
    business and must not starve the VMM. In Kubernetes both lie in the pod's cgroup.
    """
    own = cgroup.relative_path(bundle.cgroups_path, f"pymicro/{sandbox_id}")
    return cgroup.directories(os.path.join(os.path.dirname(own), f"pymicro-{os.path.basename(directory)}"))


@contextmanager
def _pod_place(directory: Path, groups: tuple[str, ...], bundle: Bundle) -> Iterator[Place]:
    """Make the network namespace and the cgroup that the pod's helpers run in."""
    with pod_netns(bundle.netns_path) as netns_fd:
        try:
            cgroup.create(groups)
            yield Place(directory, groups, netns_fd)
        finally:
            cgroup.kill(groups)
            if left := cgroup.remove(groups):
                early.warning(__name__, cgroup.warning(left))
