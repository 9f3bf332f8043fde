"""`-v` and `-info`: what this shim is, and what it can do."""

import json
import os
import sys
from contextlib import suppress
from importlib.metadata import version

NAME = "io.containerd.pymicro.v1"


def print_version() -> None:
    """Print the version for people."""
    print(f"containerd-shim-pymicro-v1:\n  Version: {version('pymicro')}")  # noqa: T201


def print_info() -> None:
    """Write a containerd.types.RuntimeInfo to stdout, as containerd 2.0 and newer ask at their start.

    stdin holds the runtime options, an Any, or nothing; they come back as they went. Raises ValueError where it holds
    something else.
    """
    from google.protobuf.any_pb2 import Any as AnyMessage
    from google.protobuf.message import DecodeError
    from pymicro.protos import types_pb2
    from pymicro.shim.features import FEATURES, TYPE_URL

    given = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
    info = types_pb2.RuntimeInfo(
        name=NAME,
        version=types_pb2.RuntimeVersion(version=version("pymicro")),
        features=AnyMessage(type_url=TYPE_URL, value=json.dumps(FEATURES).encode()),
        annotations=guest(given),
    )
    if given:
        try:
            info.options.ParseFromString(given)
        except DecodeError as error:
            raise ValueError(
                f"the stdin of -info ({len(given)} bytes) is no Any of runtime options: {error}"
            ) from error
    os.write(1, info.SerializeToString())


def guest(options: bytes) -> dict[str, str]:
    """Return what the guest of the settings that `options` name consists of, as far as its manifests can be found.

    containerd wants the rest of the answer also from a host whose settings are wrong: Create will say what is.
    """
    from pymicro.shim import host
    from pymicro.shim.bootstrap import runtime_options
    from pymicro.shim.config import load
    from pymicro.shim.errors import ShimError

    found = {}
    with suppress(ShimError, ValueError):
        chosen = runtime_options(options)
        kernel, image = (
            host.find_manifest(path) for path in host.guest_files(load(chosen.config_path, chosen.config_body))
        )
        found["io.pymicro.guest.kernel"] = kernel.release if kernel else ""
        found["io.pymicro.guest.crun"] = image.crun if image else ""
    return {name: value for name, value in found.items() if value}
