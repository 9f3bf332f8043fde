"""pymicroctl on a host with a running containerd: what it finds, and which sandboxes it lists."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.framework.ctr import PYMICRO, Ctr
from tests.framework.sandbox import SHIM, Sandbox, eventually
from tests.framework.waiting import seconds

Completed = subprocess.CompletedProcess[str]

MISSING = 2
SLEEP = ("sleep", "100000")


def pymicroctl(ctr: Ctr, *arguments: str) -> Completed:
    """Run pymicroctl as somebody would who has sourced build/dev/env."""
    return subprocess.run(
        [ctr.containerd.bin / "pymicroctl", *arguments],
        env={**os.environ, **ctr.containerd.client_environment},
        capture_output=True,
        text=True,
        timeout=seconds(30),
        check=False,
    )


def findings(ctr: Ctr, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Return the exit status of `pymicroctl check` and its findings by name."""
    done = pymicroctl(ctr, "check", "--json", *arguments)
    report = json.loads(done.stdout)
    assert ["ok", "degraded", "missing"].index(report["state"]) == done.returncode
    return done.returncode, {each["name"]: each for each in report["checks"]}


def this_host_has_kvm() -> bool:
    return bool({"vmx", "svm"} & set(Path("/proc/cpuinfo").read_text().split()))


@pytest.mark.every_containerd
def test_check_finds_what_the_tests_run_with(ctr: Ctr) -> None:
    status, found = findings(ctr)

    lacking = {name for name, each in found.items() if each["state"] != "ok"}
    assert {"settings", "QEMU", "virtiofsd", "vsock", "containerd", "shim"} & lacking == set()
    assert ctr.containerd.version in found["containerd"]["detail"]
    assert found["shim"]["detail"].startswith(str(ctr.containerd.bin))
    assert status == (1 if lacking else 0)


def test_check_tells_a_host_without_kvm_from_one_that_has_it_and_says_what_is_used_instead(ctr: Ctr) -> None:
    """The other host is the one of test_kvm.py, where all is ok."""
    if this_host_has_kvm():
        pytest.skip("this host may have KVM")

    status, found = findings(ctr)

    assert (status, found["acceleration"]["state"]) == (1, "degraded")
    assert found["acceleration"]["detail"].startswith("VMs are emulated, and slow, because KVM is not usable: the CPU")
    assert "vmx" in found["acceleration"]["detail"]
    kernels = os.path.exists("/dev/vhost-vsock")
    assert found["vsock"]["detail"].endswith("(kernel)" if kernels else "vhost-device-vsock (user space)")
    hybrid = any(line.split()[2] == "cgroup" for line in Path("/proc/mounts").read_text().splitlines())
    assert found["cgroups"]["detail"].startswith("v1" if hybrid else "v2")


def test_check_names_all_that_is_missing_and_the_remedy(ctr: Ctr, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(
        '[paths]\nkernel = "/no/such/kernel"\nimage = "/no/such/image"\nqemu = "no-such-qemu"\n'
        'virtiofsd = "/no/such/virtiofsd"\n'
    )

    status, found = findings(ctr, "--config", str(settings))

    assert status == MISSING
    remedies = {"kernel": "make kernel", "image": "make rootfs", "QEMU": "apt install", "virtiofsd": "paths.virtiofsd"}
    for name, remedy in remedies.items():
        assert found[name]["state"] == "missing"
        assert remedy in found[name]["detail"]


def test_check_reads_the_settings_that_containerd_reads(ctr: Ctr) -> None:
    ctr.containerd.write_settings(vm={"memory_mb": 512})
    try:
        done = pymicroctl(ctr, "check")
    finally:
        ctr.containerd.write_settings()

    assert done.returncode == MISSING
    line = next(line for line in done.stdout.splitlines() if " settings " in line)
    assert line.startswith("missing")
    assert "did you mean memory_mib?" in line


def test_check_without_containerd(ctr: Ctr, tmp_path: Path) -> None:
    environment = {**os.environ, "CONTAINERD_ADDRESS": str(tmp_path / "none.sock")}
    done = subprocess.run(
        [ctr.containerd.bin / "pymicroctl", "check"], env=environment, capture_output=True, text=True, check=False
    )

    line = next(line for line in done.stdout.splitlines() if " containerd " in line)
    assert not line.startswith("ok")
    assert "none.sock" in line or "apt install containerd" in line


def test_ps_lists_a_running_sandbox_and_forgets_it(ctr: Ctr) -> None:
    if ctr.runtime != PYMICRO:
        pytest.skip("runc has no sandboxes")
    container = ctr.start(*SLEEP)
    sandbox = Sandbox(ctr.containerd, container.id)

    (row,) = (row for row in sandboxes(ctr) if row["sandbox"] == container.id)
    assert row["namespace"] == ctr.containerd.namespace
    assert row["condition"] == "running"
    assert row["containers"] == [container.id]
    assert (row["shim_pid"], row["vmm_pid"]) == (sandbox.find(SHIM), sandbox.find("qemu"))
    assert row["memory_mib"] == 256
    assert row["rss"] > 10 << 20
    assert 0 <= row["age_seconds"] < 60
    line = next(line for line in pymicroctl(ctr, "ps").stdout.splitlines() if container.id in line)
    assert str(row["vmm_pid"]) in line
    assert "256 MiB" in line

    container.remove()

    eventually(lambda: container.id not in pymicroctl(ctr, "ps").stdout, "the sandbox is not listed any more", 5)


def sandboxes(ctr: Ctr) -> list[dict[str, Any]]:  # JSON
    done = pymicroctl(ctr, "ps", "--json")
    assert done.returncode == 0
    return list(json.loads(done.stdout))


def test_ps_works_for_whom_there_is_nothing_to_list(ctr: Ctr) -> None:
    done = pymicroctl(ctr, "ps")

    assert done.returncode == 0
    assert done.stdout.startswith("SANDBOX")
