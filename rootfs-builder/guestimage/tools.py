"""The programs that the build runs: their versions, how they are started, how their failure is reported."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGE_OF = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.erofs": "erofs-utils",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
"""Each program that the build needs and the Debian package that has it."""


class BuildError(Exception):
    """The image cannot be built; the message says why and what to do."""


def progress(message: str) -> None:
    print(f"rootfs: {message}", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """Return the version of each tool whose output ends up in the image. Raises BuildError when a tool is missing."""
    missing = sorted({package for program, package in PACKAGE_OF.items() if not shutil.which(program)})
    if missing:
        raise BuildError(f"missing programs, install them with: apt-get install {' '.join(missing)}")
    return {
        "mmdebstrap": capture(["mmdebstrap", "--version"]).split()[-1],
        "mkfs.erofs": _erofs_version(),
    }


def _erofs_version() -> str:
    # 1.5 prints "mkfs.erofs 1.5" to stderr on -V, newer ones "mkfs.erofs (erofs-utils) 1.8.6" to stdout.
    result = subprocess.run(["mkfs.erofs", "-V"], capture_output=True, text=True, check=False)
    lines = (result.stdout + result.stderr).split("\n")
    return lines[0].split()[-1] if lines[0].split() else "unknown"


def run(command: Sequence[str | Path], **options: object) -> None:
    """Run `command`, its output on our stderr. Raises BuildError with its exit code."""
    code = subprocess.run([str(word) for word in command], stdout=sys.stderr, check=False, **options).returncode  # type: ignore[call-overload]  # options are run()'s own
    if code != 0:
        raise BuildError(f"{command[0]} failed with exit code {code}; its messages are above")


def capture(command: Sequence[str | Path], **options: object) -> str:
    """Return what `command` prints. Raises BuildError with its own message when it fails."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]  # options are run()'s own
    if result.returncode != 0:
        raise BuildError(f"{command[0]} failed with exit code {result.returncode}: {result.stderr.strip()[-2000:]}")
    return str(result.stdout)


def digest(parts: Iterable[str | bytes]) -> str:
    """Return a sha256 over `parts` in order, each with its length, so that no two lists give the same bytes."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
