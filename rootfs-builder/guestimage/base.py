"""The base layer: a trimmed, precompiled Debian tree with Python and crun, packed as one reproducible tar file."""

import os
import shutil
import tarfile
from pathlib import Path

from . import cache, mirror, trim
from .bytecode import compile_tree
from .tools import BuildError, capture, digest, file_sha256, progress, run

SUITE = "trixie"
ARCHITECTURE = "amd64"
PACKAGES = ("python3-minimal", "libpython3-stdlib", "crun")
ARCHIVE = "base.tar"
EPOCH = 1_754_697_600
"""Modification time of everything in the image, in seconds since 1970: the day Debian 13 was released."""

RECIPE = ("base.py", "bytecode.py", "compile_in_guest.py", "trim.py")
"""Files of this package whose change makes another base layer."""


def key(versions: dict[str, str]) -> str:
    """Return what names this base layer: the recipe and the tool, not the packages (they need the network)."""
    here = Path(__file__).parent
    return digest([*(here.joinpath(name).read_bytes() for name in RECIPE), SUITE, versions["mmdebstrap"]])[:16]


def build(into: Path, versions: dict[str, str]) -> None:
    """Write base.tar and its manifest to the directory `into`. Raises BuildError."""
    tree, debs = into / "tree", into / "debs"
    debs.mkdir()
    bootstrap(tree, debs)
    for name in trim.TOP_LINKS:
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(f"usr/{name}")
    progress("trimming and precompiling")
    trim.trim(tree, lambda path: libraries(tree, path))
    present = installed(tree, debs)
    compile_tree(tree, standard_library(tree))
    pack(tree, into / ARCHIVE)
    shutil.rmtree(tree)
    shutil.rmtree(debs)
    manifest: dict[str, object] = {
        "file": ARCHIVE,
        "sha256": file_sha256(into / ARCHIVE),
        "suite": SUITE,
        "packages": present,
        "python": present.get("python3.13-minimal", "unknown"),
        "crun": present["crun"],
        "tools": {"mmdebstrap": versions["mmdebstrap"]},
    }
    cache.write_manifest(into, manifest)


def packages(base_dir: Path) -> dict[str, str]:
    """Return name and version of each package in the base layer at `base_dir`."""
    listed = cache.read_manifest(base_dir)["packages"]
    return dict(listed) if isinstance(listed, dict) else {}


def bootstrap(tree: Path, debs: Path) -> None:
    """Unpack PACKAGES and what they depend on into `tree`, and leave the packages themselves in `debs`.

    mmdebstrap gets its own mount and process namespace and dies with us: nothing is left behind if we are killed.
    """
    source = mirror.find()
    progress(f"fetching {', '.join(PACKAGES)} for {SUITE} from {source.main}")
    shield = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    run(
        [
            *shield, "mmdebstrap", "--mode=root", "--variant=extract", "--format=directory",
            f"--architectures={ARCHITECTURE}",
            "--skip=chroot/mount",  # nothing of the guest runs in it, so nothing needs mounting
            f"--include={','.join(PACKAGES)}",
            *(f"--aptopt={line}" for line in mirror.apt_options()),
            f'--extract-hook=cp "$1"/var/cache/apt/archives/*.deb "{debs}"',
            SUITE, tree, *source.sources(SUITE),
        ],
        env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "TMPDIR": str(debs.parent)},
    )  # fmt: skip


def libraries(tree: Path, path: str) -> list[str]:
    """Return the shared libraries that the file at `path` needs, as the guest's own loader finds them."""
    listing = capture(["chroot", tree, "/lib64/ld-linux-x86-64.so.2", "--list", f"/{path}"])
    found = []
    for line in listing.splitlines():
        name, arrow, rest = line.partition(" => ")
        if arrow:
            if rest.startswith("not found"):
                raise BuildError(f"/{path} needs {name.strip()}, which no package in the image has")
            found.append("usr" + rest.split(" (")[0].strip())
    return found


def installed(tree: Path, debs: Path) -> dict[str, str]:
    """Return name and version of each package of which at least one file is still in the trimmed `tree`."""
    versions = {}
    for deb in sorted(debs.glob("*.deb")):
        name, version = capture(["dpkg-deb", "--show", "--showformat=${Package} ${Version}", deb]).split()
        files = [
            line.split(None, 5)[5].split(" -> ")[0] for line in capture(["dpkg-deb", "--contents", deb]).splitlines()
        ]
        if any(os.path.lexists(tree / file) for file in files if not file.endswith("/")):
            versions[name] = version
    return versions


def standard_library(tree: Path) -> Path:
    found = sorted((tree / "usr/lib").glob("python3.*"))
    if len(found) != 1:
        raise BuildError(f"expected one standard library below /usr/lib, found {[path.name for path in found]}")
    return found[0]


def pack(tree: Path, archive: Path) -> None:
    """Write `tree` to `archive`, sorted, owned by root and of one time, so that the same tree gives the same bytes."""

    def normalise(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mtime = EPOCH
        return member

    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tree, arcname=".", filter=normalise)
