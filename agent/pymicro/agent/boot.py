"""What PID 1 does before it talks to anybody: mounts, cgroups, loopback, limits, and a warm page cache.

Nothing here depends on the pod, so a snapshot of the VM may be taken right after it.
"""

import posix
import time

from pymicro.agent import cgroups, crun, files, mounts, network, syscalls
from pymicro.agent.concurrency import log
from pymicro.wire.messages import READY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.agent.devices import Ports
    from pymicro.agent.reaper import Reaper

OPEN_FILES = 1048576
SYSCTLS = (
    ("/proc/sys/kernel/pid_max", "4194304"),
    ("/proc/sys/vm/max_map_count", "1048576"),
    ("/proc/sys/fs/nr_open", "1073741816"),  # the most that the kernel takes
)
"""Where the kernel's defaults are lower than what systemd gives the hosts that containers are tested on."""


CLOCK_SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
PROVISIONAL = ("jiffies", "refined-jiffies", "tsc-early")
"""The clocks that a kernel has until it has found its own, about a second after its start."""
SETTLE_LIMIT = 3.0
SETTLE_POLL = 0.05


def warm_up(reaper: "Reaper", ports: "Ports") -> None:
    """Do what every clone would do otherwise, while nothing else is to do, and tell a snapshot's maker.

    Called while the VM has no vsock yet. crun and its libraries are read into the page cache, which saves the first
    container of a clone about 100 ms.
    """
    crun.Crun(reaper, crun.STATE_DIRECTORY).run("--version")
    settle(ports)
    log(READY)


def settle(ports: "Ports") -> None:
    """Wait until the kernel has changed to its own clock, for which it stops the CPU and rewrites code, and look for
    devices as a clone will: that is most of what it would do from its first moment on.
    """
    deadline = time.monotonic() + SETTLE_LIMIT
    while files.read_text(CLOCK_SOURCE).strip() in PROVISIONAL and time.monotonic() < deadline:
        time.sleep(SETTLE_POLL)
    ports.rehearse()
    ports.look_again()


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
