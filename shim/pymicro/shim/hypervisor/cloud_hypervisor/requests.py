"""What Cloud Hypervisor is told: the words that start it, and its requests. Pure.

Names and shapes of the requests are those of its published API description (vmm/src/api/openapi in its sources).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymicro.shim.channel.hybrid import GUEST_CID
from pymicro.shim.hypervisor import kernel
from pymicro.shim.hypervisor.base import Share, VmSpec

Json = dict[str, Any]
"""An object of JSON: its values are of any kind."""
Request = tuple[str, Json | None]
"""A request's name, and its body if it takes one."""

PING: Request = ("vmm.ping", None)
BOOT: Request = ("vm.boot", None)
PAUSE: Request = ("vm.pause", None)
RESUME: Request = ("vm.resume", None)
ASKING = frozenset((PING[0],))
"""Requests that change nothing: GET. All others are PUT."""


def command(binary: str, *, api_fd: int, events_fd: int) -> list[str]:
    """Return the words that start Cloud Hypervisor without a VM: its API on the listening socket `api_fd`, what happens
    to its VM written to `events_fd`.
    """
    # its other default, seccomp for each of its threads, is said too: it must not be changed by a later version
    return [binary, "--api-socket", f"fd={api_fd}", "--event-monitor", f"fd={events_fd}", "--seccomp", "true"]


def confinement(writable: Sequence[Path] | None) -> Json:
    """Return the part of a VM's configuration that confines the VMM by Landlock to the VM's files and `writable`.

    None: not at all, where the host's kernel has no Landlock, or an old one.
    """
    if writable is None:
        return {"landlock_enable": False}
    return {"landlock_enable": True, "landlock_rules": [{"path": str(path), "access": "rw"} for path in writable]}


def create(spec: VmSpec, writable: Sequence[Path] | None) -> Request:
    """Describe the VM that `spec` asks for; BOOT starts it. The guest's console is the VMM's stdout."""
    config: Json = {
        "payload": {"kernel": str(spec.kernel), "cmdline": kernel.arguments()},
        # a guest that could make VMs of its own would have more of the host's KVM to attack
        "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": spec.vcpus, "nested": False},
        # vhost-user devices read the guest's memory themselves, so it must be shared; without huge pages, as a small
        # VM's memory would be rounded up by 2 MiB at every use
        "memory": {"size": spec.memory_mib << 20, "shared": True, "thp": False},
        "disks": [{"path": str(spec.image), "readonly": True, "image_type": "Raw", "sparse": False}],
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    }
    return "vm.create", config | confinement(writable)


def restore(directory: Path) -> Request:
    """Make a VM, paused, of what `snapshot` has left in `directory`."""
    return "vm.restore", {"source_url": f"file://{directory}"}


def snapshot(directory: Path) -> Request:
    """Write the paused VM to the empty `directory`: `memory-ranges`, `config.json`, `state.json`."""
    return "vm.snapshot", {"destination_url": f"file://{directory}"}


def add_vsock(socket: Path) -> Request:
    """Plug in a vsock device: a connection of the guest to the host's port N arrives at `<socket>_N`."""
    return "vm.add-vsock", {"cid": GUEST_CID, "socket": str(socket)}


def add_share(share: Share) -> Request:
    """Plug in a virtio-fs share, served by whoever listens at its socket."""
    return "vm.add-fs", {"tag": share.tag, "socket": str(share.socket), "num_queues": 1, "queue_size": 1024}
