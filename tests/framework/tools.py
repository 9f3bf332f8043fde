"""Programs that the host's Debian lacks in the wanted version: containerds, vhost-device-vsock, virtiofsd, QEMU.

Each tool is a directory `$CACHE/tools-<name>-<key>` with everything in `bin/`. Run as a program, this module prints the
directory of each tool named on the command line, fetching it first if need be:

    python3 -m tests.framework.tools containerd-2.1 vhost-device-vsock
"""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.framework.cache import built_once, cache_directory
from tests.framework.debian import Suite, ToolError
from tests.framework.golang import Release

LAYOUT = 2  # raise it when what a tool's directory looks like changes


@dataclass(frozen=True, slots=True)
class Part:
    """Programs of one package, taken from the first of `suites` whose build of them runs on this host.

    `programs` are paths in the package, with the argument that makes each one print something and end.
    """

    package: str
    suites: tuple[str, ...]
    programs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Built:
    """Programs that no Debian has yet: commands of a release of containerd, built from source."""

    release: Release
    commands: tuple[str, ...]


def _runc(*suites: str) -> Part:
    # A newer suite's runc may want a newer C library. It runs itself through /proc/self/exe, so no loader can help it.
    return Part("runc", tuple(dict.fromkeys((*suites, "trixie", "bookworm"))), (("usr/sbin/runc", "-v"),))


def _containerd(suite: str) -> tuple[Part, ...]:
    programs = (("usr/bin/containerd", "-v"), ("usr/bin/ctr", "-v"), ("usr/bin/containerd-shim-runc-v2", "-v"))
    return (Part("containerd", (suite,), programs), _runc(suite))


NEWEST_CONTAINERD = Release("v2.4.2", "h1:p6Qg+xbEz8lvwdhHDx0U469xENvp4LgGBx+E7djXkGw=", "1.26.6")

TOOLS: dict[str, tuple[Part | Built, ...]] = {
    "containerd-1.6": _containerd("bookworm"),
    "containerd-1.7": _containerd("trixie"),
    "containerd-2.1": _containerd("forky"),
    "containerd-2.4": (
        Built(NEWEST_CONTAINERD, ("cmd/containerd", "cmd/ctr", "cmd/containerd-shim-runc-v2")),
        _runc("forky"),
    ),
    "vhost-device-vsock": (Part("vhost-device-vsock", ("forky",), (("usr/bin/vhost-device-vsock", "--version"),)),),
    "virtiofsd": (Part("virtiofsd", ("forky",), (("usr/libexec/virtiofsd", "--version"),)),),
    "vmm-trixie": (
        Part("qemu-system-x86", ("trixie",), (("usr/bin/qemu-system-x86_64", "--version"),)),
        Part("virtiofsd", ("trixie",), (("usr/libexec/virtiofsd", "--version"),)),
    ),
}
WITH_LOADER = {"vhost-device-vsock", "virtiofsd", "qemu-system-x86"}
"""The packages whose programs run by their own suite's loader where this host's libraries do not do."""
DATA = {"qemu-system-x86": "usr/share/qemu"}
"""The packages whose programs need files of others, and the directory that they are told by -L: they are always run
among what they depend on.
"""


def tool(name: str) -> Path:
    """Return the `bin` directory of a tool, fetched or built first if this cache lacks it.

    Raises ToolError, GoMissing where Go would have to build it.
    """
    if name not in TOOLS:
        raise ToolError(f"there is no tool {name!r}; there are {', '.join(TOOLS)}")
    key = hashlib.sha256(repr((LAYOUT, TOOLS[name])).encode()).hexdigest()[:12]
    target = cache_directory() / f"tools-{name}-{key}"

    def build(directory: Path) -> None:
        print(f"fetching {name}", file=sys.stderr, flush=True)
        (directory / "bin").mkdir()
        for part in TOOLS[name]:
            if isinstance(part, Built):
                print(f"building containerd {part.release.version}, some minutes", file=sys.stderr, flush=True)
                part.release.build(part.commands, directory / "bin")
            else:
                _fetch(part, directory)

    return built_once(target, build) / "bin"


def _fetch(part: Part, directory: Path) -> None:
    """Put the programs of `part` into `directory`/bin. Raises ToolError."""
    problems: list[str] = []
    for suite in part.suites:
        unpacked = directory / "files" / suite / part.package
        unpacked.mkdir(parents=True)
        Suite(suite).unpack([part.package], unpacked)
        broken = [problem for path, argument in part.programs if (problem := _problem([unpacked / path, argument]))]
        if not broken and part.package not in DATA:
            for path, _ in part.programs:
                _link(directory, unpacked / path)
            return
        if part.package in WITH_LOADER:
            _wrap(part, suite, unpacked, directory)
            return
        problems += broken
        shutil.rmtree(unpacked)
    raise ToolError(
        f"{part.package} of Debian {', '.join(part.suites)} does not run on this host:\n" + "\n".join(problems)
    )


def _link(directory: Path, program: Path) -> None:
    (directory / "bin" / program.name).symlink_to(os.path.relpath(program, directory / "bin"))


def _wrap(part: Part, suite: str, unpacked: Path, directory: Path) -> None:
    """Run the programs through their own suite's loader and libraries. Raises ToolError where that fails too."""
    Suite(suite).unpack(Suite(suite).needed(part.package), unpacked)
    libraries = unpacked / "usr/lib/x86_64-linux-gnu"
    loader = libraries / "ld-linux-x86-64.so.2"
    for path, argument in part.programs:
        if problem := _problem([loader, "--library-path", libraries, unpacked / path, argument]):
            raise ToolError(
                f"{part.package} of Debian {suite} does not run on this host, even by its own loader:\n{problem}"
            )
        script = directory / "bin" / Path(path).name
        data = DATA.get(part.package)
        option = f'-L "$here/{(unpacked / data).relative_to(directory)}" ' if data else ""
        libs, program = libraries.relative_to(directory), (unpacked / path).relative_to(directory)
        script.write_text(
            '#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")/..\n'
            f'exec "$here/{libs}/{loader.name}" --library-path "$here/{libs}" --argv0 {script.name} '
            f'"$here/{program}" {option}"$@"\n'
        )
        script.chmod(0o755)


def _problem(argv: list[str | Path]) -> str | None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    return None if done.returncode == 0 else f"{argv[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}"


def main() -> int:
    """Print the directory of each tool named on the command line."""
    try:
        for name in sys.argv[1:]:
            print(tool(name), flush=True)
    except ToolError as error:
        print(f"tools: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
