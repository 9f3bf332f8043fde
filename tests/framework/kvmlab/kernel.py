"""The lab's kernel: Debian's own, with the modules that a host of containers and VMs loads, and an initramfs of it.

The kernel of the machine at hand would not do: it may have no modules, or be somebody else's build.
"""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.framework.busybox import BUSYBOX
from tests.framework.cache import built_once, cache_directory
from tests.framework.debian import Suite, ToolError

SUITES = ("bookworm", "trixie")
"""Which Debian's it may be, the usual one first."""
META_PACKAGE = "linux-image-amd64"
LAYOUT = 2  # raise it when what the directory holds changes

FIRST_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console")
"""What it takes to see the host's files; the others are loaded from there."""

KEPT = ("arch", "crypto", "fs", "lib", "net", "drivers/block", "drivers/char", "drivers/md", "drivers/vhost",
        "drivers/virtio")  # fmt: skip
"""Which modules are kept, with those that they need: without graphics, sound and network cards a quarter is left."""
KEPT_PATTERN = "drivers/net/*.ko"


def kernel(suite: str = SUITES[0]) -> Path:
    """Return a directory with `vmlinuz` and `modules`, the tree of one release; fetched first if the cache lacks it.

    Raises ToolError.
    """
    return built_once(cache_directory() / f"lab-kernel-{suite}-{LAYOUT}", partial(_fetch, suite))


def release(directory: Path) -> str:
    """Return the release of the kernel in `directory`, as `uname -r` says it."""
    return (directory / "release").read_text().strip()


def _fetch(suite: str, directory: Path) -> None:
    print("fetching a kernel for the KVM lab", file=sys.stderr, flush=True)
    packages = [name for name in Suite(suite).dependencies(META_PACKAGE) if name.startswith("linux-image-")]
    if not packages:
        raise ToolError(f"{META_PACKAGE} of Debian {suite} depends on no kernel")
    unpacked = directory / "unpacked"
    unpacked.mkdir()
    Suite(suite).unpack(packages[:1], unpacked)
    if not (unpacked / "lib").exists():  # since Debian 13 packages have no /lib, the link
        (unpacked / "lib").symlink_to("usr/lib")
    (modules,) = (unpacked / "lib/modules").iterdir()
    if packed := list(modules.rglob("*.ko.xz")):
        subprocess.run(["xz", "--decompress", *packed], check=True)
    _depmod(unpacked, modules.name)
    _prune(modules)
    _depmod(unpacked, modules.name)
    next(unpacked.glob("boot/vmlinuz-*")).rename(directory / "vmlinuz")
    modules.rename(directory / "modules")
    (directory / "release").write_text(f"{modules.name}\n")
    shutil.rmtree(unpacked)


def _depmod(root: Path, name: str) -> None:
    subprocess.run([BUSYBOX, "depmod", "-b", root, name], check=True)


def _prune(modules: Path) -> None:
    tree = modules / "kernel"
    found = {path for name in KEPT for path in (tree / name).rglob("*.ko")} | set(tree.glob(KEPT_PATTERN))
    needed = dependencies(modules)
    kept = {
        name for path in found for name in (str(path.relative_to(modules)), *needed[str(path.relative_to(modules))])
    }
    for path in tree.rglob("*.ko"):
        if str(path.relative_to(modules)) not in kept:
            path.unlink()


def dependencies(modules: Path) -> dict[str, list[str]]:
    """Return what each module needs, all the way down."""
    lines = (line.partition(":") for line in (modules / "modules.dep").read_text().splitlines())
    return {name: needed.split() for name, _, needed in lines}


def loading_order(modules: Path, names: tuple[str, ...]) -> list[str]:
    """Return the files of these modules and of what they need, in an order in which they can be loaded.

    Raises ToolError for a module that is not there; one that is built into the kernel is passed over.
    """
    needed = dependencies(modules)
    by_name = {Path(path).stem.replace("-", "_"): path for path in needed}
    builtin = {Path(line).stem.replace("-", "_") for line in (modules / "modules.builtin").read_text().split()}
    for name in names:
        if name not in by_name and name not in builtin:
            raise ToolError(
                f"the kernel in {modules.parent} has no module {name}; remove the directory to fetch another"
            )
    wanted = [by_name[name] for name in names if name in by_name]
    every = {path for each in wanted for path in (each, *needed[each])}
    return sorted(every, key=lambda path: (len(needed[path]), path))  # who needs another needs more than that one


def write_initramfs(file: Path, directory: Path, init: Path) -> None:
    """Write an initramfs with busybox, FIRST_MODULES and the script `init`; `file`.d is used and removed."""
    root = file.with_name(f"{file.name}.d")
    for name in ("bin", "modules", "dev", "proc", "sys"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    shutil.copy(init, root / "init")
    (root / "init").chmod(0o755)
    order = loading_order(directory / "modules", FIRST_MODULES)
    for number, path in enumerate(order):
        shutil.copy(directory / "modules" / path, root / f"modules/{number:02}-{Path(path).name}")
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with file.open("wb") as archive:
        subprocess.run([BUSYBOX, "cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=archive,
                       stderr=subprocess.DEVNULL, check=True)  # fmt: skip
    shutil.rmtree(root)
