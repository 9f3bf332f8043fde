"""containerd's released source: fetched as a Go module, its client suite built once into the cache."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.framework.cache import built_once, cache_directory

MODULE = "github.com/containerd/containerd/v2"
VERSION = "v2.1.9"
SUM = "h1:lOQQ3qVEtauZCHKh8S2Xph5fGXFX2uZxMHmaslOZtW0="
"""The module's hash as Go's checksum database has it: what is built is what was released."""

GO = (1, 24)
"""The oldest Go that the module's go.mod accepts."""

OURS = Path(__file__).parent / "replaced"
REPLACED = {
    "integration/client/client_unix.go": OURS / "client_unix.go",
    "integration/images/image_list.go": OURS / "image_list.go",
}
EDITED = {
    "integration/client/client_test.go": (
        "waitCtx, waitCancel := context.WithTimeout(ctx, 4*time.Second)",
        "waitCtx, waitCancel := context.WithTimeout(ctx, 60*time.Second)",
    ),
    "integration/client/restart_monitor_test.go": (
        "waitCtx, waitCancel := context.WithTimeout(context.TODO(), 2*time.Second)",
        "waitCtx, waitCancel := context.WithTimeout(context.TODO(), 60*time.Second)",
    ),
}
"""A line and what takes its place: a daemon may take its time to start where a machine is busy, no test has begun."""

PROGRAMS = {"runc-fp": "./integration/failpoint/cmd/runc-fp"}
"""What the suite expects on PATH besides containerd: a runc that fails on demand, for the regression tests."""

TEST_PROGRAM = "client.test"


class SourceError(Exception):
    """The suite could not be fetched or built; the message says why and what to do."""


class GoMissing(SourceError):
    """There is no Go here, or one that is too old."""


def built_suite() -> Path:
    """Return a directory with the suite's test program, its test data and `bin/`, built first if the cache lacks it.

    Raises SourceError.
    """
    version = _go_version()
    replaced = "".join(file.read_text() for file in REPLACED.values())
    key = hashlib.sha256(repr((SUM, version, replaced, EDITED, PROGRAMS)).encode()).hexdigest()[:16]
    return built_once(cache_directory() / f"containerd-suite-{key}", _build)


def test_names(suite: Path) -> list[str]:
    """Return the names of the suite's tests, in its own order. Raises SourceError."""
    # with -test.short the program starts no daemon first
    listing = _run([str(suite / TEST_PROGRAM), "-test.short", "-test.list", "^Test"], suite)
    return [line for line in listing.splitlines() if line.startswith("Test")]


def _go_version() -> str:
    if shutil.which("go") is None:
        raise GoMissing(f"there is no `go` on PATH; Go {GO[0]}.{GO[1]} or newer builds the suite")
    text = _run(["go", "env", "GOVERSION"], Path("/")).strip()
    found = re.match(r"go(\d+)\.(\d+)", text)
    if not found or (int(found[1]), int(found[2])) < GO:
        raise GoMissing(f"`go` on PATH is {text}; Go {GO[0]}.{GO[1]} or newer builds the suite")
    return text


def _build(directory: Path) -> None:
    """Build everything into `directory`. Raises SourceError."""
    print(f"fetching {MODULE} {VERSION} and building its client suite, some minutes", flush=True)
    source = directory / "source"
    # Go's module cache is not to be written to, nor does `go -overlay` replace what lies in it
    shutil.copytree(_fetch(), source, copy_function=shutil.copyfile)
    for name, file in REPLACED.items():
        shutil.copyfile(file, source / name)
    for name, (line, instead) in EDITED.items():
        _edit(source / name, line, instead)
    _run(["go", "test", "-c", "-trimpath", "-o", str(directory / TEST_PROGRAM), "./integration/client"], source)
    for name, package in PROGRAMS.items():
        _run(["go", "build", "-trimpath", "-o", str(directory / "bin" / name), package], source)
    shutil.move(source / "integration/client/testdata", directory)
    shutil.rmtree(source)


def _edit(file: Path, line: str, instead: str) -> None:
    """Replace the one occurrence of `line`. Raises SourceError."""
    text = file.read_text()
    if text.count(line) != 1:
        raise SourceError(f"{file.name} of {VERSION} has {text.count(line)} times, not once: {line}")
    file.write_text(text.replace(line, instead))


def _fetch() -> Path:
    """Return the directory in Go's module cache that has the module's files. Raises SourceError."""
    answer = json.loads(_run(["go", "mod", "download", "-json", f"{MODULE}@{VERSION}"], Path("/")))
    if answer["Sum"] != SUM:
        raise SourceError(f"{MODULE} {VERSION} has the hash {answer['Sum']} here; it was released with {SUM}")
    return Path(answer["Dir"])


def _run(argv: list[str], directory: Path) -> str:
    """Run a program with low priority and return its output. Raises SourceError."""
    environment = os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}
    done = subprocess.run(
        ["nice", *argv],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
        raise SourceError(f"`{' '.join(argv)}` ended with {done.returncode}:\n{lines}")
    return done.stdout
