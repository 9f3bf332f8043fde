"""What a container's spec becomes in the guest: the specs are those that ctr, Docker and the CRI write."""

import copy
from typing import Any

import pytest
from pymicro.shim.errors import InvalidRequest, ShimError, Unsupported
from pymicro.shim.guestspec import AGENT_PID, Bind, GuestPlan, build, guest_process, guest_resources
from pymicro.shim.hooks import Hook

SHARE = "/run/pymicro/share/c1"
Spec = dict[str, Any]


def ctr_spec() -> Spec:
    """What `ctr run` of containerd 1.6 writes for a container without flags."""
    capabilities = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_RAW", "CAP_KILL"]
    tmpfs = ["nosuid", "strictatime", "mode=755", "size=65536k"]
    return {
        "ociVersion": "1.0.2-dev",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": tmpfs},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": tmpfs},
        ],
        "linux": {
            "resources": {
                "devices": [
                    {"allow": False, "access": "rwm"},
                    {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                    {"allow": True, "type": "c", "major": 136, "access": "rwm"},
                ]
            },
            "cgroupsPath": "/default/c1",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/sys"],
        },
    }


def cri_spec(sandbox_pid: int = 500) -> Spec:
    """A container of a pod, as the CRI plugin writes it: namespaces of the sandbox, binds of kubelet's files."""
    spec = ctr_spec()
    pod = "/var/lib/kubelet/pods/1234"
    spec["linux"]["namespaces"] = [
        {"type": "pid"},
        {"type": "ipc", "path": f"/proc/{sandbox_pid}/ns/ipc"},
        {"type": "uts", "path": f"/proc/{sandbox_pid}/ns/uts"},
        {"type": "mount"},
        {"type": "network", "path": f"/proc/{sandbox_pid}/ns/net"},
        {"type": "cgroup"},
    ]
    spec["mounts"] += [
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["relatime", "ro"]},
        {
            "destination": "/etc/hosts",
            "type": "bind",
            "source": f"{pod}/etc-hosts",
            "options": ["rbind", "rprivate", "rw"],
        },
        {"destination": "/cfg", "type": "bind", "source": f"{pod}/cfg", "options": ["rbind", "rslave", "ro"]},
    ]
    spec["process"] |= {"apparmorProfile": "cri-containerd.apparmor.d", "oomScoreAdj": 999, "selinuxLabel": "a:b:c"}
    spec["linux"]["cgroupsPath"] = "kubepods-besteffort-pod1234.slice:cri-containerd:c1"
    spec["annotations"] = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s1"}
    return spec


def plan_of(spec: Spec, guest_pids: dict[int, int] | None = None) -> GuestPlan:
    before = copy.deepcopy(spec)
    try:
        return build(spec, "c1", guest_pids)
    finally:
        assert spec == before, "the caller's spec was changed"


def refused(spec: Spec, kind: type[ShimError] = Unsupported, guest_pids: dict[int, int] | None = None) -> str:
    with pytest.raises(kind) as caught:
        plan_of(spec, guest_pids)
    return str(caught.value)


def with_namespace(kind: str, path: str) -> Spec:
    spec = ctr_spec()
    spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != kind]
    spec["linux"]["namespaces"].append({"type": kind, "path": path})
    return spec


def namespaces(plan: GuestPlan) -> dict[str, str | None]:
    return {each["type"]: each.get("path") for each in plan.spec["linux"]["namespaces"]}


def with_mount(**mount: Any) -> Spec:  # JSON of any kind
    spec = ctr_spec()
    spec["mounts"] = [mount]
    return spec


# --- the plain case


def test_a_plain_spec_keeps_all_that_describes_the_process() -> None:
    spec = ctr_spec()
    plan = plan_of(spec)
    assert plan.spec["process"] == spec["process"]
    assert plan.spec["mounts"] == spec["mounts"]
    assert plan.spec["linux"]["maskedPaths"] == spec["linux"]["maskedPaths"]
    assert plan.spec["linux"]["readonlyPaths"] == spec["linux"]["readonlyPaths"]
    assert plan.spec["linux"]["resources"] == spec["linux"]["resources"]
    assert (plan.binds, plan.dropped, plan.terminal) == ((), (), False)


def test_the_root_is_in_the_share_and_the_hosts_path_in_the_plan() -> None:
    spec = ctr_spec()
    spec["root"]["readonly"] = True
    plan = plan_of(spec)
    assert plan.spec["root"] == {"path": f"{SHARE}/rootfs", "readonly": True}
    assert plan.root_path == "rootfs"


def test_cgroups_of_the_guest_have_a_path_of_their_own() -> None:
    assert plan_of(ctr_spec()).spec["linux"]["cgroupsPath"] == "/pymicro/c1"
    assert plan_of(cri_spec(), {500: AGENT_PID}).spec["linux"]["cgroupsPath"] == "/pymicro/c1"


@pytest.mark.parametrize("key", ["hostname", "domainname"])
def test_names_are_kept(key: str) -> None:
    assert plan_of(ctr_spec() | {key: "box"}).spec[key] == "box"


def test_a_terminal_is_told() -> None:
    spec = ctr_spec()
    spec["process"]["terminal"] = True
    assert plan_of(spec).terminal


def test_what_crun_applies_in_the_guest_is_kept() -> None:
    spec = ctr_spec()
    kept = {
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []},
        "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
        "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
    }
    spec["linux"] |= kept
    spec["linux"]["namespaces"].append({"type": "user"})
    plan = plan_of(spec)
    assert {key: plan.spec["linux"][key] for key in kept} == kept
    assert namespaces(plan)["user"] is None


def test_sections_of_other_systems_and_of_the_host_are_left_out() -> None:
    spec = ctr_spec() | {"windows": {}, "vm": {"kernel": {"path": "/x"}}, "solaris": {}}
    spec["linux"] |= {"intelRdt": {"closID": "x"}, "mountLabel": "a:b", "rootfsPropagation": "rshared"}
    plan = plan_of(spec)
    assert not {"windows", "vm", "solaris"} & plan.spec.keys()
    assert not {"intelRdt", "mountLabel", "rootfsPropagation"} & plan.spec["linux"].keys()


def test_profiles_of_the_host_are_left_out_of_execs_too() -> None:
    process = {"args": ["sh"], "apparmorProfile": "x", "selinuxLabel": "y", "oomScoreAdj": 5}
    assert guest_process(process) == {"args": ["sh"], "oomScoreAdj": 5}


# --- namespaces


def test_the_network_is_the_guests_own_and_a_cgroup_namespace_is_added() -> None:
    found = namespaces(plan_of(ctr_spec()))
    assert found["network"] == "/proc/1/ns/net"
    assert found["cgroup"] is None
    assert {"pid", "ipc", "uts", "mount"} <= found.keys()


@pytest.mark.parametrize("path", ["/var/run/netns/cni-1", "/run/netns/x", ""])
def test_a_named_network_namespace_is_the_pods(path: str) -> None:
    assert namespaces(plan_of(with_namespace("network", path)))["network"] == "/proc/1/ns/net"


@pytest.mark.parametrize(
    ("kind", "option"), [("network", "--net-host"), ("pid", "hostPID"), ("ipc", "hostIPC"), ("uts", "--uts host")]
)
def test_a_namespace_of_the_host_is_refused_with_the_option_that_asks_for_it(kind: str, option: str) -> None:
    spec = ctr_spec()
    spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != kind]
    assert f"no {kind} namespace" in refused(spec)
    assert option in refused(spec)


def test_a_container_that_asks_for_the_hosts_processes_may_get_its_vms() -> None:
    spec = ctr_spec()
    spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != "pid"]
    found = namespaces(build(spec, "c1", host_pid="guest"))
    assert "pid" not in found
    assert found["network"] == "/proc/1/ns/net"
    spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != "ipc"]
    with pytest.raises(Unsupported, match="no ipc namespace"):
        build(spec, "c1", host_pid="guest")


def test_a_spec_without_a_linux_section_is_refused() -> None:
    spec = ctr_spec()
    del spec["linux"]
    assert "no network namespace" in refused(spec)


def test_namespaces_of_the_sandbox_are_the_agents() -> None:
    plan = plan_of(cri_spec(), {500: AGENT_PID})
    assert namespaces(plan) == {
        "pid": None,
        "ipc": "/proc/1/ns/ipc",
        "uts": "/proc/1/ns/uts",
        "mount": None,
        "network": "/proc/1/ns/net",
        "cgroup": None,
    }


def test_the_pid_namespace_of_a_container_of_the_pod_can_be_joined() -> None:
    plan = plan_of(with_namespace("pid", "/proc/77/ns/pid"), {77: 12})
    assert namespaces(plan)["pid"] == "/proc/12/ns/pid"


def test_one_pid_namespace_for_a_whole_pod_is_refused() -> None:
    assert "shareProcessNamespace" in refused(with_namespace("pid", "/proc/500/ns/pid"), guest_pids={500: AGENT_PID})


@pytest.mark.parametrize("kind", ["network", "pid", "ipc", "uts", "mount", "cgroup", "user"])
def test_a_namespace_of_a_strange_process_is_refused(kind: str) -> None:
    assert "only among its own containers" in refused(with_namespace(kind, "/proc/77/ns/x"), guest_pids={500: 1})


@pytest.mark.parametrize(
    "path", ["/run/ipcns/x", "/proc/self/ns/ipc", "/proc/500/ns/../../1/ns/ipc", "/proc/500/ns/ipc/"]
)
def test_a_namespace_by_any_other_path_is_refused(path: str) -> None:
    assert "cannot join the ipc namespace" in refused(with_namespace("ipc", path), guest_pids={500: 1})


def test_a_user_namespace_cannot_be_joined() -> None:
    assert "user namespace" in refused(with_namespace("user", "/proc/500/ns/user"), guest_pids={500: 1})


# --- mounts


def test_binds_come_through_the_share() -> None:
    plan = plan_of(cri_spec(), {500: AGENT_PID})
    pod = "/var/lib/kubelet/pods/1234"
    assert plan.binds == (Bind(f"{pod}/etc-hosts", "m0", False), Bind(f"{pod}/cfg", "m1", True))
    by_destination = {mount["destination"]: mount for mount in plan.spec["mounts"]}
    assert by_destination["/etc/hosts"] == {
        "destination": "/etc/hosts",
        "type": "bind",
        "source": f"{SHARE}/mounts/m0",
        "options": ["rbind", "rprivate", "rw"],
    }
    assert by_destination["/cfg"]["source"] == f"{SHARE}/mounts/m1"
    assert by_destination["/cfg"]["options"] == ["rbind", "ro"]
    assert by_destination["/sys/fs/cgroup"]["type"] == "cgroup"


def test_the_order_of_mounts_is_kept() -> None:
    spec = cri_spec()
    plan = plan_of(spec, {500: AGENT_PID})
    assert [each["destination"] for each in plan.spec["mounts"]] == [each["destination"] for each in spec["mounts"]]


@pytest.mark.parametrize(
    ("mount", "options"),
    [
        ({"type": "bind", "options": ["rbind"]}, ["rbind"]),
        ({"type": "bind", "options": ["bind", "ro"]}, ["bind", "ro"]),
        ({"type": "none", "options": ["rbind", "rw"]}, ["rbind", "rw"]),
        ({"options": ["bind"]}, ["bind"]),
        ({"type": "bind"}, ["rbind"]),
        ({"type": "bind", "options": None}, ["rbind"]),
        ({"type": "bind", "options": ["rbind", "rshared"]}, ["rbind"]),
    ],
)
def test_all_ways_to_write_a_bind(mount: dict[str, Any], options: list[str]) -> None:
    plan = plan_of(with_mount(destination="/data", source="/srv/data/", **mount))
    assert [bind.source for bind in plan.binds] == ["/srv/data"]
    assert plan.spec["mounts"][0]["options"] == options
    assert plan.spec["mounts"][0]["type"] == "bind"


@pytest.mark.parametrize(
    ("options", "read_only", "recursively"),
    [
        (["ro"], True, False),
        (["rro"], True, True),
        (["ro", "rw"], False, False),
        (["rro", "ro"], True, False),
        (["rw", "ro"], True, False),
        ([], False, False),
    ],
)
def test_the_last_word_decides_whether_a_bind_is_read_only(
    options: list[str], read_only: bool, recursively: bool
) -> None:
    plan = plan_of(with_mount(destination="/d", type="bind", source="/s", options=["rbind", *options]))
    assert (plan.binds[0].read_only, plan.binds[0].recursively) == (read_only, recursively)


@pytest.mark.parametrize("of_the_cri", [True, False])
def test_containers_of_the_cri_have_the_shared_memory_of_their_pod_which_is_the_guests(of_the_cri: bool) -> None:
    annotations = {"io.kubernetes.cri.container-type": "container"} if of_the_cri else {}
    shm = {"destination": "/dev/shm", "type": "bind", "source": "/run/sandboxes/p/shm", "options": ["rbind", "ro"]}
    plan = plan_of({**with_mount(**shm), "annotations": annotations})
    assert [bind.source for bind in plan.binds] == ([] if of_the_cri else ["/run/sandboxes/p/shm"])
    if of_the_cri:
        assert plan.spec["mounts"][0] == {**shm, "source": "/dev/shm"}


@pytest.mark.parametrize(("source", "kind"), [("/sys/fs/cgroup", "cgroup"), ("/proc", "proc"), ("/sys/", "sysfs")])
def test_a_bind_of_a_kernel_file_system_means_the_guests(source: str, kind: str) -> None:
    plan = plan_of(with_mount(destination="/x", type="bind", source=source, options=["rbind", "ro", "rslave"]))
    assert plan.spec["mounts"] == [{"destination": "/x", "type": kind, "source": kind, "options": ["ro"]}]
    assert plan.binds == ()


@pytest.mark.parametrize("source", ["/dev", "/dev/null", "/dev/net/tun"])
def test_a_bind_of_devices_means_the_guests(source: str) -> None:
    plan = plan_of(with_mount(destination=source, type="bind", source=source, options=["rbind"]))
    assert plan.spec["mounts"][0]["source"] == source
    assert plan.binds == ()


def test_a_directory_below_dev_is_shared_like_any_other() -> None:
    assert plan_of(with_mount(destination="/x", type="bind", source="/dev/shm/x")).binds[0].source == "/dev/shm/x"


def test_a_file_system_of_the_host_is_refused_with_the_way_round() -> None:
    spec = with_mount(destination="/nfs", type="nfs", source="server:/x", options=[])
    assert "at /nfs is of type 'nfs'" in refused(spec)
    assert "bind mount" in refused(spec)


# --- resources and devices


def test_limits_are_kept_and_what_names_the_host_is_not() -> None:
    resources = {
        "memory": {"limit": 1 << 29, "reservation": 1 << 28, "swap": 1 << 30, "kernel": -1, "swappiness": 60},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "6-7", "mems": "1", "realtimePeriod": 1000},
        "pids": {"limit": 100},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        "blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]},
        "network": {"classID": 1},
        "rdma": {"mlx": {}},
        "unified": {"memory.high": "1000000"},
        "devices": None,
    }
    assert guest_resources(resources) == {
        "memory": {"limit": 1 << 29, "reservation": 1 << 28},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000},
        "pids": {"limit": 100},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        "unified": {"memory.high": "1000000"},
    }


def test_only_devices_that_the_guest_has_are_kept_and_the_others_named() -> None:
    spec = ctr_spec()
    fuse = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
    spec["linux"]["devices"] = [fuse, {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]
    plan = plan_of(spec)
    assert plan.spec["linux"]["devices"] == [fuse]
    assert plan.dropped == ("device /dev/sda",)


def test_what_needs_the_hosts_kernel_is_refused() -> None:
    spec = ctr_spec()
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/run/agent.sock"}
    assert "listenerPath" in refused(spec)
    spec = ctr_spec()
    spec["linux"]["netDevices"] = {"eth1": {}}
    assert "netDevices" in refused(spec)


# --- hooks and annotations


def test_hooks_of_the_host_are_returned_and_only_those_of_the_guest_passed_on() -> None:
    hooks = {
        name: [{"path": f"/bin/{name}", "args": ["a"]}]
        for name in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    }
    plan = plan_of(ctr_spec() | {"hooks": hooks})
    assert plan.spec["hooks"] == {name: hooks[name] for name in ("createContainer", "startContainer")}
    assert plan.hooks.prestart == (Hook("/bin/prestart", ("a",)),)
    assert plan.hooks.create_runtime == (Hook("/bin/createRuntime", ("a",)),)
    assert plan.hooks.poststart == (Hook("/bin/poststart", ("a",)),)
    assert plan.hooks.poststop == (Hook("/bin/poststop", ("a",)),)


def test_hooks_of_the_guest_get_a_time_out_where_they_have_none() -> None:
    hooks = {"createContainer": [{"path": "/a", "timeout": None}, {"path": "/b", "timeout": 3}]}
    spec = build(ctr_spec() | {"hooks": hooks}, "c1", hook_limit=1.5).spec
    assert spec["hooks"]["createContainer"] == [{"path": "/a", "timeout": 2}, {"path": "/b", "timeout": 3}]


def test_a_hook_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="createContainer hook #0 is wrong"):
        plan_of(ctr_spec() | {"hooks": {"createContainer": [{"path": "here"}]}})


def test_without_hooks_there_is_no_hooks_section() -> None:
    assert "hooks" not in plan_of(ctr_spec() | {"hooks": {"poststop": [{"path": "/x"}]}}).spec


def test_annotations_that_steer_crun_are_left_out() -> None:
    steering = {"run.oci.handler": "krun", "module.wasm.image/variant": "compat"}
    assert plan_of(ctr_spec() | {"annotations": {"a": "b", **steering}}).spec["annotations"] == {"a": "b"}


# --- specs that make no sense


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"root": None}, "no root"),
        ({"root": {}}, "no root.path"),
        ({"process": None}, "no process"),
        ({"process": {"args": []}}, "no process.args"),
        ({"process": []}, "process is no object"),
        ({"mounts": {}}, None),
        ({"mounts": "x"}, "mounts is no list of objects"),
        ({"mounts": ["x"]}, "mounts is no list of objects"),
        ({"mounts": [{"type": "proc"}]}, "a mount without a destination"),
        ({"mounts": [{"destination": "/x", "type": "bind"}]}, "bind mount at /x has no source"),
        ({"linux": 3}, "linux is no object"),
        ({"ociVersion": None}, "ociVersion None"),
        ({"ociVersion": "2.0.0"}, "ociVersion '2.0.0'"),
    ],
)
def test_what_is_wrong_with_a_spec_is_named(change: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        assert plan_of(ctr_spec() | change).spec["mounts"] == []
    else:
        assert expected in refused(ctr_spec() | change, InvalidRequest)


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "1.1.0", "1.2.1"])
def test_the_versions_of_the_runtime_spec_that_are_in_use(version: str) -> None:
    assert plan_of(ctr_spec() | {"ociVersion": version}).spec["ociVersion"] == version
