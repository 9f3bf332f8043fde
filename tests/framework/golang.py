"""containerd's released source, fetched as a Go module, and programs built from it."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.framework.debian import ToolError

MODULE = "github.com/containerd/containerd/v2"


class GoMissing(ToolError):
    """There is no Go here, or one that is too old."""


@dataclass(frozen=True, slots=True)
class Release:
    """A release: `hash` is the module's in Go's checksum database, so that what is built is what was released; `go` is
    the oldest Go that its go.mod accepts.
    """

    version: str
    hash: str
    go: str

    def require_go(self) -> str:
        """Return the version of the Go on PATH, as it says it. Raises GoMissing."""
        wanted = f"Go {self.go} or newer builds containerd {self.version}"
        if shutil.which("go") is None:
            raise GoMissing(f"there is no `go` on PATH; {wanted}")
        text = run_go(["env", "GOVERSION"], Path("/")).strip()
        if _numbers(text) < _numbers(self.go):
            raise GoMissing(f"`go` on PATH is {text}; {wanted}")
        return text

    def fetch(self) -> Path:
        """Return the directory in Go's module cache that has the files. Raises ToolError."""
        answer = json.loads(run_go(["mod", "download", "-json", f"{MODULE}@{self.version}"], Path("/")))
        if answer["Sum"] != self.hash:
            raise ToolError(
                f"{MODULE} {self.version} has the hash {answer['Sum']} here; it was released with {self.hash}"
            )
        return Path(answer["Dir"])

    def build(self, commands: tuple[str, ...], target: Path) -> None:
        """Build commands (`cmd/ctr`) into the directory `target`, statically linked. Raises ToolError."""
        self.require_go()
        version = f"-X {MODULE}/version.Version={self.version} -s -w"
        packages = [f"./{command}" for command in commands]
        source = self.fetch()
        run_go(["build", "-trimpath", "-ldflags", version, "-o", f"{target}/", *packages], source, CGO_ENABLED="0")


def run_go(arguments: list[str], directory: Path, **environment: str) -> str:
    """Run `go`, the one that is installed, with low priority; return its output. Raises ToolError."""
    done = subprocess.run(
        ["nice", "go", *arguments],
        cwd=directory,
        env=os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"} | environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
        raise ToolError(f"`go {' '.join(arguments)}` ended with {done.returncode}:\n{lines}")
    return done.stdout


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of "go1.26.8" or "1.24"; a development version without any counts as the oldest."""
    found = re.search(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()
