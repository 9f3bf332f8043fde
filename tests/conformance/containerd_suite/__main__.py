"""`make conformance`: containerd's own client suite with runc and with pymicro, and where they differ.

TESTS="TestOne TestTwo" chooses; ALL=1 also runs what is on the list of expected skips; TEST_LIMIT is each test's, in
seconds.
"""

import os
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from tests.conformance.containerd_suite import source
from tests.conformance.containerd_suite.expected import LIST, ListError, expected_skips
from tests.conformance.containerd_suite.images import write_images
from tests.conformance.containerd_suite.outcome import Outcome, State
from tests.conformance.containerd_suite.run import Suite, laid_out, run
from tests.conformance.containerd_suite.verdict import Kind, Verdict, judge, lines
from tests.framework.containerd import ContainerdError
from tests.framework.debian import ToolError
from tests.framework.golang import MODULE, GoMissing
from tests.framework.oci import Blobs
from tests.framework.registry import serving

RUNC, PYMICRO = "io.containerd.runc.v2", "io.containerd.pymicro.v1"
OUTPUT = Path("build/conformance")
LIMIT = 3600.0
"""Seconds for one test: one has `seq` print 7 MB a hundred times, which takes an emulated CPU half an hour."""

SETTINGS: dict[str, dict[str, object]] = {"vm": {"host_pid": "guest"}}
"""pymicro's settings, where not the default: two tests end what runs in the host's PID namespace, here the VM's."""


class Options(msgspec.Struct, frozen=True):
    """What is asked for: the tests (none: all), whether the expected skips are run too, a test's limit in seconds."""

    tests: tuple[str, ...]
    all: bool
    limit: float


class UsageError(Exception):
    """What is asked for makes no sense; the message says what would."""


def main() -> int:
    """Run the suite and print the comparison. Returns 0, 1 if a test fails that should pass, 2 if it cannot be run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    try:
        options = from_environment(os.environ)
        skips = expected_skips(LIST.read_text())
        suite = source.built_suite()
        names = source.test_names(suite)
        verdicts = compare(chosen(names, options.tests, skips), suite, skips, options)
    except GoMissing as error:
        print(
            f"conformance: {error}.\nIt would have run {MODULE} {source.RELEASE.version}'s integration/client"
            " with runc and with pymicro.\n0 passed, 0 failed, 0 skipped"
        )
        return 0
    except (ListError, UsageError, ContainerdError, ToolError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return 130
    print("\n" + "\n".join(lines(verdicts)))
    return int(any(verdict.kind is Kind.FAILED for verdict in verdicts))


def from_environment(environment: Mapping[str, str]) -> Options:
    """Return what the variables TESTS, ALL and TEST_LIMIT ask for. Raises UsageError."""
    limit = environment.get("TEST_LIMIT") or str(LIMIT)
    try:
        seconds = float(limit)
    except ValueError:
        seconds = 0.0
    if not seconds >= 1:  # also what is no number
        raise UsageError(f"TEST_LIMIT is {limit!r}; it is each test's time limit in seconds, by default {LIMIT:.0f}")
    return Options(tuple(environment.get("TESTS", "").split()), bool(environment.get("ALL")), seconds)


def chosen(names: Sequence[str], wanted: Collection[str], skips: Collection[str]) -> list[str]:
    """Return which tests to run, `wanted` or all. Raises UsageError for a name that the suite does not have."""
    if unknown := sorted({*wanted, *skips} - set(names)):
        raise UsageError(f"the suite of containerd {source.RELEASE.version} has no {', '.join(unknown)}")
    return [name for name in names if not wanted or name in wanted]


def compare(names: Sequence[str], directory: Path, skips: Mapping[str, str], options: Options) -> list[Verdict]:
    """Run each test with runc, then, where that passes, with pymicro. What they print is below build/conformance."""
    blobs = Blobs()
    images = write_images(blobs)
    output = OUTPUT.resolve()
    verdicts: list[Verdict] = []
    for runtime in ("runc", "pymicro"):
        (output / runtime).mkdir(parents=True, exist_ok=True)
    with serving(blobs, images) as registry, laid_out(output / "containerd", SETTINGS) as containerd:

        def run_with(name: str, runtime: str) -> Outcome:
            kind = runtime.split(".")[2]
            outcome = run(name, runtime, Suite(directory, registry, output / kind, options.limit), containerd)
            why = f"  {outcome.why}" if outcome.why else ""
            print(f"{kind:8} {name:45} {outcome.state:8} {outcome.seconds:6.1f} s{why}", flush=True)
            return outcome

        for name in names:
            runc = run_with(name, RUNC)
            wanted = runc.state is State.PASSED and (options.all or name not in skips)
            verdicts.append(judge(runc, run_with(name, PYMICRO) if wanted else None, skips.get(name)))
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
