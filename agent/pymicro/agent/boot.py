"""What PID 1 does before it talks to anybody: mounts, cgroups, loopback, limits, and a warm page cache.

Nothing here depends on the pod, so a snapshot of the VM may be taken right after it.
"""

import posix

from pymicro.agent import cgroups, crun, files, mounts, network, syscalls

OPEN_FILES = 1048576
SYSCTLS = (
    ("/proc/sys/kernel/pid_max", "4194304"),
    ("/proc/sys/vm/max_map_count", "1048576"),
)
"""Where the kernel's defaults are lower than what systemd gives the hosts that containers are tested on."""


def prepare() -> None:
    """Make the VM ready for containers. Raises OSError."""
    posix.umask(0o022)
    mounts.mount_kernel_filesystems()
    cgroups.prepare()
    network.raise_loopback()
    # Containers inherit what their spec does not limit: the VM is the limit, as with a containerd run by systemd.
    syscalls.set_limit(syscalls.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
    for resource in (syscalls.RLIMIT_NPROC, syscalls.RLIMIT_CORE):
        syscalls.set_limit(resource, syscalls.RLIM_INFINITY, syscalls.RLIM_INFINITY)
    for path, value in SYSCTLS:
        files.write_text(path, value)
    files.make_directories(crun.STATE_DIRECTORY)
