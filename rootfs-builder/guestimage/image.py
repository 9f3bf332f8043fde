"""The image layer: the base tree plus the agent, its mount points and a few files below /etc, as one erofs file."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from . import base, cache
from .bytecode import compile_tree
from .tools import BuildError, digest, file_sha256, progress, run

IMAGE = "image.erofs"
UUID = "70796d69-6372-6f00-8000-000000000001"
PROGRAM_DIRECTORY = "usr/lib/pymicro"
INIT = ("/usr/bin/python3", "-I", "-S", f"/{PROGRAM_DIRECTORY}/init.pyc")
"""How the kernel starts PID 1: the first word is init=, the others follow `--` on its command line."""

MOUNT_POINTS = ("proc", "sys", "dev", "run", "tmp", "mnt", "root", "var")
ETC = {
    "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "hostname": "",
    "machine-id": "",  # empty: something to bind the sandbox's own over
}
RECIPE = ("image.py", "bytecode.py", "compile_in_guest.py", "init.py")


@dataclass(frozen=True)
class Source:
    """One Python file of the image: where it goes, relative to PROGRAM_DIRECTORY, and what is in it."""

    path: str
    content: bytes


def agent_sources(repository: Path) -> list[Source]:
    """Return the agent's and the wire protocol's modules and PID 1's first file, sorted by path."""
    found = [Source("init.py", Path(__file__).with_name("init.py").read_bytes())]
    for portion in ("agent/pymicro/agent", "protos/pymicro/wire"):
        directory = repository / portion
        for path in directory.rglob("*.py"):
            below = Path("pymicro", directory.name, path.relative_to(directory))
            found.append(Source(str(below), path.read_bytes()))
    return sorted(found, key=lambda source: source.path)


def sources_digest(sources: list[Source]) -> str:
    return digest(part for source in sources for part in (source.path, source.content))


def key(sources: list[Source], versions: dict[str, str], base_dir: Path) -> str:
    """Return what names this image: the recipe, the agent's sources, mkfs.erofs's version and the base layer."""
    here = Path(__file__).parent
    recipe = [here.joinpath(name).read_bytes() for name in RECIPE]
    base_sum = str(cache.read_manifest(base_dir)["sha256"])
    return digest([*recipe, sources_digest(sources), versions["mkfs.erofs"], base_sum])[:16]


def build(into: Path, sources: list[Source], versions: dict[str, str], base_dir: Path) -> None:
    """Write image.erofs and its manifest to the directory `into`. Raises BuildError."""
    progress("adding the agent and making the image")
    tree = into / "tree"
    tree.mkdir()
    run(["tar", "--extract", "--file", base_dir / base.ARCHIVE, "--directory", tree])
    furnish(tree)
    program = tree / PROGRAM_DIRECTORY
    for source in sources:
        target = program / source.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.content)
    compile_tree(tree, program, optimize=0)
    make_erofs(tree, into / IMAGE)
    shutil.rmtree(tree)
    manifest = cache.read_manifest(base_dir)
    manifest |= {
        "file": IMAGE,
        "sha256": file_sha256(into / IMAGE),
        "size": (into / IMAGE).stat().st_size,
        "agent": sources_digest(sources),
        "init": list(INIT),
        "tools": versions,
    }
    cache.write_manifest(into, manifest)


def furnish(tree: Path) -> None:
    """Create the mount points and the files that programs expect below /etc."""
    for name in (*MOUNT_POINTS, "etc"):
        (tree / name).mkdir(exist_ok=True)
        (tree / name).chmod(0o755)
    for name, content in ETC.items():
        (tree / "etc" / name).write_text(content)
        (tree / "etc" / name).chmod(0o644)


def make_erofs(tree: Path, target: Path) -> None:
    """Pack `tree` as an uncompressed erofs file: unpacking costs more than reading, most of all when emulated."""
    run(["mkfs.erofs", "--quiet", "-x-1", f"-T{base.EPOCH}", f"-U{UUID}", "--all-root", target, tree])
    if target.stat().st_size == 0:
        raise BuildError(f"mkfs.erofs left an empty {target.name}")
