"""The daemon's beginning: the pod's VM is started first, what serves it is imported while the guest wakes up."""

import os
import socket
import time

from msgspec import Struct
from pymicro.shim import early, guestspec, rootfs
from pymicro.shim.bundle import Bundle
from pymicro.shim.config import Settings, load, with_annotations
from pymicro.shim.errors import ShimError
from pymicro.shim.ignition import Ignition, ignite, make_plan
from pymicro.shim.state import Record
from pymicro.shim.timeline import Timeline


class Start(Struct, frozen=True):
    """What `start` hands to the daemon."""

    namespace: str
    sandbox_id: str
    containerd_address: str
    bundle: str
    directory: str
    socket_path: str
    options: bytes
    debug: bool
    begun_ns: int


def run(start: Start, listener: socket.socket) -> None:
    """Serve one sandbox at `listener` until containerd shuts it down; nothing is left then."""
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
    )
    early.hold()
    pod = prepare(start, record, timeline)
    begun = time.monotonic_ns()

    import asyncio

    from pymicro.shim import logs
    from pymicro.shim.serve import serve

    settings = pod.plan.settings if isinstance(pod, Ignition) else Settings()
    logs.set_up("debug" if start.debug else settings.log.level)
    timeline.span("import", begun)
    asyncio.run(serve(start, pod, record, timeline, listener))


def prepare(start: Start, record: Record, timeline: Timeline) -> Ignition | ShimError:
    """Return the pod with its VM on its way, or why there is none: Create will say so."""
    try:
        settings = load(_config_path(start.options))
        bundle = Bundle.load(start.bundle)
        settings = with_annotations(settings, bundle.annotations)
        guestspec.build(bundle.spec, start.sandbox_id)  # what no VM could run needs none to be refused
        return ignite(make_plan(bundle, settings), start.directory, start.sandbox_id, record.note, timeline)
    except ShimError as error:
        return error
    except OSError as error:
        return ShimError(f"the sandbox cannot be set up: {error}")


def _config_path(options: bytes) -> str | None:
    if not options:
        return None
    from pymicro.shim.translate import config_path

    return config_path(options)
