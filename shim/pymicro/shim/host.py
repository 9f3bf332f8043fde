"""Facts about this host, for shim and pymicroctl: what accelerates a VM, which programs, devices and files there are.

Each function looks once and returns frozen data; whatever is missing is a HostMissing that names the remedy.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct
from pymicro.shim import early
from pymicro.shim.config import Settings
from pymicro.shim.errors import HostMissing
from pymicro.shim.tsc import tsc_khz as tsc_khz  # noqa: PLC0414  # one of the facts that this module offers

Accel = Literal["kvm", "tcg"]

CPUINFO = "/proc/cpuinfo"
KVM = "/dev/kvm"
VHOST_VSOCK = "/dev/vhost-vsock"
# ioctl numbers and the one API version there ever was: linux/kvm.h
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_API_VERSION = 12

VIRTIOFSD_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
"""Where distributions put virtiofsd, the Rust one first: Debian 13, Arch, and QEMU 7.2's C one of Debian 12."""
VHOST_VSOCK_PLACES = ("/usr/libexec/vhost-device-vsock", "/opt/pymicro/bin/vhost-device-vsock")


class Virtiofsd(Struct, frozen=True):
    """A virtiofsd program: the words to start it with, and whose command line it understands."""

    command: tuple[str, ...]
    flavour: Literal["rust", "c"]


class VhostVsock(Struct, frozen=True):
    """What carries a VM's vsock: the program vhost-device-vsock, or the kernel's device where `program` is None."""

    program: str | None


def why_not_kvm(cpuinfo: str = CPUINFO, device: str = KVM) -> str | None:
    """Return why this host cannot run stock kernels under KVM, None where it can.

    A device that opens proves nothing: a pagetable VM (PVM) has a KVM that creates VMs, in which only paravirtualised
    kernels run; others spin for ever. So the CPU must say that it virtualises.
    """
    if not {"vmx", "svm"} & _cpu_flags(cpuinfo):
        return "the CPU has neither vmx nor svm (switch virtualisation on in the firmware, or nested virtualisation on)"
    try:
        kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"there is no {device} (load the module: modprobe kvm_intel or kvm_amd)"
    except OSError as error:
        return f"cannot open {device}: {error.strerror}"
    try:
        return _why_kvm_refuses(kvm, device)
    finally:
        os.close(kvm)


def _why_kvm_refuses(kvm: int, device: str) -> str | None:
    import fcntl

    try:
        if (version := fcntl.ioctl(kvm, _KVM_GET_API_VERSION)) != _KVM_API_VERSION:
            return f"{device} answers API version {version}, not {_KVM_API_VERSION}"
        os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"{device} creates no VM: {error.strerror}"
    return None


def _cpu_flags(cpuinfo: str) -> set[str]:
    with suppress(OSError), Path(cpuinfo).open(encoding="ascii", errors="replace") as lines:
        for line in lines:  # the first CPU's; a big host has megabytes of them
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def choose_accel(wanted: Literal["auto", "kvm", "tcg"], cpuinfo: str = CPUINFO, device: str = KVM) -> Accel:
    """Return what `vm.accel` comes to on this host; a fall-back to emulation is logged as a warning.

    Raises HostMissing where "kvm" is demanded and not to be had.
    """
    if wanted == "tcg":
        return "tcg"
    why = why_not_kvm(cpuinfo, device)
    if why is None:
        return "kvm"
    if wanted == "kvm":
        raise HostMissing(f'vm.accel = "kvm", but KVM is not usable: {why}; or set vm.accel = "auto" to emulate')
    early.warning(
        __name__,
        f'KVM is not usable: {why}; the VM is emulated, and slow. vm.accel = "tcg" silences this warning',
    )
    return "tcg"


def _executable(path: str) -> bool:
    return os.access(path, os.X_OK) and Path(path).is_file()


def on_path(name: str, directories: Sequence[str] | None = None) -> str | None:
    """Find a program on PATH (or in `directories`) like shutil.which, whose import costs more than the search."""
    for directory in os.get_exec_path() if directories is None else directories:
        if _executable(candidate := f"{directory}/{name}"):
            return candidate
    return None


def find_qemu(settings: Settings) -> str:
    """Return QEMU's absolute path. Raises HostMissing."""
    qemu = settings.paths.qemu
    if found := _program(qemu):
        return found
    raise HostMissing(f"QEMU is missing: no program {qemu} (paths.qemu); install it: apt install qemu-system-x86")


def find_cloud_hypervisor(settings: Settings) -> str:
    """Return Cloud Hypervisor's absolute path. Raises HostMissing."""
    program = settings.paths.cloud_hypervisor
    if found := _program(program):
        return found
    raise HostMissing(
        f"Cloud Hypervisor is missing: no program {program} (paths.cloud_hypervisor); install the static binary of a"
        ' release of Cloud Hypervisor, or set vm.hypervisor = "qemu"'
    )


def _program(name: str) -> str | None:
    """Return the absolute path of a program that the settings name by its path, or by a name to look up on PATH."""
    if "/" not in name:
        return on_path(name)
    return name if name.startswith("/") and _executable(name) else None


def find_virtiofsd(settings: Settings) -> Virtiofsd:
    """Return the virtiofsd to use, the Rust one where there is a choice. Raises HostMissing."""
    if path := settings.paths.virtiofsd:
        if not _executable(path):
            raise HostMissing(f"there is no program {path} (paths.virtiofsd); correct the path, or drop it to search")
        return Virtiofsd((path,), _flavour(path))
    candidates = [path for path in (on_path("virtiofsd"), *VIRTIOFSD_PLACES) if path and _executable(path)]
    if not candidates:
        raise HostMissing(
            "virtiofsd is missing: not on PATH nor at "
            + ", ".join(VIRTIOFSD_PLACES)
            + "; install it: apt install virtiofsd"
            " (Debian 12: qemu-system-common), or set paths.virtiofsd"
        )
    found = [Virtiofsd((path,), _flavour(path)) for path in candidates]
    return next((each for each in found if each.flavour == "rust"), found[0])


def _flavour(path: str) -> Literal["rust", "c"]:
    """Tell QEMU's C program by where QEMU 7.2 and older install it; asking the program costs a start of it."""
    return "c" if "/qemu/" in os.path.realpath(path) else "rust"


def find_vhost_vsock(settings: Settings, device: str = VHOST_VSOCK) -> VhostVsock:
    """Return what carries vsock: the kernel where it can, else the settings' program, else one that is found.

    Raises HostMissing.
    """
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return VhostVsock(_vhost_device_vsock(settings, f"cannot open {device} ({error.strerror})"))
    return VhostVsock(None)


def _vhost_device_vsock(settings: Settings, why: str) -> str:
    """Return the program's path. Raises HostMissing, with `why` it is needed."""
    if path := settings.paths.vhost_device_vsock:
        if not _executable(path):
            raise HostMissing(f"{why}, and there is no program {path} (paths.vhost_device_vsock); correct the path")
        return path
    for program in (on_path("vhost-device-vsock"), *VHOST_VSOCK_PLACES):
        if program and _executable(program):
            return program
    raise HostMissing(
        f"VMs can have no vsock: {why}, and there is no vhost-device-vsock; load the module: modprobe vhost_vsock,"
        " or install vhost-device-vsock and set paths.vhost_device_vsock"
    )


def guest_files(settings: Settings) -> tuple[Path, Path]:
    """Return the guest's kernel and image, without links: an upgrade moves those while pods start (ctl/install.py).

    Raises HostMissing that says how to make the one that is not there.
    """
    kernel, image = Path(settings.paths.kernel), Path(settings.paths.image)
    for what, path, key, target in (
        ("kernel", kernel, "paths.kernel", "make kernel"),
        ("image", image, "paths.image", "make rootfs"),
    ):
        if not os.access(path, os.R_OK) or not path.is_file():
            raise HostMissing(
                f"the guest {what} {path} ({key}) is missing or cannot be read: build it with `{target}`,"
                " install everything with `make install`, or correct the path"
            )
    return kernel.resolve(), image.resolve()


class Manifest(Struct, frozen=True):
    """What the build says of a kernel or image: `path` is the manifest's own. `release` is a kernel's version, `crun`
    that of an image's crun, "" where it does not say.
    """

    path: Path
    sha256: str
    release: str = ""
    crun: str = ""


def find_manifest(artifact: Path) -> Manifest | None:
    """Return the manifest beside a kernel or image: the JSON file whose "file" is its name, whatever it is called."""
    import json

    for path in sorted(artifact.parent.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_bytes())
            if content["file"] == artifact.name:
                said = (str(content.get(name, "")) for name in ("release", "crun"))
                return Manifest(path, str(content["sha256"]), *said)
    return None


def verify_artifact(path: Path) -> str | None:
    """Compare a file with its manifest; return what is wrong, None if nothing is (or there is no manifest).

    Reads the whole file: for pymicroctl, and for the shim only after a boot that failed.
    """
    import hashlib

    manifest = find_manifest(path)
    if manifest is None:
        return None
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    if sha256 != manifest.sha256:
        return (
            f"{path} is corrupt: its sha256 is {sha256[:16]}..., but {manifest.path} says {manifest.sha256[:16]}...;"
            " build it anew"
        )
    return None


_V1_CONTROLLERS = frozenset(
    (
        "blkio",
        "cpu",
        "cpuacct",
        "cpuset",
        "devices",
        "freezer",
        "hugetlb",
        "memory",
        "net_cls",
        "net_prio",
        "pids",
        "rdma",
    )
)


class Cgroups(Struct, frozen=True):
    """The host's cgroup mode and where its hierarchies are mounted: controller (v2: "") -> directory."""

    mode: Literal["v1", "v2"]
    mounts: dict[str, str]


def cgroup_mode(mounts: str = "/proc/mounts") -> Cgroups:
    """Return how cgroups are mounted. "v1" as soon as any v1 controller is (hybrid hosts): that is what tools read."""
    v1: dict[str, str] = {}
    v2: dict[str, str] = {}
    for line in Path(mounts).read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, point, kind, options, *_ = line.split(" ")
        if kind == "cgroup2":
            v2.setdefault("", point)
        elif kind == "cgroup":
            names = [word for word in options.split(",") if word in _V1_CONTROLLERS]
            v1.update(dict.fromkeys(names, point))
    return Cgroups("v1", v1 | v2) if v1 else Cgroups("v2", v2)
