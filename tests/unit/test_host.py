"""Facts about the host: what is there is found, what is not is an error with the remedy."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from pymicro.shim import host
from pymicro.shim.config import Paths, Settings
from pymicro.shim.errors import HostMissing

INTEL = "processor\t: 0\nmodel name\t: x\nflags\t\t: fpu vme vmx sse2\nprocessor\t: 1\n"
WITHOUT = "processor\t: 0\nflags\t\t: fpu vme sse2\nvmx flags\t: vnmi\n"


def program(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH is one empty directory and the usual places hold nothing."""
    directory = tmp_path / "path"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr(
        host, "VIRTIOFSD_PLACES", (str(tmp_path / "libexec/virtiofsd"), str(tmp_path / "qemu/virtiofsd"))
    )
    monkeypatch.setattr(host, "VHOST_VSOCK_PLACES", ())
    return directory


def settings(**paths: str) -> Settings:
    return Settings(paths=Paths(**paths))


# --- acceleration


def cpuinfo(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    return str(path)


def test_a_kvm_device_proves_nothing_without_the_cpu_flag(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pagetable VM has a /dev/kvm that even creates VMs, in which stock kernels hang."""
    assert host.choose_accel("auto", cpuinfo(tmp_path, WITHOUT), "/dev/null") == "tcg"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "neither vmx nor svm" in caplog.text


def test_without_a_kvm_device_vms_are_emulated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert host.choose_accel("auto", cpuinfo(tmp_path, INTEL), str(tmp_path / "kvm")) == "tcg"
    assert "modprobe" in caplog.text


def test_a_device_that_is_no_kvm_is_not_used(tmp_path: Path) -> None:
    assert "creates no VM" in str(host.why_not_kvm(cpuinfo(tmp_path, INTEL), "/dev/null"))


def test_kvm_is_used_where_it_creates_a_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {0xAE00: 12, 0xAE01: None}

    def ioctl(_fd: int, request: int, _argument: int = 0) -> int:
        answer = answers[request]
        return os.open("/dev/null", os.O_RDWR) if answer is None else answer

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    before = len(os.listdir("/proc/self/fd"))
    assert host.choose_accel("auto", cpuinfo(tmp_path, INTEL), "/dev/null") == "kvm"
    assert len(os.listdir("/proc/self/fd")) == before
    answers[0xAE00] = 11
    assert "API version 11" in str(host.why_not_kvm(cpuinfo(tmp_path, INTEL), "/dev/null"))


def test_forced_kvm_on_a_host_without_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(HostMissing, match=r'vm.accel = "kvm".*neither vmx nor svm.*set vm.accel = "auto"'):
        host.choose_accel("kvm", cpuinfo(tmp_path, WITHOUT))


def test_forced_emulation_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert host.choose_accel("tcg", cpuinfo(tmp_path, WITHOUT)) == "tcg"
    assert not caplog.records


# --- programs


def test_qemu_is_found_by_name_and_by_path(empty_path: Path) -> None:
    qemu = program(empty_path / "qemu-system-x86_64")
    assert host.find_qemu(settings()) == qemu
    assert host.find_qemu(settings(qemu=qemu)) == qemu


@pytest.mark.parametrize("name", ["qemu-system-x86_64", "/no/such/qemu", "some/qemu"])
def test_a_missing_qemu_names_setting_and_package(empty_path: Path, name: str) -> None:
    with pytest.raises(HostMissing, match=f"{name} \\(paths.qemu\\); install it: apt install qemu-system-x86"):
        host.find_qemu(settings(qemu=name))


def test_the_rust_virtiofsd_is_preferred_wherever_it_is(empty_path: Path, tmp_path: Path) -> None:
    old = program(tmp_path / "qemu/virtiofsd")
    assert host.find_virtiofsd(settings()) == host.Virtiofsd((old,), "c")
    new = program(tmp_path / "libexec/virtiofsd")
    assert host.find_virtiofsd(settings()) == host.Virtiofsd((new,), "rust")
    (empty_path / "virtiofsd").symlink_to(old)
    assert host.find_virtiofsd(settings()) == host.Virtiofsd((new,), "rust")


def test_a_link_to_the_old_virtiofsd_is_seen_through(empty_path: Path, tmp_path: Path) -> None:
    (empty_path / "virtiofsd").symlink_to(program(tmp_path / "qemu/virtiofsd"))
    assert host.find_virtiofsd(settings()).flavour == "c"


def test_the_virtiofsd_of_the_settings_is_taken_as_it_is(empty_path: Path, tmp_path: Path) -> None:
    program(tmp_path / "libexec/virtiofsd")
    mine = program(tmp_path / "mine")
    assert host.find_virtiofsd(settings(virtiofsd=mine)) == host.Virtiofsd((mine,), "rust")
    with pytest.raises(HostMissing, match=r"no program /no/such \(paths.virtiofsd\)"):
        host.find_virtiofsd(settings(virtiofsd="/no/such"))


def test_a_missing_virtiofsd_says_where_was_looked_and_what_to_install(empty_path: Path) -> None:
    with pytest.raises(HostMissing, match=r"libexec/virtiofsd.*apt install virtiofsd"):
        host.find_virtiofsd(settings())


def test_the_kernels_vsock_goes_before_a_program(empty_path: Path) -> None:
    program(empty_path / "vhost-device-vsock")
    assert host.find_vhost_vsock(settings(), "/dev/null").program is None


def test_without_the_kernels_vsock_a_program_is_found(empty_path: Path) -> None:
    found = program(empty_path / "vhost-device-vsock")
    assert host.find_vhost_vsock(settings(), "/no/such").program == found


def test_the_vsock_program_of_the_settings_serves_where_the_kernel_does_not(empty_path: Path, tmp_path: Path) -> None:
    program(empty_path / "vhost-device-vsock")
    mine = program(tmp_path / "mine")
    assert host.find_vhost_vsock(settings(vhost_device_vsock=mine), "/no/such").program == mine
    assert host.find_vhost_vsock(settings(vhost_device_vsock=mine), "/dev/null").program is None
    with pytest.raises(HostMissing, match=r"paths\.vhost_device_vsock"):
        host.find_vhost_vsock(settings(vhost_device_vsock="/no/such"), "/no/such")


def test_without_any_vsock_both_remedies_are_named(empty_path: Path) -> None:
    with pytest.raises(HostMissing, match=r"modprobe vhost_vsock, or install vhost-device-vsock"):
        host.find_vhost_vsock(settings(), "/no/such")


# --- kernel and image


@pytest.fixture
def guest(tmp_path: Path) -> Settings:
    (tmp_path / "vmlinux").write_bytes(b"kernel")
    (tmp_path / "image.erofs").write_bytes(b"image")
    return settings(kernel=str(tmp_path / "vmlinux"), image=str(tmp_path / "image.erofs"))


def test_kernel_and_image_are_found(guest: Settings, tmp_path: Path) -> None:
    assert host.guest_files(guest) == (tmp_path / "vmlinux", tmp_path / "image.erofs")


@pytest.mark.parametrize(("name", "remedy"), [("vmlinux", "make kernel"), ("image.erofs", "make rootfs")])
def test_a_missing_one_names_path_setting_and_remedy(guest: Settings, tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).unlink()
    with pytest.raises(HostMissing, match=f"{name} .paths.*{remedy}.*make install"):
        host.guest_files(guest)


def manifest(path: Path, content: bytes, **more: str) -> None:
    path.write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest(), **more}))


def test_a_file_that_matches_its_manifest_is_right(guest: Settings, tmp_path: Path) -> None:
    manifest(tmp_path / "manifest.json", b"kernel", file="vmlinux")
    assert host.verify_artifact(tmp_path / "vmlinux") is None


def test_a_corrupt_file_is_named_with_the_remedy(guest: Settings, tmp_path: Path) -> None:
    manifest(tmp_path / "manifest.json", b"another kernel", file="vmlinux")
    assert "vmlinux is corrupt: its sha256 is" in str(host.verify_artifact(tmp_path / "vmlinux"))
    (tmp_path / "vmlinux").unlink()
    assert "cannot read" in str(host.verify_artifact(tmp_path / "vmlinux"))


def test_files_in_one_directory_have_a_manifest_each(guest: Settings, tmp_path: Path) -> None:
    """As installed: /opt/pymicro/share holds both."""
    manifest(tmp_path / "image.json", b"broken", file="image.erofs")
    manifest(tmp_path / "kernel.json", b"kernel", file="vmlinux")
    assert host.verify_artifact(tmp_path / "vmlinux") is None
    assert "image.erofs is corrupt" in str(host.verify_artifact(tmp_path / "image.erofs"))


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"file": "vmlinux"}', '{"file": "image.erofs", "sha256": "x"}']
)
def test_without_a_manifest_that_names_the_file_nothing_is_said(
    guest: Settings, tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    assert host.find_manifest(tmp_path / "vmlinux") is None
    assert host.verify_artifact(tmp_path / "vmlinux") is None


# --- cgroups and the clock

UNIFIED = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"
HYBRID = (
    "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n"
    "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\ncgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n"
    "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
)


def test_cgroup_modes(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(UNIFIED)
    assert host.cgroup_mode(str(mounts)) == host.Cgroups("v2", {"": "/sys/fs/cgroup"})
    mounts.write_text(HYBRID)
    found = host.cgroup_mode(str(mounts))
    assert found.mode == "v1"
    assert found.mounts["cpuacct"] == found.mounts["cpu"] == "/sys/fs/cgroup/cpu,cpuacct"
    assert found.mounts["memory"] == "/sys/fs/cgroup/memory"


def test_the_time_stamp_counters_rate_is_the_same_every_time() -> None:
    rates = [host.tsc_khz() for _ in range(5)]
    assert min(rates) > 100_000
    assert max(rates) - min(rates) < min(rates) / 100


def test_where_memory_cannot_be_made_executable_the_cpus_clock_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise PermissionError

    monkeypatch.setattr("pymicro.shim.tsc._measure_tsc", refuse)
    assert host.tsc_khz(cpuinfo(tmp_path, "processor : 0\ncpu MHz\t\t: 2596.150\n")) == 2596150
    with pytest.raises(HostMissing, match="time-stamp counter"):
        host.tsc_khz(cpuinfo(tmp_path, "processor : 0\n"))
