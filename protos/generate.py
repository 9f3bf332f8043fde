# ruff: noqa: INP001 -- a script of its own, not a module of the namespace package
"""Generate the Python classes and their type stubs from the .proto files: `python protos/generate.py`.

Needs grpcio-tools, whose version decides the bytes; the generated files name the protobuf version that they need.
`--check` writes nothing and fails when the committed files are not what the .proto files say.
"""

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_VERSION = re.compile("^# Protobuf Python Version: (.+)$", re.MULTILINE)
_DESCRIPTOR = re.compile(r"AddSerializedFile\((b.+)\)$", re.MULTILINE)


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


def stale(package: Package, fresh: Path) -> list[Path]:
    """Return the committed modules of `package` that say something else than those below `fresh`, or are missing."""
    here = ROOT / package.portion / package.name
    there = fresh / package.portion / package.name
    names = {path.name for directory in (here, there) for path in directory.glob("*_pb2.py")}
    return [here / name for name in sorted(names) if not _current(here / name, there / name)]


def _current(committed: Path, fresh: Path) -> bool:
    pairs = [(committed, fresh), (committed.with_suffix(".pyi"), fresh.with_suffix(".pyi"))]
    if not all(path.is_file() for pair in pairs for path in pair):
        return False
    old, new = committed.read_text(), fresh.read_text()
    if _VERSION.findall(old) == _VERSION.findall(new):
        return all(left.read_bytes() == right.read_bytes() for left, right in pairs)
    # Another version of grpcio-tools writes other code around the same messages.
    return _DESCRIPTOR.findall(old) == _DESCRIPTOR.findall(new) != []


def main() -> int:
    """Generate or check every package; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say which files are not current")
    parser.add_argument("--out", type=Path, default=ROOT, help="write below this directory instead")
    arguments = parser.parse_args()
    if not arguments.check:
        for package in PACKAGES:
            generate(package, arguments.out)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        for package in PACKAGES:
            generate(package, Path(directory))
        wrong = [path for package in PACKAGES for path in stale(package, Path(directory))]
    for path in wrong:
        print(f"{path.relative_to(ROOT)} is not current: run protos/generate.py", file=sys.stderr)  # noqa: T201 -- its output
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
