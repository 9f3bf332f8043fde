"""The cache outside the checkout: directories built once, whole or not at all, by one of many who want them."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_directory() -> Path:
    """Return `$PYMICRO_CACHE`, or `pymicro` in the user's cache directory; it exists afterwards."""
    chosen = os.environ.get("PYMICRO_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(chosen) if chosen else Path(base) / "pymicro"
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `lock`, waiting for it. The kernel releases it when the holder dies."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def built_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, a directory, calling `build(empty directory)` first if it does not exist yet.

    The work happens in a temporary directory beside it and is renamed at the end, so a half-built one is never seen,
    also after SIGKILL; what a killed builder left behind is removed by the next one.
    """
    if target.is_dir():
        return target
    prefix = f".{target.name}."
    with locked(target.with_name(f"{target.name}.lock")):
        if target.is_dir():
            return target
        for stale in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            build(work)
            work.chmod(0o755)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target
