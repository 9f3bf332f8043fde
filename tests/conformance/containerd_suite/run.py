"""One test of the suite with one runtime: its own containerd, its own namespaces, a time limit, nothing left."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from tests.conformance.containerd_suite.outcome import Outcome, parse
from tests.conformance.containerd_suite.source import TEST_PROGRAM
from tests.framework.containerd import USUAL, Containerd
from tests.framework.processes import MARK
from tests.framework.waiting import seconds

CGROUPS = Path("/sys/fs/cgroup")
SUITE_NAMESPACE = "testing"
"""The containerd namespace that most of the suite uses."""

CGROUP_NAMES = (SUITE_NAMESPACE, f"{SUITE_NAMESPACE}-Test*", "n" * 76)
"""The cgroups of its containers: two tests have namespaces of their own, one a namespace of the longest name."""

GRACE = 30.0
"""Seconds between the limit that the test program keeps itself, saying what it waits for, and the end by SIGKILL."""

NAMESPACES = ("unshare", "--mount", "--propagation=slave", "--pid", "--fork", "--kill-child", "--mount-proc")
"""A test sees only its own processes (one greps `ps ax` for what other programs run too), and all end with it."""

COVERED = ("/opt/containerd", "/run/containerd", "/run/nri", "/run/pymicro")
"""What the daemon's plugins, the shims and runc keep outside of the daemon's directory is this test's alone."""

COVER = f'for d in {" ".join(COVERED)}; do mkdir -p $d && mount -t tmpfs none $d || exit; done; exec "$@"'


class Suite(msgspec.Struct, frozen=True):
    """What runs a test: the built suite, the registry its images come from, where to lay the output, the limit."""

    directory: Path
    registry: str
    output: Path
    limit: float  # seconds, of a usual host


@contextmanager
def laid_out(directory: Path, settings: dict[str, dict[str, object]]) -> Iterator[Containerd]:
    """Yield a containerd's directory with programs and settings, its daemon not started: the suite starts its own."""
    containerd = Containerd(USUAL, directory, namespace=SUITE_NAMESPACE, settings=settings)
    _free(containerd)
    containerd.remove_remains()
    containerd.lay_out()
    try:
        yield containerd
    finally:
        containerd.remove_remains()


def run(test: str, runtime: str, suite: Suite, containerd: Containerd) -> Outcome:
    """Run one test and return how it ended; what it and its daemon printed is in `<output>/<test>.log`.

    At the limit the test program prints where it stands and ends; at the latest `GRACE` seconds later all is killed.
    """
    limit = seconds(suite.limit)
    log = suite.output / f"{test}.log"
    arguments = ["-test.v", "-test.run", f"^{test}$", f"-test.timeout={limit:.0f}s", "-test.root", "-no-criu"]
    program = ["sh", "-c", COVER, "sh", str(suite.directory / TEST_PROGRAM), *arguments]
    with log.open("wb") as file, _own_temporary_directory(containerd.home) as temporary:
        process = subprocess.Popen(
            [*NAMESPACES, *program],
            cwd=suite.directory,
            env=_environment(runtime, suite, containerd, temporary),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            process.wait(limit + GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _free(containerd)
    output = log.read_text(errors="replace")
    hung = "panic: test timed out after" in output or process.returncode < 0
    return parse(test, output, hung_after=limit if hung else None)


def _environment(runtime: str, suite: Suite, containerd: Containerd, temporary: Path) -> dict[str, str]:
    """Return the environment of the test program, which its daemon and the shims inherit."""
    kept = {key: value for key, value in os.environ.items() if key in {"HOME", "LANG"}}
    path = [containerd.bin, suite.directory / "bin", *map(Path, ("/usr/bin", "/bin", "/usr/sbin", "/sbin"))]
    return {
        **kept,
        "PATH": ":".join(map(str, path)),
        "TMPDIR": str(temporary),
        "TEST_RUNTIME": runtime,
        "CONFORMANCE_HOME": str(containerd.home),
        "CONFORMANCE_REGISTRY": suite.registry,
        "PYMICRO_CONFIG": str(containerd.settings),
        MARK: str(containerd.home),
    }


@contextmanager
def _own_temporary_directory(home: Path) -> Iterator[Path]:
    """Yield a short directory for a test's temporary files: some of them are sockets, whose paths are limited."""
    directory = home / "tmp"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _free(containerd: Containerd) -> None:
    """Remove what a test that was killed left. Its processes and mounts went with its namespaces."""
    for name in ("root", "state"):
        shutil.rmtree(containerd.home / name, ignore_errors=True)
    hierarchies = [CGROUPS, *(path for path in CGROUPS.iterdir() if path.is_dir())]
    tops = [top for root in hierarchies for name in CGROUP_NAMES for top in root.glob(name)]
    for cgroup in [path for top in tops for path, _, _ in os.walk(top, topdown=False)]:  # some may vanish meanwhile
        with suppress(OSError):
            os.rmdir(cgroup)
