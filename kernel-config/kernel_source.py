"""The kernel source: Debian's tarball, or what KERNEL_SOURCE names; what tells it from others, and unpacking it."""

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from kernel_cache import sha256_of
from kernel_process import die_with_parent

DEFAULT = Path("/usr/src/linux-source-6.12.tar.xz")

# Two thirds of a source are drivers and architectures that this kernel has no use for; their Kconfig files stay.
NOT_UNPACKED = [
    "*/arch/[ac-s]*/*.[cdhS]*", "*/Documentation/*.[rst]*", "*/tools/perf", "*/tools/testing", "*/samples/*.[ch]",
    "*/drivers/gpu/*.[ch]", "*/drivers/infiniband/*.[ch]", "*/drivers/media/*.[ch]", "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]", "*/drivers/staging/*.[ch]", "*/drivers/usb/*.[ch]", "*/sound/*.c",
]  # fmt: skip


class SourceError(Exception):
    """There is no usable kernel source; the message says what to do."""


def locate(environ: Mapping[str, str]) -> Path:
    """Return the tarball or tree to build from. Raises SourceError."""
    named = environ.get("KERNEL_SOURCE")
    path = Path(named).absolute() if named else DEFAULT
    if path.is_file() or (path / "Kbuild").is_file():
        return path
    if named:
        raise SourceError(f"KERNEL_SOURCE={named} is neither a kernel source tree nor a tarball of one")
    raise SourceError(f"{path} is missing: apt-get install linux-source-6.12, or name a source in KERNEL_SOURCE")


def identity(source: Path) -> dict[str, object]:
    """Return what tells this source from others: of a tarball its content, of a tree every file's size and time."""
    if source.is_file():
        return {"file": source.name, "size": source.stat().st_size, "sha256": sha256_of(source)}
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if name != ".git")
        for path in (Path(folder, name) for name in sorted(files)):
            status = path.lstat()
            digest.update(f"{path.relative_to(source)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return {"tree": source.name, "sha256": digest.hexdigest()}


def unpack(source: Path, scratch: Path) -> Path:
    """Return the tree to build from: the source itself if it is one, else unpacked in `scratch`. Raises SourceError."""
    if source.is_dir():
        if (source / ".config").exists():
            raise SourceError(f"{source} has been built in: run make mrproper there, or name a clean tree")
        return source
    tree = scratch / "source"
    tree.mkdir()
    command = ["tar", "--extract", f"--file={source}", f"--directory={tree}", "--strip-components=1", "--no-same-owner"]
    command += ["--wildcards", *(f"--exclude={pattern}" for pattern in NOT_UNPACKED)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        preexec_fn=die_with_parent,  # safe: the program has one thread
    )  # fmt: skip
    if done.returncode != 0 or not (tree / "Kbuild").is_file():
        last_words = done.stderr.strip().splitlines()[-3:]
        raise SourceError(f"{source} cannot be unpacked as a kernel source: {' '.join(last_words)}")
    return tree
