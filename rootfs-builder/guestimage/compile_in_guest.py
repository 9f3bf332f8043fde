"""Runs in the guest's interpreter, by chroot: compile each .py below argv[1] to a .pyc beside it, at level argv[2]."""

import os
import py_compile
import sys


def compile_below(directory: str, optimize: int) -> None:
    for here, names, files in os.walk(directory):
        names.sort()  # the order of the walk is part of the result: constants are shared between modules
        for name in sorted(files):
            if name.endswith(".py"):
                source = os.path.join(here, name)
                py_compile.compile(
                    source,
                    cfile=source + "c",
                    doraise=True,
                    optimize=optimize,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )


compile_below(sys.argv[1], int(sys.argv[2]))
