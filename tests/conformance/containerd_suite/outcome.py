"""What `go test -v` printed about one test, as data."""

import re
import textwrap
from enum import StrEnum

import msgspec

RESULT = re.compile(r"^--- (PASS|FAIL|SKIP): (\S+) \((\d+\.\d+)s\)$", re.MULTILINE)
MESSAGE = re.compile(r"^ +\w+_test\.go:\d+: ?(.*(?:\n {8}.*)*)", re.MULTILINE)
TESTIFY = re.compile(r"^\s*Error:\s+(.*?)^\s*(?:Test|Messages):", re.MULTILINE | re.DOTALL)


LONGEST = 300
"""Characters of a message: some compare whole configuration files. All of it is in the log."""


class State(StrEnum):
    """How a test ended. BROKEN: the test program ended without a word about it; HUNG: it was ended at its limit."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    BROKEN = "broken"
    HUNG = "hung"


class Outcome(msgspec.Struct, frozen=True):
    """The end of one test; `why` is one line, empty if it passed; `seconds` are those that it took."""

    test: str
    state: State
    seconds: float
    why: str = ""


def parse(test: str, output: str, *, hung_after: float | None = None) -> Outcome:
    """Return how `test` ended, by what the test program printed. `hung_after`: it was ended after so many seconds.

    The lines are those of Go's testing package: `--- FAIL: TestName (1.25s)`, each message `    file_test.go:12: text`,
    its further lines indented by eight columns.
    """
    for word, name, seconds in RESULT.findall(output):
        if name == test:
            state = {"PASS": State.PASSED, "FAIL": State.FAILED, "SKIP": State.SKIPPED}[word]
            return Outcome(test, state, float(seconds), "" if state is State.PASSED else _last_message(output))
    if hung_after is not None:
        return Outcome(test, State.HUNG, hung_after, _last_message(output) or "no message until then")
    return Outcome(test, State.BROKEN, 0.0, _last_line(output))


def _last_message(output: str) -> str:
    """Return the last message of a test: a failed one says last what it failed of. Of testify's, the `Error:` part."""
    messages = MESSAGE.findall(output)
    if not messages:
        return _last_line(output)
    text = messages[-1]
    if found := TESTIFY.search(text):
        text = found[1]
    return textwrap.shorten(text, LONGEST, placeholder=" ...")


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
