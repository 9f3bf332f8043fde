"""What PID 1 does before it talks to anybody: mounts, cgroups, loopback, limits, and a warm page cache.

Nothing here depends on the pod, so a snapshot of the VM may be taken right after it.
"""

import posix

from pymicro.agent import cgroups, crun, files, mounts, network, syscalls
from pymicro.agent.concurrency import log
from pymicro.wire.messages import READY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.agent.reaper import Reaper

OPEN_FILES = 1048576
SYSCTLS = (
    ("/proc/sys/kernel/pid_max", "4194304"),
    ("/proc/sys/vm/max_map_count", "1048576"),
)
"""Where the kernel's defaults are lower than what systemd gives the hosts that containers are tested on."""


def warm_up(reaper: "Reaper") -> None:
    """Read crun and its libraries into the page cache while nothing else is to do, and tell a snapshot's maker.

    Called while the VM has no vsock yet: this saves the first container of every clone about 100 ms.
    """
    crun.Crun(reaper, crun.STATE_DIRECTORY).run("--version")
    log(READY)


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
