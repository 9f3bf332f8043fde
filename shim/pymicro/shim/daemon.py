"""The daemon's beginning: the pod's VM is started first, what serves it is imported while the guest wakes up."""

import errno
import os
import socket
import time

from msgspec import Struct
from pymicro.shim import cgroup, early, guestspec, rootfs
from pymicro.shim.bundle import Bundle
from pymicro.shim.config import Settings, load, with_annotations
from pymicro.shim.errors import InvalidRequest, ShimError
from pymicro.shim.ignition import Ignition, ignite, make_plan
from pymicro.shim.state import Record
from pymicro.shim.timeline import Timeline


class Start(Struct, frozen=True):
    """What `start` hands to the daemon."""

    namespace: str
    sandbox_id: str
    bundle: str
    directory: str
    socket_path: str
    protocol: str
    """What the shim is to speak: `protocol.TTRPC` or `protocol.GRPC`."""
    warning: str
    """What is worth one about that, or ""."""
    ttrpc_address: str
    """Where containerd takes events."""
    config_path: str
    config_body: bytes
    shim_cgroup: str
    """The cgroup that the shim itself is to be in, "" for the one it was started in."""
    debug: bool
    begun_ns: int


def run(start: Start, listener: socket.socket) -> bool:
    """Serve one sandbox at `listener` until containerd shuts it down; return whether nothing is left then."""
    rootfs.private_namespace()
    os.chdir("/")  # the bundle vanishes before we do
    timeline = Timeline(start.begun_ns)
    timeline.span("shim", start.begun_ns)
    record = Record(
        start.directory,
        namespace=start.namespace,
        sandbox=start.sandbox_id,
        bundle=start.bundle,
        socket=start.socket_path,
        protocol=start.protocol,
    )
    record.note()  # from now on whoever frees the sandbox finds us
    early.hold()
    if start.warning:
        early.warning(__name__, start.warning)
    pod = prepare(start, record, timeline)
    begun = time.monotonic_ns()

    import asyncio

    from pymicro.shim import logs
    from pymicro.shim.serve import serve

    settings = pod.plan.settings if isinstance(pod, Ignition) else Settings()
    logs.set_up("debug" if start.debug else settings.log.level)
    timeline.span("import", begun)
    return asyncio.run(serve(start, pod, record, timeline, listener))


def prepare(start: Start, record: Record, timeline: Timeline) -> Ignition | ShimError:
    """Return the pod with its VM on its way, or why there is none: Create will say so."""
    try:
        if start.shim_cgroup:
            _join(start.shim_cgroup)
        settings = load(start.config_path, start.config_body)
        bundle = Bundle.load(start.bundle)
        settings = with_annotations(settings, bundle.annotations)
        # what no VM could run needs none to be refused
        guestspec.build(bundle.spec, start.sandbox_id, host_pid=settings.vm.host_pid)
        return ignite(make_plan(bundle, settings), start.directory, start.sandbox_id, record.note, timeline)
    except ShimError as error:
        return error
    except OSError as error:
        return ShimError(f"the sandbox cannot be set up: {error}")


def _join(path: str) -> None:
    """Move the shim into the cgroup that runc's option `shim_cgroup` names. Raises InvalidRequest."""
    groups = [group for group in cgroup.directories(cgroup.relative_path(path, "")) if os.path.isdir(group)]
    try:
        if not groups:
            raise FileNotFoundError(errno.ENOENT, "no controller has it")
        cgroup.join(groups)
    except OSError as error:
        raise InvalidRequest(f"the shim cannot join the cgroup {path!r} (shim_cgroup): {error.strerror}") from error
