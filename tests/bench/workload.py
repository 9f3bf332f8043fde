"""What `ctr run` gives a shim for a container: a bundle's spec and the mounts of a root filesystem of its own."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pymicro.shim.bundle import Bundle
from pymicro.shim.requests import Mount

from tests.bench.cases import IMAGE, PYMICRO, new_id
from tests.framework.containerd import Containerd


@dataclass(frozen=True, slots=True)
class Workload:
    """A container that containerd has prepared and nobody has started."""

    id: str
    bundle: Bundle
    rootfs: tuple[Mount, ...]


@contextmanager
def prepared(containerd: Containerd, *command: str) -> Iterator[Workload]:
    """Have containerd make a container for `command`, and its snapshot; both are removed afterwards."""
    name = new_id()
    containerd.ctr("container", "create", "--runtime", PYMICRO, IMAGE, name, *command)
    try:
        spec = json.loads(containerd.ctr("container", "info", "--spec", name).stdout)
        mounts = parse_mounts(containerd.ctr("snapshots", "mounts", "/", name).stdout)
        yield Workload(name, Bundle("/", spec), mounts)
    finally:
        containerd.ctr("container", "rm", name)


def parse_mounts(text: str) -> tuple[Mount, ...]:
    """Return the mounts that `ctr snapshots mounts` prints, as mount(8) commands. Raises ValueError for other lines."""
    return tuple(_parse_mount(line) for line in text.splitlines() if line.strip())


def _parse_mount(line: str) -> Mount:
    match shlex.split(line):
        case ["mount", "-t", kind, source, _, "-o", options]:
            return Mount(kind, source, "", tuple(options.split(",")))
        case ["mount", "-t", kind, source, _]:
            return Mount(kind, source, "", ())
    raise ValueError(f"`ctr snapshots mounts` printed what is no mount command: {line}")
