"""`-v` and `-info`: what this shim is."""

import os
from importlib.metadata import version

NAME = "io.containerd.pymicro.v1"


def print_version() -> None:
    """Print the version for people."""
    print(f"containerd-shim-pymicro-v1:\n  Version: {version('pymicro')}")  # noqa: T201


def print_info() -> None:
    """Write a containerd.types.RuntimeInfo to stdout, as containerd 2.0 asks at its start."""
    from pymicro.protos import types_pb2

    info = types_pb2.RuntimeInfo(name=NAME, version=types_pb2.RuntimeVersion(version=version("pymicro")))
    os.write(1, info.SerializeToString())
