"""What `ctr run`'s options ask for takes effect inside: process, privileges, mounts, limits, namespaces."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.framework.ctr import RUNC, Container, Ctr
from tests.framework.pod import GROUP, Pod
from tests.framework.sandbox import HELPERS, Sandbox
from tests.framework.specs import Spec, run_arguments

CGROUP = ("--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro")
MIB = 1 << 20


def bind(source: Path, target: str, options: str = "rbind:rw") -> list[str]:
    return ["--mount", f"type=bind,src={source},dst={target},options={options}"]


# -- the process -------------------------------------------------------------------------------------------------------


def test_environment_and_directory(pod: Pod) -> None:
    options = ["--env", "ONE=1", "--env", "TWO=a b=c", "--cwd", "/home/app"]

    done = pod.same_as_runc("sh", "-c", 'echo "$ONE-$TWO-$PATH"; pwd', options=options)

    assert done.stdout.startswith("1-a b=c-/usr/local/sbin:")
    assert done.stdout.endswith("/home/app\n")


def test_a_directory_that_is_missing_is_made(pod: Pod) -> None:
    assert pod.same_as_runc("pwd", options=["--cwd", "/new/directory"]).stdout == "/new/directory\n"


@pytest.mark.parametrize("user", ["app", "1000", "app:staff", "1234:50", "65534:65534"])
def test_user_and_groups(pod: Pod, user: str) -> None:
    assert pod.same_as_runc("id", options=["--user", user]).stdout.startswith("uid=")


def test_host_name(pod: Pod) -> None:
    done = pod.same_as_runc("sh", "-c", "hostname; cat /proc/sys/kernel/hostname", options=["--hostname", "web"])

    assert done.stdout == "web\nweb\n"


def test_without_a_host_name_it_is_the_containers_id(pod: Pod) -> None:
    container_id = pod.new_id()

    assert pod.run("hostname", container_id=container_id).stdout in {f"{container_id}\n", f"{pod.id}\n"}


def test_limits_of_the_process_are_those_of_the_spec(pod: Pod) -> None:
    assert pod.same_as_runc("sh", "-c", "ulimit -n; ulimit -Hn").stdout == "1024\n1024\n"


# -- privileges --------------------------------------------------------------------------------------------------------

STATUS = ("grep", "-E", "^(Uid|Gid|Cap...|NoNewPrivs|Seccomp):", "/proc/self/status")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--cap-drop", "CAP_CHOWN", "--cap-drop", "CAP_NET_RAW"],
        ["--cap-add", "CAP_SYS_ADMIN"],
        ["--allow-new-privs"],
        ["--seccomp"],
        ["--user", "app"],
        ["--user", "app", "--cap-add", "CAP_NET_ADMIN"],
    ],
    ids=" ".join,
)
def test_privileges_are_those_that_runc_gives(pod: Pod, options: list[str]) -> None:
    assert "NoNewPrivs" in pod.same_as_runc(*STATUS, options=options).stdout


def test_a_dropped_capability_is_missed(pod: Pod) -> None:
    command = ("sh", "-c", "touch /file; chown 1:1 /file")

    assert pod.run(*command).returncode == 0
    done = pod.run(*command, options=["--cap-drop", "CAP_CHOWN"])
    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr


def test_the_default_seccomp_profile_refuses_a_system_call(pod: Pod) -> None:
    done = pod.run("unshare", "-U", "true", options=["--seccomp"])

    assert "Operation not permitted" in done.stderr
    assert pod.run("unshare", "-U", "true").returncode == 0


def test_a_seccomp_profile_of_ones_own(pod: Pod, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    rules = [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))

    done = pod.same_as_runc("mkdir", "/directory", options=["--seccomp", "--seccomp-profile", str(profile)])

    assert done.stderr == "mkdir: can't create directory '/directory': No space left on device\n"


@pytest.mark.parametrize(
    "script",
    [
        "cat /proc/keys | wc -c",
        "cat /proc/timer_list | wc -c",
        "ls /sys/firmware | wc -l",
        "ls /proc/acpi | wc -l",
        "echo x >/proc/sys/kernel/hostname",
        "touch /sys/file 2>&1 | grep -c 'Read-only\\|denied\\|permitted'",
        "mknod /dev/sda b 8 0 && head -c 1 /dev/sda",
    ],
)
def test_what_the_kernel_would_show_or_let_change_is_masked_as_with_runc(pod: Pod, script: str) -> None:
    pod.same_as_runc("sh", "-c", script)


def test_the_container_cannot_pull_the_guests_emergency_brake(pod: Pod) -> None:
    assert "Read-only file system" in pod.run("sh", "-c", "echo b >/proc/sysrq-trigger").stderr
    assert pod.first.status == "RUNNING"


def test_the_container_cannot_reach_the_guests_own_devices(pod: Pod) -> None:
    """Its disk with the root filesystem, and its console."""
    script = "mknod /tmp/vda b 254 0; head -c 1 /tmp/vda; mknod /tmp/console c 4 64; head -c 1 /tmp/console"

    done = pod.run("sh", "-c", script)

    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("Operation not permitted") == 2


def test_devices_are_those_that_runc_makes(pod: Pod) -> None:
    script = "ls -l /dev | grep ^c | tr -s ' ' | cut -d ' ' -f 1,3-6,10; head -c 4 /dev/zero | wc -c; echo >/dev/null"

    assert "root 1, 3 null" in pod.same_as_runc("sh", "-c", script).stdout


def test_a_privileged_container_may_do_what_the_guests_kernel_allows(pod: Pod) -> None:
    script = (
        "mkdir -p /tmp/m && mount -t tmpfs none /tmp/m && echo mounted; echo 7 >/proc/sys/kernel/printk && echo set"
    )

    done = pod.run("sh", "-c", script, options=["--privileged"])

    assert done.stdout == "mounted\nset\n", done.stderr


# -- mounts ------------------------------------------------------------------------------------------------------------


@pytest.mark.every_containerd
def test_a_directory_of_the_host_is_read_and_written(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("from outside\n")

    done = pod.run(
        "sh", "-c", "cat /mnt/outside; echo from inside >/mnt/inside; chown 7:8 /mnt/inside; chmod 751 /mnt/inside",
        options=bind(tmp_path, "/mnt"),
    )  # fmt: skip

    assert done.stdout == "from outside\n", done.stderr
    status = (tmp_path / "inside").stat()
    assert (tmp_path / "inside").read_text() == "from inside\n"
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (7, 8, 0o751)


def test_what_the_host_writes_later_is_seen(pod: Pod, tmp_path: Path) -> None:
    container = pod.start("sleep", "100000", options=bind(tmp_path, "/mnt"))
    assert container.exec("ls", "/mnt").stdout == ""

    (tmp_path / "later").write_text("news\n")

    assert container.exec("cat", "/mnt/later").stdout == "news\n"


def test_a_single_file_of_the_host(pod: Pod, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one\n")

    done = pod.run("sh", "-c", "cat /etc/mine; echo two >>/etc/mine; ls /etc", options=bind(file, "/etc/mine"))

    assert done.stdout.split() == ["one", "group", "mine", "passwd"]
    assert file.read_text() == "one\ntwo\n"


def test_a_read_only_mount_cannot_be_written(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept\n")

    done = pod.same_as_runc("sh", "-c", "echo x >/mnt/file; rm /mnt/file", options=bind(tmp_path, "/mnt", "rbind:ro"))

    assert done.stderr.count("Read-only file system") == 2
    assert (tmp_path / "file").read_text() == "kept\n"


def test_a_mount_over_a_file_of_the_image_and_one_in_another(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "group").write_text("mine:x:9:\n")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/file").write_text("inner\n")
    options = [
        *bind(tmp_path / "group", "/etc/group", "rbind:ro"),
        "--mount", "type=tmpfs,src=tmpfs,dst=/outer,options=size=1m",
        *bind(tmp_path / "directory", "/outer/inner"),
    ]  # fmt: skip

    done = pod.same_as_runc(
        "sh", "-c", "cat /etc/group /outer/inner/file; touch /outer/x && ls /outer", options=options
    )

    assert done.stdout == "mine:x:9:\ninner\ninner\nx\n"


def test_a_source_that_does_not_exist_is_named(pod: Pod, tmp_path: Path) -> None:
    done = pod.run("true", options=bind(tmp_path / "nosuch", "/mnt"))

    assert done.returncode == 1
    assert str(tmp_path / "nosuch") in done.stderr


def test_mounts_below_a_directory_come_along(ctr: Ctr, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "pymicro-test", below], check=True)
    try:
        (below / "file").write_text("deep\n")
        done = ctr.run("sh", "-c", "cat /mnt/below/file; echo up >/mnt/below/new", options=bind(tmp_path, "/mnt"))
        assert (done.stdout, done.stderr) == ("deep\n", "")
        assert (below / "new").read_text() == "up\n"
    finally:
        subprocess.run(["umount", below], check=True)


def test_a_tmpfs_has_the_size_and_mode_that_are_asked_for(pod: Pod) -> None:
    option = "type=tmpfs,src=tmpfs,dst=/scratch,options=size=2m:mode=1750:noexec"

    done = pod.same_as_runc(
        "sh", "-c", "stat -c %a /scratch; df -k /scratch | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2;"
        " cp /bin/busybox /scratch/ls; /scratch/ls",
        options=["--mount", option],
    )  # fmt: skip

    assert done.stdout == "1750\n2048\n"
    assert "Permission denied" in done.stderr


def test_the_kernels_file_systems_are_mounted(pod: Pod) -> None:
    script = (
        "grep -E ' /(proc|dev|dev/pts|dev/shm|dev/mqueue|sys|run) ' /proc/mounts | cut -d ' ' -f 2,3 | sort;"
        "touch /dev/shm/file /dev/mqueue/queue && ls /dev/shm /dev/mqueue"
    )

    assert "/dev/mqueue mqueue" in pod.same_as_runc("sh", "-c", script).stdout


def test_a_read_only_root(pod: Pod) -> None:
    done = pod.same_as_runc("sh", "-c", "touch /file; touch /dev/shm/file && echo written", options=["--read-only"])

    assert done.stderr == "touch: /file: Read-only file system\n"
    assert done.stdout == "written\n"


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_memory_limit_holds(pod: Pod) -> None:
    limit = ["--memory-limit", str(32 * MIB)]

    assert pod.run("cat", "/sys/fs/cgroup/memory.max", options=[*limit, *CGROUP]).stdout == f"{32 * MIB}\n"
    assert pod.run("dd", "if=/dev/zero", "of=/dev/null", "bs=16M", "count=1", options=limit).returncode == 0
    assert pod.run("dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1", options=limit).returncode == 137


def test_a_share_of_the_cpu(pod: Pod) -> None:
    shown = pod.run("cat", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu.weight", options=["--cpus", "0.5", *CGROUP])

    assert shown.stdout.splitlines()[0] == "50000 100000"
    less = pod.run("cat", "/sys/fs/cgroup/cpu.weight", options=["--cpu-shares", "2", *CGROUP])
    assert less.stdout == "1\n"


def test_a_container_sees_its_own_cgroup_alone(pod: Pod) -> None:
    done = pod.run("sh", "-c", "cat /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.procs | wc -l", options=CGROUP)

    assert done.stdout.startswith("0::/\n")
    assert int(done.stdout.split()[-1]) <= 4


@pytest.mark.every_containerd
def test_the_vm_is_as_large_as_the_limits_want(ctr: Ctr) -> None:
    options = ["--memory-limit", str(600 * MIB), "--cpus", "2"]

    done = ctr.run("sh", "-c", "nproc; grep MemTotal /proc/meminfo", options=options)

    cpus, _, kib, _ = done.stdout.split()
    assert int(cpus) == min(2, len(os.sched_getaffinity(0)))
    assert int(kib) << 10 > 600 * MIB


def test_a_vm_is_no_larger_than_need_be(pod: Pod) -> None:
    done = pod.run("sh", "-c", "nproc; grep MemTotal /proc/meminfo")

    cpus, _, kib, _ = done.stdout.split()
    assert int(cpus) == 1
    assert int(kib) << 10 < 256 * MIB


# -- namespaces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "file"), [("pid", "pid"), ("uts", "uts"), ("ipc", "ipc"), ("network", "net")])
def test_a_namespace_of_another_container_in_the_vm_can_be_joined(pod: Pod, kind: str, file: str) -> None:
    joined = f"{kind}:/proc/{pod.first.pid}/ns/{file}"

    with_it = pod.run("readlink", f"/proc/self/ns/{file}", options=["--with-ns", joined]).stdout

    assert with_it == pod.first.exec("readlink", f"/proc/self/ns/{file}").stdout


@pytest.mark.parametrize("file", ["pid", "uts", "ipc", "mnt", "cgroup"])
def test_containers_in_one_vm_have_namespaces_of_their_own(pod: Pod, file: str) -> None:
    mine = pod.run("readlink", f"/proc/self/ns/{file}").stdout

    assert mine != pod.first.exec("readlink", f"/proc/self/ns/{file}").stdout


@pytest.mark.parametrize(("kind", "file"), [("pid", "pid"), ("uts", "uts"), ("ipc", "ipc"), ("network", "net")])
def test_a_namespace_of_the_host_cannot_be_joined(pod: Pod, kind: str, file: str) -> None:
    options = ["--with-ns", f"{kind}:/proc/{os.getpid()}/ns/{file}"]
    assert pod.run("true", options=options, runtime=RUNC).returncode == 0

    done = pod.run("true", options=options)

    assert done.returncode == 1
    assert "a VM can share namespaces only among its own containers" in done.stderr


@pytest.mark.usefixtures("only_our_runtime")
def test_a_pod_is_as_expendable_as_its_most_expendable_container(ctr: Ctr, tmp_path: Path) -> None:
    """Under Kubernetes the pause container may hardly be ended, and what it is there for perhaps first of all."""

    def start(score: int, **annotations: str) -> Container:
        def change(spec: Spec) -> None:
            spec["process"]["oomScoreAdj"] = score
            spec["annotations"] = annotations

        arguments = run_arguments(ctr, tmp_path, "sleep", "100000", change=change, options=("--detach", "--null-io"))
        ctr(*arguments)
        return Container(ctr, arguments[-1])

    def scores() -> list[int]:
        return [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (pause.pid, *vm)]

    pause = start(100)
    vm = [pid for kind in HELPERS for pid in Sandbox(ctr.containerd, pause.id).pids(kind)]
    assert scores() == [100] * (1 + len(vm))
    start(700, **{GROUP: pause.id})
    assert scores() == [100] + [700] * len(vm)
    start(5, **{GROUP: pause.id})
    assert scores() == [100] + [700] * len(vm)
