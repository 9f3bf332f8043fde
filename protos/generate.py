# ruff: noqa: INP001 -- a script of its own, not a module of the namespace package
"""Generate the Python classes and their type stubs from the .proto files: `python protos/generate.py`.

Needs grpcio-tools, whose version decides the bytes; the generated files name the protobuf version that they need.
With `--out DIR` the files go there instead of into the work tree, which lets a test compare the two.
"""

import argparse
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """One Python package of generated modules. Paths are relative to the repository."""

    sources: Path
    """Where its .proto files are."""
    portion: Path
    """The folder of the namespace package that the modules go to."""
    name: str
    """The package as a path; the .proto files import each other under it, so that the modules do as well."""


PACKAGES = (
    Package(sources=Path("protos"), portion=Path("protos"), name="pymicro/protos"),
    Package(sources=Path("shim/pymicro/ttrpc"), portion=Path("shim"), name="pymicro/ttrpc"),
)


def generate(package: Package, out: Path) -> None:
    """Write the modules and stubs of `package` below `out`. Raises RuntimeError when protoc fails."""
    from grpc_tools import protoc  # type: ignore[import-untyped]  # a development tool that ships no types

    target = out / package.portion
    target.mkdir(parents=True, exist_ok=True)
    names = [f"{package.name}/{source.name}" for source in sorted((ROOT / package.sources).glob("*.proto"))]
    status = protoc.main(
        [
            "protoc",
            f"-I{package.name}={ROOT / package.sources}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={target}",
            f"--pyi_out={target}",
            *names,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with {status} on {package.sources}")


def main() -> int:
    """Generate every package; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="write below this directory instead")
    out = parser.parse_args().out
    for package in PACKAGES:
        generate(package, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
