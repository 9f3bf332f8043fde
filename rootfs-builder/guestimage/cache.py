"""The cache of finished artefacts: a directory appears whole or not at all, whoever is killed when.

Everything is built in a hidden directory beside its final place and renamed in one step. One lock file covers the
whole cache of this builder, so a hidden directory that is seen while holding the lock belongs to a dead builder.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .tools import progress

LOCK = ".rootfs.lock"
TEMPORARY = ".rootfs-tmp-"
MANIFEST = "manifest.json"


def directory() -> Path:
    """Return the cache directory: $PYMICRO_CACHE, else pymicro's place below the user's cache directory."""
    chosen = os.environ.get("PYMICRO_CACHE")
    if chosen:
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pymicro"


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold the builder's lock on the cache, waiting for other builders. The kernel frees it when we die."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another build in {root}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sweep(root: Path) -> None:
    """Remove what builders that died left half-built. Call it with the lock held."""
    for path in root.glob(f"{TEMPORARY}*"):
        progress(f"removing what a dead build left: {path.name}")
        shutil.rmtree(path)


def published(root: Path, name: str) -> Path | None:
    """Return the artefact directory `name` if it is there."""
    return root / name if (root / name / MANIFEST).is_file() else None


def read_manifest(artefact: Path) -> dict[str, object]:
    manifest = json.loads((artefact / MANIFEST).read_text())
    if not isinstance(manifest, dict):
        raise TypeError(f"{artefact / MANIFEST} holds {type(manifest).__name__} instead of an object")
    return manifest


def write_manifest(artefact: Path, manifest: dict[str, object]) -> None:
    (artefact / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def ensure(root: Path, name: str, build: Callable[[Path], None], *, renew: bool = False) -> Path:
    """Return the artefact directory `name`; let `build` fill it if it is missing or `renew` asks for a new one.

    Call it with the lock held. `build` raises to give up: then nothing is published.
    """
    final = root / name
    if published(root, name) and not renew:
        return final
    work = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=root))
    try:
        fresh = work / "new"
        fresh.mkdir(mode=0o755)
        build(fresh)
        if final.exists():
            final.rename(work / "old")
        fresh.rename(final)
    finally:
        shutil.rmtree(work)
    return final
