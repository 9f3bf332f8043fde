"""Debian packages of any suite, downloaded and unpacked without touching the host's own apt.

apt runs with a state directory of its own, against the mirror that the host already uses, and checks the signatures
with Debian's keyring. The unpacked files are run from where they are.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.framework.cache import cache_directory, locked

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

_updated: set[str] = set()
"""The suites whose package lists this process has fetched."""


class ToolError(Exception):
    """A tool could not be had; the message says which one and why."""


def host_mirror() -> str:
    """Return the Debian mirror in the host's apt configuration, or `$PYMICRO_DEBIAN_MIRROR`. Raises ToolError.

    Other repositories may carry the same release name, so Debian's own label counts most, then the usual path.
    """
    if chosen := os.environ.get("PYMICRO_DEBIAN_MIRROR"):
        return chosen
    fields = "$(LABEL) $(REPO_URI)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    lines = [line.split(" ", 1) for line in listing.splitlines()]
    labelled = [uri for label, uri in lines if label == "Debian"]
    usual = [uri for _, uri in lines if uri.rstrip("/").endswith("/debian")]
    for uri in labelled + usual:
        return uri
    raise ToolError("apt knows no Debian mirror; name one in PYMICRO_DEBIAN_MIRROR")


class Suite:
    """One Debian suite (`trixie`) as a source of packages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._directory = cache_directory() / f"apt-{name}"

    def unpack(self, packages: list[str], into: Path) -> None:
        """Download the newest version of each package and unpack it into `into`. Raises ToolError."""
        with self._lists(), tempfile.TemporaryDirectory(dir=into) as scratch:
            self._apt("apt-get", "download", *packages, cwd=scratch)
            for deb in sorted(Path(scratch).glob("*.deb")):
                subprocess.run(["dpkg-deb", "-x", deb, into], check=True)

    def dependencies(self, package: str) -> list[str]:
        """Return what the newest version of a package depends on: of `linux-image-amd64`, its kernel. Raises
        ToolError.
        """
        with self._lists():
            listing = self._apt("apt-cache", "depends", "--important", package)
        return [line.split(":", 1)[1].strip() for line in listing.splitlines() if "Depends:" in line]

    def needed(self, package: str) -> list[str]:
        """Return the package and all that it needs, recommendations left out: what an empty system would install.

        Raises ToolError.
        """
        with self._lists():
            listing = self._apt("apt-get", "install", "--simulate", "--no-install-recommends", package)
        return [line.split()[1] for line in listing.splitlines() if line.startswith("Inst ")]

    @contextmanager
    def _lists(self) -> Iterator[None]:
        """Have the suite's package lists for this process alone, fetched once by it. Raises ToolError."""
        self._directory.mkdir(exist_ok=True)
        with locked(self._directory / "lock"):
            if self.name not in _updated:
                self._apt("apt-get", "update")
                _updated.add(self.name)
            yield

    def _apt(self, program: str, *command: str, cwd: str | None = None) -> str:
        options = {
            "Dir::Etc::sourcelist": self._sources(),
            "Dir::Etc::sourceparts": self._made("parts"),
            "Dir::State": self._made("state"),
            "Dir::State::lists": self._made("lists/partial").parent,
            "Dir::State::status": self._made("empty-status", directory=False),
            "Dir::Cache": self._made("cache/archives/partial").parent.parent,
            "APT::Sandbox::User": "root",  # the directories are this user's, also when root runs it
            "APT::Architecture": "amd64",
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            # A mirror of a testing suite may lag behind the short validity of its Release file. Signatures still count.
            "Acquire::Check-Valid-Until": "false",
            "Acquire::Retries": "3",
        }
        argv = [program, "-q", *(f"-o{key}={value}" for key, value in options.items()), *command]
        done = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
            raise ToolError(f"{program} {' '.join(command)} from Debian {self.name} failed:\n{lines}")
        print(f"  Debian {self.name}: {' '.join(command)}", file=sys.stderr, flush=True)
        return done.stdout

    def _sources(self) -> Path:
        file = self._directory / "sources.list"
        file.write_text(f"deb [signed-by={KEYRING}] {host_mirror()} {self.name} main\n")
        return file

    def _made(self, name: str, *, directory: bool = True) -> Path:
        path = self._directory / name
        if directory:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.touch()
        return path
