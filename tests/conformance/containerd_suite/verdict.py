"""The comparison of both runtimes: what counts, and how it is told."""

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from tests.conformance.containerd_suite.outcome import Outcome, State


class Kind(StrEnum):
    """What one test says about pymicro."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    NOT_HERE = "not here"  # runc does not pass it on this machine either


class Verdict(msgspec.Struct, frozen=True):
    """One test's, with the reason where it did not pass."""

    test: str
    kind: Kind
    why: str = ""


def judge(runc: Outcome, pymicro: Outcome | None, skip_reason: str | None) -> Verdict:
    """Compare the outcomes of one test. `pymicro` is None where it was not run; `skip_reason` is the list's, if any.

    A test that is on the list and passes all the same is a failure: the list would claim what is no longer so. One that
    hangs always is.
    """
    if runc.state is not State.PASSED:
        return Verdict(runc.test, Kind.NOT_HERE, f"with runc: {runc.state}: {runc.why}")
    hung = pymicro is not None and pymicro.state is State.HUNG
    passed = pymicro is not None and pymicro.state is State.PASSED
    if skip_reason is not None and not hung:
        if passed:
            return Verdict(runc.test, Kind.FAILED, "it passes: take it off the list of expected skips")
        return Verdict(runc.test, Kind.SKIPPED, skip_reason)
    if passed:
        return Verdict(runc.test, Kind.PASSED)
    return Verdict(runc.test, Kind.FAILED, f"{pymicro.state}: {pymicro.why}" if pymicro else "it was not run")


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the report: the tests that differ, what that makes of them, and the closing line."""
    by_kind = {kind: [verdict for verdict in verdicts if verdict.kind is kind] for kind in Kind}
    report: list[str] = []
    for kind, title in (
        (Kind.NOT_HERE, "runc does not pass these here, so they say nothing about pymicro"),
        (Kind.SKIPPED, "runc passes these, pymicro is not expected to"),
        (Kind.FAILED, "runc passes these, pymicro does not"),
    ):
        if by_kind[kind]:
            report += [f"{title}:", *(f"  {each.test}: {each.why}" for each in by_kind[kind]), ""]
    return [*report, *_closing(by_kind)]


def _closing(by_kind: Mapping[Kind, Sequence[Verdict]]) -> list[str]:
    passed, failed, skipped, not_here = (
        len(by_kind[kind]) for kind in (Kind.PASSED, Kind.FAILED, Kind.SKIPPED, Kind.NOT_HERE)
    )
    of_runc = passed + failed + skipped
    share = f" ({100 * passed / of_runc:.1f} %)" if of_runc else ""
    return [
        f"pymicro passes {passed} of the {of_runc} tests that runc passes{share}",
        f"{passed} passed, {failed} failed, {skipped + not_here} skipped",
    ]
