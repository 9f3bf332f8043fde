"""Precompile Python sources with the guest's own interpreter, and leave only the result.

A module is a lone `name.pyc` in place of its source: one file to look up and open instead of two. The header is
PEP 552's unchecked hash, so nothing depends on modification times and nothing is checked at run time.
"""

import os
from pathlib import Path

from .tools import capture

SCRIPT = Path(__file__).with_name("compile_in_guest.py")


def compile_tree(tree: Path, directory: Path, *, optimize: int = 2) -> None:
    """Replace each .py below `directory`, itself inside the root `tree`, by its .pyc. Raises BuildError.

    `optimize` is the interpreter's level: 2 drops assertions and docstrings (smaller, so faster to load), 0 nothing.
    """
    inside = Path("/") / directory.relative_to(tree)
    # Nothing of the caller's environment. The hash seed decides the order in which a frozenset constant is written.
    environment = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    command: list[str | Path] = [
        "chroot",
        tree,
        "/usr/bin/python3",
        "-S",
        "-c",
        SCRIPT.read_text(),
        str(inside),
        str(optimize),
    ]
    capture(command, env=environment)
    for source in directory.rglob("*.py"):
        source.unlink()
