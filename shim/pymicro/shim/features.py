"""What this runtime can do with a spec, in the form of the runtime spec's Features (features.md there).

containerd's CRI asks for it at its start and tells the kubelet what it may use: a claim must be true of all three, the
guest's crun, the guest's kernel, and what `guestspec` lets through. tests/integration compares it with crun's own.
"""

from typing import Any

TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

# Left out: idmap (virtiofsd serves the host's own ids), and shared, slave and the like: there is no mount to exchange
# events with, the host's are in another kernel.
_MOUNT_OPTIONS = """
    async atime bind copy-symlink defaults dev diratime dirsync exec mand noatime nodev nodiratime noexec nomand
    norelatime nostrictatime nosuid private ratime rbind rdev rdirsync relatime remount rexec rmand rnoatime
    rnodev rnodiratime rnoexec rnomand rnorelatime rnosuid rnostrictatime ro rprivate rrelatime rro rrw rsuid
    rstrictatime rsync rasync rdiratime runbindable rw strictatime suid sync tmpcopyup unbindable
"""

# all that the guest's kernel has (capability.h), as its CAP_LAST_CAP says
_CAPABILITIES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""

# without NOTIFY: an agent on the host cannot answer for another kernel
_SECCOMP_ACTIONS = ("ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "TRACE", "TRAP")
_SECCOMP_FLAGS = [f"SECCOMP_FILTER_FLAG_{name}" for name in ("LOG", "SPEC_ALLOW", "TSYNC")]

FEATURES: dict[str, Any] = {  # JSON
    "ociVersionMin": "1.0.0",
    "ociVersionMax": "1.2.0",
    "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
    "mountOptions": sorted(_MOUNT_OPTIONS.split()),
    "linux": {
        "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
        "capabilities": [f"CAP_{name}" for name in _CAPABILITIES.split()],
        # the guest's, which has no systemd; where the host's cgroup lies may be said in systemd's form all the same
        "cgroup": {"v1": False, "v2": True, "systemd": False, "systemdUser": False, "rdma": False},
        "seccomp": {
            "enabled": True,
            "actions": [f"SCMP_ACT_{name}" for name in _SECCOMP_ACTIONS],
            "operators": [f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")],
            "knownFlags": _SECCOMP_FLAGS,
            "supportedFlags": _SECCOMP_FLAGS,
        },
        "apparmor": {"enabled": False},
        "selinux": {"enabled": False},
        "intelRdt": {"enabled": False},
        "mountExtensions": {"idmap": {"enabled": False}},
        "netDevices": {"enabled": False},
    },
    "potentiallyUnsafeConfigAnnotations": ["io.pymicro."],
}
