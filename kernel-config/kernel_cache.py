"""The cache: where a kernel of a given key lives, one builder at a time, and publishing in one step."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SCRATCH_PREFIX = ".kernel-build-"


def cache_root(environ: Mapping[str, str]) -> Path:
    """Return the directory of everything that pymicro builds once per machine; it need not exist yet."""
    if environ.get("PYMICRO_CACHE"):
        return Path(environ["PYMICRO_CACHE"]).absolute()
    base = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home(), ".cache")
    return Path(base, "pymicro").absolute()


def key_of(inputs: Mapping[str, object]) -> str:
    """Return 16 hex digits that stand for these JSON-able inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def find(root: Path, key: str) -> Path | None:
    """Return the directory of the finished kernel with this key, or None."""
    path = root / f"kernel-{key}"
    return path if (path / "manifest.json").is_file() else None


@contextmanager
def only_builder(root: Path) -> Iterator[None]:
    """Wait until no other process builds a kernel in this cache, and keep others waiting meanwhile.

    The lock goes with its process however that ends, so whatever scratch directories are there once we have it
    belong to builders that were killed: they are removed.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".kernel.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("kernel: waiting for another build to finish", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in root.glob(SCRATCH_PREFIX + "*"):
            print(f"kernel: removing {leftover.name}, left by a build that was killed", file=sys.stderr, flush=True)
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """Give a directory on the cache's own file system that is gone afterwards; call it as the only_builder."""
    path = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=root))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(files: Path, root: Path, key: str) -> Path:
    """Rename the directory `files` to its place in the cache, after its bytes have reached the disk; return the place.

    What stood there without a manifest is replaced.
    """
    for path in files.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files.chmod(0o755)
    place = root / f"kernel-{key}"
    if place.exists():
        shutil.rmtree(place)
    files.rename(place)
    return place
