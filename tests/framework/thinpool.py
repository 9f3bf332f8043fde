"""A thin pool of the device mapper in two sparse files, as the devmapper snapshotter wants one."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

DATA_MIB, META_MIB = 512, 16
_SECTORS_PER_MIB = 2048
ENVIRONMENT = {} if Path("/run/udev/control").exists() else {"DM_DISABLE_UDEV": "1"}
"""What `dmsetup` needs, also where a daemon runs it: without udev it makes the nodes in /dev/mapper itself."""
_BLOCK_SECTORS = 128
_LOW_WATER_BLOCKS = 128


def missing() -> str:
    """Return what a thin pool lacks on this host, "" for nothing."""
    if not Path("/dev/mapper/control").exists():
        return "this host's kernel has no device mapper (/dev/mapper/control)"
    if "thin-pool" not in _run("dmsetup", "targets"):
        return "this host's device mapper has no thin pools (dm-thin-pool)"
    needed = ("dmsetup", "losetup", "blkdiscard")
    return "".join(f"there is no {program}" for program in needed if shutil.which(program) is None)


@contextmanager
def thin_pool(directory: Path, name: str) -> Iterator[None]:
    """Make the pool /dev/mapper/`name` of two files in `directory`; afterwards it and all its devices are removed."""
    with ExitStack() as stack:
        devices = []
        for part, size in (("meta", META_MIB), ("data", DATA_MIB)):
            file = directory / f"{name}.{part}"
            with file.open("wb") as handle:
                handle.truncate(size << 20)
            stack.callback(file.unlink)
            devices.append(_run("losetup", "--find", "--show", str(file)).strip())
            stack.callback(_run, "losetup", "--detach", devices[-1])
        meta, data = devices
        pool = f"thin-pool {meta} {data} {_BLOCK_SECTORS} {_LOW_WATER_BLOCKS}"
        _run("dmsetup", "create", name, "--table", f"0 {DATA_MIB * _SECTORS_PER_MIB} {pool}")
        stack.callback(_remove, name)
        yield


def _remove(name: str) -> None:
    found = [line.split()[0] for line in _run("dmsetup", "ls").splitlines()]
    for device in (*(each for each in found if each.startswith(f"{name}-")), name):
        _run("dmsetup", "remove", "--retry", device)


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}).stdout
