"""`pymicroctl check`: what this host has, what it lacks, and what to do. One function per line of the output."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pymicro.ctl import containerd
from pymicro.shim import config, host, settings_file, syscalls
from pymicro.shim.config import Settings
from pymicro.shim.errors import HostMissing, ShimError
from pymicro.shim.hypervisor import registry
from pymicro.shim.hypervisor.cloud_hypervisor import wake

State = Literal["ok", "degraded", "missing"]
EXIT_STATUS: dict[State, int] = {"ok": 0, "degraded": 1, "missing": 2}

OLDEST_QEMU = (7, 2)
"""Debian 12's: the oldest that we test with."""
VM_OVERHEAD_MIB = 64
"""What a VM's host processes take beside the guest's memory."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `detail` says what is there, or what is not and how to get it."""

    name: str
    state: State
    detail: str


def run(config_path: str | None, *, as_json: bool) -> int:
    """Print the findings; return the exit status that says which was the worst."""
    findings = list(check(config_path))
    worst = max((each.state for each in findings), key=EXIT_STATUS.__getitem__)
    if as_json:
        print(json.dumps({"state": worst, "checks": [asdict(each) for each in findings]}, indent=2))
    else:
        width = max(len(each.name) for each in findings)
        for each in findings:
            print(f"{each.state:8}  {each.name:{width}}  {each.detail}")
    return EXIT_STATUS[worst]


def check(config_path: str | None = None) -> Iterator[Finding]:
    """Yield the findings. Settings that cannot be read are a finding, and the defaults then serve for the others."""
    settings = Settings()
    try:
        settings = config.load(config_path)
    except ShimError as error:
        yield Finding("settings", "missing", str(error))
    else:
        yield Finding("settings", "ok", _settings_source(config_path))
    for name, look in CHECKS.items():
        try:
            yield look(settings)
        except ShimError as error:
            yield Finding(name, "missing", str(error))


def _settings_source(config_path: str | None) -> str:
    named = config_path or os.environ.get(settings_file.ENVIRONMENT)
    if named or Path(settings_file.DEFAULT).exists():
        return named or settings_file.DEFAULT
    return f"the defaults; there is no {settings_file.DEFAULT}"


def _user(_settings: Settings) -> Finding:
    if os.geteuid() == 0:
        return Finding("user", "ok", "root")
    return Finding(
        "user", "degraded", "not root: devices and containerd may look missing; run pymicroctl check as root"
    )


def _acceleration(settings: Settings) -> Finding:
    if settings.vm.hypervisor == "cloud-hypervisor":
        return Finding("acceleration", "ok", registry.accel(settings).upper())
    wanted, why = settings.vm.accel, host.why_not_kvm()
    if wanted == "tcg":
        return Finding("acceleration", "degraded", 'vm.accel = "tcg" in the settings: VMs are emulated, and slow')
    if why is None:
        return Finding("acceleration", "ok", "KVM")
    if wanted == "kvm":
        return Finding("acceleration", "missing", f'vm.accel = "kvm", but KVM is not usable: {why}')
    return Finding("acceleration", "degraded", f"VMs are emulated, and slow, because KVM is not usable: {why}")


def _vmm(settings: Settings) -> Finding:
    return _cloud_hypervisor(settings) if settings.vm.hypervisor == "cloud-hypervisor" else _qemu(settings)


def _cloud_hypervisor(settings: Settings) -> Finding:
    name = "Cloud Hypervisor"
    try:
        path = host.find_cloud_hypervisor(settings)
    except HostMissing as error:
        return Finding(name, "missing", str(error))
    version = _version_of([path, "--version"])
    if version is None:
        return Finding(name, "missing", f"{path} does not tell its version: is it Cloud Hypervisor?")
    text = ".".join(map(str, version))
    if version < wake.OLDEST:
        return Finding(name, "missing", f"{path} is version {text}; {wake.OLDEST[0]} or newer is needed")
    if (abi := syscalls.landlock_abi()) < registry.LANDLOCK_ABI:
        why = (
            f"the kernel offers version {abi} of Landlock, {registry.LANDLOCK_ABI} is needed (Linux 6.2, lsm=landlock)"
        )
        return Finding(name, "degraded", f"{text}, {path}, not confined to its VM's files: {why}")
    return Finding(name, "ok", f"{text}, {path}, confined by Landlock")


def _qemu(settings: Settings) -> Finding:
    path = host.find_qemu(settings)
    version = _version_of([path, "-version"])
    if version is None:
        return Finding("QEMU", "missing", f"{path} does not tell its version: is it QEMU? Install qemu-system-x86")
    text = ".".join(map(str, version))
    if version < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        return Finding(
            "QEMU", "missing", f"{path} is version {text}; {oldest} or newer is needed: upgrade qemu-system-x86"
        )
    return Finding("QEMU", "ok", f"{text}, {path}")


def _version_of(command: list[str]) -> tuple[int, ...] | None:
    """Return the first version number that a program prints about itself."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", run.stdout)
    return tuple(int(part) for part in match.groups() if part is not None) if match and run.returncode == 0 else None


def _virtiofsd(settings: Settings) -> Finding:
    found = host.find_virtiofsd(settings)
    kind = "the Rust one" if found.flavour == "rust" else "QEMU's older one, in C"
    return Finding("virtiofsd", "ok", f"{' '.join(found.command)} ({kind})")


def _vsock(settings: Settings) -> Finding:
    if settings.vm.hypervisor == "cloud-hypervisor":
        return Finding("vsock", "ok", "Cloud Hypervisor's own")
    found = host.find_vhost_vsock(settings)
    return Finding("vsock", "ok", f"{found.program} (user space)" if found.program else f"{host.VHOST_VSOCK} (kernel)")


def _kernel(settings: Settings) -> Finding:
    return _artifact("kernel", Path(settings.paths.kernel), "make kernel")


def _image(settings: Settings) -> Finding:
    return _artifact("image", Path(settings.paths.image), "make rootfs")


def _artifact(name: str, path: Path, target: str) -> Finding:
    remedy = f"build it with `{target}` and install it with `make install`, or correct paths.{name}"
    try:
        size = path.stat().st_size
    except OSError as error:
        return Finding(name, "missing", f"{path}: {error.strerror}; {remedy}")
    if wrong := host.verify_artifact(path):
        return Finding(name, "missing", f"{wrong}; {remedy}")
    if host.find_manifest(path) is None:
        return Finding(name, "degraded", f"{path} has no manifest beside it to compare with; {remedy}")
    return Finding(name, "ok", f"{path}, {size / (1 << 20):.1f} MiB, sha256 as in its manifest")


def _containerd(_settings: Settings) -> Finding:
    address = containerd.address()
    daemon = containerd.running(address)
    if daemon is None:
        start = "start it (systemctl start containerd), or set CONTAINERD_ADDRESS to its socket"
        if program := host.on_path("containerd"):
            return Finding("containerd", "degraded", f"{program} is there, but nobody answers at {address}: {start}")
        return Finding("containerd", "missing", "not on PATH and not running: apt install containerd")
    version = _version_of([daemon.program, "--version"])
    return Finding(
        "containerd", "ok", f"{'.'.join(map(str, version or ())) or 'unknown version'}, pid {daemon.pid}, {address}"
    )


def _shim(_settings: Settings) -> Finding:
    """Look for the shim where containerd does: on its own PATH, which is not always ours."""
    daemon = containerd.running(containerd.address())
    if found := host.on_path(containerd.SHIM, daemon.path if daemon else None):
        return Finding("shim", "ok", found)
    whose = f"the PATH of containerd (pid {daemon.pid})" if daemon else "PATH"
    return Finding("shim", "missing", f"{containerd.SHIM} is not on {whose}: `make install` puts it in /usr/local/bin")


def _cgroups(_settings: Settings) -> Finding:
    found = host.cgroup_mode()
    if found.mode == "v2" and found.mounts:
        controllers = set(Path(found.mounts[""], "cgroup.controllers").read_text(encoding="ascii").split())
    else:
        controllers = set(found.mounts)
    if lacking := [name for name in ("cpu", "memory", "pids") if name not in controllers]:
        return Finding(
            "cgroups", "degraded", f"{found.mode}, without {', '.join(lacking)}: mount them for limits on a pod"
        )
    return Finding("cgroups", "ok", found.mode)


def _overlayfs(_settings: Settings) -> Finding:
    filesystems = Path("/proc/filesystems").read_text(encoding="ascii").split()
    if "overlay" in filesystems:
        return Finding("overlayfs", "ok", "the default snapshotter works")
    return Finding("overlayfs", "degraded", "unknown to the kernel: modprobe overlay, or use --snapshotter native")


def _tun(_settings: Settings, device: str = "/dev/net/tun") -> Finding:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding("network", "degraded", f"VMs can have no network: {device}: {error.strerror}; modprobe tun")
    return Finding("network", "ok", device)


def _memory(settings: Settings, meminfo: str = "/proc/meminfo") -> Finding:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path(meminfo).read_text(encoding="ascii"), re.MULTILINE)
    available = int(match[1]) >> 10 if match else 0
    needed = settings.vm.memory_mib + VM_OVERHEAD_MIB
    if available < needed:
        return Finding("memory", "degraded", f"{available} MiB available, one VM may take {needed} MiB: free some")
    return Finding(
        "memory", "ok", f"{available} MiB available, enough for {available // needed} VMs of the default size"
    )


CHECKS: dict[str, Callable[[Settings], Finding]] = {
    "user": _user,
    "acceleration": _acceleration,
    "QEMU": _vmm,
    "virtiofsd": _virtiofsd,
    "vsock": _vsock,
    "kernel": _kernel,
    "image": _image,
    "containerd": _containerd,
    "shim": _shim,
    "cgroups": _cgroups,
    "overlayfs": _overlayfs,
    "network": _tun,
    "memory": _memory,
}
"""Name of a line and who writes it, in the order of the output."""
