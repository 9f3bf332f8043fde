"""Small file helpers on top of `posix`: what os, os.path and shutil would give at the price of their import."""

import posix


def read_text(path: str) -> str:
    """Return the text of a file of any size, /proc and /sys included. Raises OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
    """Write a file that only root may read. Raises OSError."""
    fd = posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[posix.write(fd, data) :]
    finally:
        posix.close(fd)


def write_text(path: str, text: str) -> None:
    """Write `text` to an existing or new file in one write, as the files of /proc and /sys want it. Raises OSError."""
    write_bytes(path, text.encode())


def exists(path: str) -> bool:
    try:
        posix.stat(path)
    except OSError:
        return False
    return True


def make_directories(path: str, mode: int = 0o755) -> None:
    """Create a directory and its parents; an existing one is fine. Raises OSError."""
    try:
        posix.mkdir(path, mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directories(path.rpartition("/")[0], mode)
        posix.mkdir(path, mode)


def unlink(path: str) -> None:
    """Remove a file; a missing one is fine. Raises OSError."""
    try:  # noqa: SIM105  # contextlib is not imported
        posix.unlink(path)
    except FileNotFoundError:
        pass


def remove_tree(path: str) -> None:
    """Remove a directory of our own with all that is in it; a missing one is fine. Raises OSError."""
    try:
        entries = list(posix.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            posix.unlink(entry.path)
    posix.rmdir(path)
