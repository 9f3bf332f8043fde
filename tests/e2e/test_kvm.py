"""On a host with KVM: it runs the VMs, their vsock is the kernel's, no two have the same CID, an idle pod is small."""

import fcntl
import os
import re
import socket
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from pymicro.shim import host, syscalls
from pymicro.shim.hypervisor import registry

from tests.bench import memory
from tests.framework.ctr import Container, Ctr
from tests.framework.kvmlab.lab import THE_LAB
from tests.framework.leftovers import Leftovers
from tests.framework.pod import Pod
from tests.framework.processes import all_processes
from tests.framework.resources import open_files
from tests.framework.sandbox import SHIM, Sandbox, eventually

SLEEP = ("sleep", "100000")
POD_MB, SHIM_MB = 110, 25
"""What an idle pod may take under KVM, and its shim of that."""

VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
"""linux/vhost.h"""


@pytest.fixture(autouse=True)
def a_host_with_kvm(request: pytest.FixtureRequest, only_our_runtime: None) -> None:
    """Skip where VMs are emulated. In the lab that would be a failure."""
    why = host.why_not_kvm()
    if why is None and not os.path.exists(host.VHOST_VSOCK):
        why = f"there is no {host.VHOST_VSOCK}"
    assert why is None or THE_LAB not in os.environ, f"this is no host with KVM and vhost-vsock: {why}"
    if why:
        pytest.skip(f"{why}; `make kvm-test` runs this test")


pytestmark = pytest.mark.kvm


def command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


@pytest.mark.usefixtures("only_qemu")
def test_a_vm_is_run_by_kvm_and_its_vsock_by_the_kernel(pod: Pod) -> None:
    qemu = Sandbox(pod.containerd, pod.id).find("qemu")
    assert qemu

    words = command(qemu)
    assert words[words.index("-accel") + 1] == "kvm"
    assert words[words.index("-cpu") + 1] == "host"
    assert {"/dev/kvm", "/dev/vhost-vsock"} <= set(open_files(qemu))
    assert [p for p in all_processes().values() if "vhost-device-vsock" in p.command] == []


def test_a_pods_processes_are_in_cgroups_v2_which_is_all_there_is(pod: Pod) -> None:
    assert "cgroup" not in {line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}

    qemu = Sandbox(pod.containerd, pod.id).find("qemu")

    (line,) = Path(f"/proc/{qemu}/cgroup").read_text().splitlines()
    group = Path(f"/sys/fs/cgroup/{line.removeprefix('0::')}")
    assert str(qemu) in (group / "cgroup.procs").read_text().split()
    assert (group / "cgroup.kill").exists()


def test_pymicroctl_check_finds_all_ok(ctr: Ctr, request: pytest.FixtureRequest) -> None:
    """But for what Debian 12's kernel cannot do, if the VMM is Cloud Hypervisor: confine it by Landlock."""
    of_qemu = request.config.getoption("--hypervisor") == "qemu"
    lacking = int(not of_qemu and syscalls.landlock_abi() < registry.LANDLOCK_ABI)
    vsock = r"/dev/vhost-vsock \(kernel\)" if of_qemu else "Cloud Hypervisor's own"

    done = subprocess.run(
        [ctr.containerd.bin / "pymicroctl", "check"],
        env={
            **os.environ,
            **ctr.containerd.client_environment,
            "PATH": f"{ctr.containerd.bin}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )

    not_ok = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert len(not_ok) == lacking, done.stdout
    assert all(line.startswith("degraded ") and "not confined" in line for line in not_ok)
    assert re.search(r"^ok +acceleration +KVM$", done.stdout, re.MULTILINE)
    assert re.search(rf"^ok +vsock +{vsock}$", done.stdout, re.MULTILINE)
    assert re.search(r"^ok +cgroups +v2", done.stdout, re.MULTILINE)
    assert done.returncode == lacking


# -- CIDs --------------------------------------------------------------------------------------------------------------


def cids() -> list[int]:
    """Return the ports that shims listen at, which are their guests' CIDs."""
    listing = subprocess.run(["ss", "--vsock", "-Hln"], capture_output=True, text=True, check=True).stdout
    ports = (int(line.split()[4].rpartition(":")[2]) for line in listing.splitlines())
    return sorted(port for port in ports if port >= 0x10000)


def can_be_used(cid: int) -> bool:
    """Tell whether a new VM could have this CID, and its shim the port."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener, open(host.VHOST_VSOCK, "rb+", 0) as device:
        try:
            listener.bind((socket.VMADDR_CID_ANY, cid))
            fcntl.ioctl(device, VHOST_VSOCK_SET_GUEST_CID, struct.pack("Q", cid))
        except OSError:
            return False
    return True


def started_at_once(ctr: Ctr, count: int) -> list[Container]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: ctr.start(*SLEEP, name=f"c{number}"), range(count)))


def forgotten(container: Container) -> bool:
    return container.status == "GONE"


@pytest.mark.usefixtures("only_qemu")
def test_10_vms_started_at_once_have_10_cids_which_are_free_when_their_shims_are_killed(
    ctr: Ctr, leftovers: Leftovers
) -> None:
    containers = started_at_once(ctr, 10)
    taken = cids()
    assert len(set(taken)) == 10
    assert not any(map(can_be_used, taken))

    for (
        container
    ) in containers:  # one by one: containerd gives `delete` five seconds, ten at once are slower in the lab
        Sandbox(ctr.containerd, container.id).kill(SHIM)
        eventually(partial(forgotten, container), "containerd has forgotten the task", 5)
        container.remove()
    leftovers.check()
    assert cids() == []
    assert all(map(can_be_used, taken))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_an_idle_pod_takes_110_mb_at_most_and_its_shim_25(ctr: Ctr, capsys: pytest.CaptureFixture[str]) -> None:
    """Where huge pages are given to whoever has room for them, as Debian's kernel does."""
    assert "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()

    (usage,) = memory.usage(ctr.containerd, [1], print)

    with capsys.disabled():
        print("\nan idle pod, PSS in MB:", ", ".join(f"{what} {size:.1f}" for what, size in usage.pss.items()))
    assert usage.pss["all"] <= POD_MB
    assert usage.pss["shim"] <= SHIM_MB
