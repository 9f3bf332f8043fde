"""containerd's client suite: built once, from its released source, into the cache."""

import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.framework.cache import built_once, cache_directory
from tests.framework.debian import ToolError
from tests.framework.golang import MODULE, Release, run_go

RELEASE = Release("v2.1.9", "h1:lOQQ3qVEtauZCHKh8S2Xph5fGXFX2uZxMHmaslOZtW0=", "1.24")

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


def built_suite() -> Path:
    """Return a directory with the suite's test program, its test data and `bin/`, built first if the cache lacks it.

    Raises ToolError.
    """
    version = RELEASE.require_go()
    replaced = "".join(file.read_text() for file in REPLACED.values())
    key = hashlib.sha256(repr((RELEASE.hash, version, replaced, EDITED, PROGRAMS)).encode()).hexdigest()[:16]
    return built_once(cache_directory() / f"containerd-suite-{key}", _build)


def test_names(suite: Path) -> list[str]:
    """Return the names of the suite's tests, in its own order. Raises ToolError."""
    # with -test.short the program starts no daemon first
    argv = [str(suite / TEST_PROGRAM), "-test.short", "-test.list", "^Test"]
    done = subprocess.run(argv, cwd=suite, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ToolError(f"the suite does not list its tests: {done.stderr.strip()}")
    return [line for line in done.stdout.splitlines() if line.startswith("Test")]


def _build(directory: Path) -> None:
    """Build everything into `directory`. Raises ToolError."""
    print(f"fetching {MODULE} {RELEASE.version} and building its client suite, some minutes", flush=True)
    source = directory / "source"
    # Go's module cache is not to be written to, nor does `go -overlay` replace what lies in it
    shutil.copytree(RELEASE.fetch(), source, copy_function=shutil.copyfile)
    for name, file in REPLACED.items():
        shutil.copyfile(file, source / name)
    for name, (line, instead) in EDITED.items():
        _edit(source / name, line, instead)
    run_go(["test", "-c", "-trimpath", "-o", str(directory / TEST_PROGRAM), "./integration/client"], source)
    for name, package in PROGRAMS.items():
        run_go(["build", "-trimpath", "-o", str(directory / "bin" / name), package], source)
    shutil.move(source / "integration/client/testdata", directory)
    shutil.rmtree(source)


def _edit(file: Path, line: str, instead: str) -> None:
    """Replace the one occurrence of `line`. Raises ToolError."""
    text = file.read_text()
    if text.count(line) != 1:
        raise ToolError(f"{file.name} of {RELEASE.version} has {text.count(line)} times, not once: {line}")
    file.write_text(text.replace(line, instead))
