"""The mounts of the VM itself: kernel file systems at boot, the host's share at set-up. crun does the containers'."""

import errno
import posix

from pymicro.agent import files, syscalls
from pymicro.agent.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID
from pymicro.wire.messages import GUEST_SHARE, SHARE_TAG

_PLAIN = MS_NOSUID | MS_NODEV | MS_NOEXEC

KERNEL_MOUNTS = (
    # target, type, flags, options
    ("/proc", "proc", _PLAIN, ""),
    ("/sys", "sysfs", _PLAIN, ""),
    ("/dev", "devtmpfs", MS_NOSUID, "mode=755"),
    ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,gid=5,ptmxmode=666"),
    ("/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),  # noqa: S108  # the guest's own, not a shared directory
    ("/dev/mqueue", "mqueue", _PLAIN, ""),
    ("/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"),
    ("/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),  # noqa: S108  # the same
    ("/sys/fs/cgroup", "cgroup2", _PLAIN, "nsdelegate,memory_recursiveprot"),
)
DEVICE_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
)
MACHINE_ID = "/run/machine-id"


def mount_kernel_filesystems() -> None:
    """Mount what every program expects. Raises OSError."""
    for target, fstype, flags, options in KERNEL_MOUNTS:
        if target.startswith("/dev/"):
            files.make_directories(target)
        try:
            syscalls.mount(fstype, target, fstype, flags, options)
        except OSError as error:
            # The kernel has mounted /dev before us if it was built to; mqueue is an option of the kernel.
            if error.errno not in (errno.EBUSY, errno.ENODEV):
                raise
    for source, link in DEVICE_LINKS:
        try:  # noqa: SIM105  # contextlib is not imported
            posix.symlink(source, link)
        except FileExistsError:
            pass


def mount_share() -> bool:
    """Mount the host's virtio-fs share at GUEST_SHARE; False as long as the guest has not found the device.

    Raises OSError for any other failure.
    """
    files.make_directories(GUEST_SHARE)
    try:
        syscalls.mount(SHARE_TAG, GUEST_SHARE, "virtiofs")
    except OSError as error:
        if error.errno == errno.EINVAL:  # how virtio-fs says that no device has this tag
            return False
        raise
    return True


def release(path: str) -> None:
    """Forget what the share shows at `path`, a mount of the host's, so that the host can unmount it. Raises OSError.

    Its driver has mounted that as a file system of its own, and what it remembers of files keeps them open on the host.
    """
    try:
        syscalls.unmount(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # nobody has looked at it, or it is gone
            raise
    files.write_text("/proc/sys/vm/drop_caches", "2")  # 2 is for directory entries and inodes (admin-guide/sysctl/vm)


def bind_machine_id(machine_id: str) -> None:
    """Let /etc/machine-id, on a read-only file system, show this sandbox's id. Raises OSError."""
    files.write_text(MACHINE_ID, f"{machine_id}\n")
    posix.chmod(MACHINE_ID, 0o444)
    syscalls.mount(MACHINE_ID, "/etc/machine-id", "", syscalls.MS_BIND)
