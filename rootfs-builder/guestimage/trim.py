"""What stays in the guest: a list of what is wanted, and the libraries that these files need. All else goes."""

import os
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

PROGRAMS = ("usr/bin/python3", "usr/bin/python3.[0-9]*", "usr/bin/crun")

OPENED_BY_NAME = ("usr/lib/x86_64-linux-gnu/libgcc_s.so.1",)
"""Libraries that no file lists as needed: glibc loads this one when a thread is cancelled."""

TOP_LINKS = ("bin", "sbin", "lib", "lib64")
"""Links to the directories of the same name below /usr: a package outside the image would create them."""

LOADERS = ("usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")

DROPPED_MODULES = (
    # tests, documentation, tools for developers
    "test", "idlelib", "ensurepip", "pydoc_data", "pydoc", "doctest", "unittest", "venv", "lib2to3", "_pyrepl",
    "config-*", "__phello__*", "pdb", "turtle*", "tkinter", "this", "antigravity", "LICENSE.txt",
    # modules whose extension is dropped below
    "curses", "dbm", "sqlite3", "ssl", "lzma", "bz2",
    # servers and clients of protocols that the guest does not speak
    "xmlrpc", "wsgiref",
    # site-packages and Debian's hooks: the agent runs with -S
    "sitecustomize", "dist-packages", "EXTERNALLY-MANAGED",
)  # fmt: skip
"""Names below the standard library's directory, patterns allowed, without .py."""

DROPPED_EXTENSIONS = (
    "_test*", "_xxtest*", "xx*", "_ctypes_test", "_codecs_*", "_multibytecodec", "_curses*", "readline", "_dbm",
    "_gdbm", "_sqlite3", "_tkinter", "_bz2", "_lzma",
    # OpenSSL is 6 MB; hashlib has its own code for the usual algorithms
    "_ssl", "_hashlib",
)  # fmt: skip
"""Modules below lib-dynload, patterns allowed."""


def wanted(path: str) -> bool:
    """Tell whether the file at `path`, relative to the root, is wanted for its own sake."""
    if any(fnmatch(path, pattern) for pattern in (*TOP_LINKS, *PROGRAMS, *OPENED_BY_NAME, *LOADERS)):
        return True
    parts = path.split("/")
    if parts[:2] != ["usr", "lib"] or len(parts) < 4 or not fnmatch(parts[2], "python3.*") or "__pycache__" in parts:
        return False
    if parts[3] == "lib-dynload":
        return not _matches(parts[-1].split(".")[0], DROPPED_EXTENSIONS)
    return not _matches(parts[3].removesuffix(".py"), DROPPED_MODULES)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def trim(tree: Path, needed_by: Callable[[str], list[str]]) -> None:
    """Remove from `tree` every file that is neither wanted nor a library that a wanted file needs.

    `needed_by(path)` returns the libraries of the program or library at `path`, both relative to the root.
    """
    keep = {path for path in _files(tree) if wanted(path)}
    binaries = [path for path in sorted(keep) if path.endswith(".so") or "/bin/" in path]
    for path in binaries:
        if not (tree / path).is_symlink():
            keep.update(needed_by(path))
    keep.update(target for path in sorted(keep) for target in _link_targets(tree, path))
    for path in _files(tree):
        if path not in keep:
            (tree / path).unlink()
    _remove_empty_directories(tree)


def _files(tree: Path) -> list[str]:
    found = []
    for directory, names, files in os.walk(tree):
        base = Path(directory)
        links = [name for name in names if (base / name).is_symlink()]
        found += [str((base / name).relative_to(tree)) for name in (*files, *links)]
    return found


def _link_targets(tree: Path, path: str) -> list[str]:
    """Return the files that the symbolic link at `path` leads to, step by step; nothing for a plain file."""
    targets = []
    while (tree / path).is_symlink():
        path = os.path.normpath(Path(path).parent / (tree / path).readlink())
        targets.append(path)
    return targets


def _remove_empty_directories(tree: Path) -> None:
    for directory, names, files in os.walk(tree, topdown=False):
        if not files and not any((Path(directory) / name).exists() for name in names) and Path(directory) != tree:
            shutil.rmtree(directory)
