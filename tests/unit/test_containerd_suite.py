"""The conformance suite's own parts: what Go's tests print, the list of skips, the comparison, images and registry."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conformance.containerd_suite import __main__ as command
from tests.conformance.containerd_suite.expected import LIST, ListError, expected_skips
from tests.conformance.containerd_suite.outcome import Outcome, State, parse
from tests.conformance.containerd_suite.verdict import Kind, Verdict, judge, lines
from tests.framework.golang import MODULE
from tests.framework.oci import Blobs, Layer
from tests.framework.registry import serving

# --- what `go test -v` prints

PASSED = """time="2026-01-02T03:04:05Z" level=info msg="running tests against containerd"
=== RUN   TestUser
=== RUN   TestUser/ByName
--- PASS: TestUser (1.81s)
    --- PASS: TestUser/ByName (0.46s)
PASS
"""
FAILED = """=== RUN   TestUser
    log_hook.go:47: time="2026-01-02T03:04:05Z" level=debug msg=resolving
    container_test.go:12: the first
    container_test.go:34: expected status 7 from wait
        but received 1
--- FAIL: TestUser (12.50s)
FAIL
"""
TESTIFY = """=== RUN   TestUser
    container_linux_test.go:99: 
        \tError Trace:\t/src/container_linux_test.go:99
        \tError:      \tReceived unexpected error:
        \t            \tcontext deadline exceeded
        \tTest:       \tTestUser
--- FAIL: TestUser (0.10s)
"""  # noqa: W291 - as testify prints it
SKIPPED = """=== RUN   TestUser
    container_test.go:56: test requires cgroup1
--- SKIP: TestUser (0.00s)
PASS
"""


def test_a_test_that_passed_has_its_time_and_no_reason() -> None:
    assert parse("TestUser", PASSED) == Outcome("TestUser", State.PASSED, 1.81)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (FAILED, Outcome("TestUser", State.FAILED, 12.5, "expected status 7 from wait but received 1")),
        (TESTIFY, Outcome("TestUser", State.FAILED, 0.1, "Received unexpected error: context deadline exceeded")),
        (SKIPPED, Outcome("TestUser", State.SKIPPED, 0.0, "test requires cgroup1")),
    ],
)
def test_a_test_that_did_not_pass_says_why_in_one_line(output: str, expected: Outcome) -> None:
    assert parse("TestUser", output) == expected


def test_of_a_long_message_the_beginning_is_told() -> None:
    why = parse("TestUser", FAILED.replace("but received 1", "but received 1 " * 1000)).why

    assert why.startswith("expected status 7 from wait but received 1 but")
    assert why.endswith(" ...")
    assert len(why) <= 300


def test_the_result_of_another_test_is_not_taken_for_this_ones() -> None:
    assert parse("TestUs", PASSED).state is State.BROKEN
    assert parse("TestUser/ByName", PASSED).state is State.BROKEN


def test_a_program_that_ends_without_a_result_is_broken_and_its_last_line_says_why() -> None:
    assert parse("TestUser", "\ncontainerd: cannot listen\n\n") == Outcome(
        "TestUser", State.BROKEN, 0.0, "containerd: cannot listen"
    )
    assert parse("TestUser", "").why == "it printed nothing"


def test_a_test_that_was_ended_at_its_limit_hung_even_if_go_calls_it_failed() -> None:
    unfinished = (
        "=== RUN   TestUser\n    container_test.go:12: waiting for the exit\npanic: test timed out after 4m0s\n"
    )
    assert parse("TestUser", unfinished, hung_after=240) == Outcome("TestUser", State.HUNG, 240, "waiting for the exit")


# --- the list of expected skips


def test_the_committed_list_can_be_read() -> None:
    assert all(expected_skips(LIST.read_text()).values())


def test_a_reason_over_several_lines_is_one_line() -> None:
    assert expected_skips('[TestOne]\nreason = """\nfirst\n  second\n"""\n') == {"TestOne": "first second"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[TestOne]\n", "reason"),
        ('[TestOne]\nreason = " "\n', "TestOne"),
        ('[One]\nreason = "why"\n', "One"),
        ('[TestOne]\nreason = "why"\nsince = 3\n', "since"),
        ("TestOne", "expected.toml"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_by_the_word_that_is_wrong(text: str, said: str) -> None:
    with pytest.raises(ListError, match=said):
        expected_skips(text)


# --- the comparison


def outcome(state: State, why: str = "") -> Outcome:
    return Outcome("TestOne", state, 1.0, why)


@pytest.mark.parametrize(
    ("runc", "pymicro", "reason", "expected"),
    [
        (State.PASSED, State.PASSED, None, Kind.PASSED),
        (State.PASSED, State.FAILED, None, Kind.FAILED),
        (State.PASSED, State.SKIPPED, None, Kind.FAILED),
        (State.PASSED, State.HUNG, None, Kind.FAILED),
        (State.PASSED, None, None, Kind.FAILED),
        (State.PASSED, None, "a VM", Kind.SKIPPED),
        (State.PASSED, State.FAILED, "a VM", Kind.SKIPPED),
        (State.PASSED, State.PASSED, "a VM", Kind.FAILED),
        (State.FAILED, None, None, Kind.NOT_HERE),
        (State.SKIPPED, None, "a VM", Kind.NOT_HERE),
    ],
)
def test_only_what_runc_passes_counts_and_only_what_is_listed_may_fail(
    runc: State, pymicro: State | None, reason: str | None, expected: Kind
) -> None:
    assert judge(outcome(runc), outcome(pymicro) if pymicro else None, reason).kind is expected


def test_a_listed_test_that_hangs_is_a_failure_all_the_same() -> None:
    assert judge(outcome(State.PASSED), outcome(State.HUNG), "a VM").kind is Kind.FAILED


def test_a_listed_test_that_passes_says_that_the_list_is_out_of_date() -> None:
    assert "off the list" in judge(outcome(State.PASSED), outcome(State.PASSED), "a VM").why


def test_the_report_names_each_difference_and_ends_with_the_figures() -> None:
    verdicts = [
        *(Verdict(f"TestFine{number}", Kind.PASSED) for number in range(17)),
        Verdict("TestWrong", Kind.FAILED, "expected 7 but received 1"),
        Verdict("TestHost", Kind.SKIPPED, "the host's own PIDs"),
        Verdict("TestAway", Kind.NOT_HERE, "with runc: failed: no such host"),
    ]
    report = lines(verdicts)
    assert {"  TestWrong: expected 7 but received 1", "  TestHost: the host's own PIDs"} <= set(report)
    assert report[-2:] == [
        "pymicro passes 17 of the 19 tests that runc passes (89.5 %)",
        "17 passed, 1 failed, 2 skipped",
    ]


# --- what is asked for


def test_the_environment_chooses_tests_and_limit() -> None:
    assert command.from_environment({}) == command.Options((), all=False, limit=command.LIMIT)
    chosen = command.from_environment({"TESTS": "TestOne TestTwo", "ALL": "1", "TEST_LIMIT": "30"})
    assert chosen == command.Options(("TestOne", "TestTwo"), all=True, limit=30)


@pytest.mark.parametrize("limit", ["soon", "0", "-1", "nan"])
def test_a_limit_that_makes_no_sense_is_refused(limit: str) -> None:
    with pytest.raises(command.UsageError, match="LIMIT"):
        command.from_environment({"TEST_LIMIT": limit})


@pytest.mark.parametrize(("wanted", "listed"), [(["TestOne", "TestTree"], []), ([], ["TestTree"])])
def test_a_test_that_the_suite_does_not_have_is_refused_by_name(wanted: Sequence[str], listed: Sequence[str]) -> None:
    with pytest.raises(command.UsageError, match=r"has no TestTree$"):
        command.chosen(["TestOne", "TestTwo"], wanted, listed)


@pytest.mark.parametrize("version", [None, "go1.19.8"])
def test_without_a_go_that_can_build_it_the_command_says_what_it_would_have_run(
    version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if version:
        go = tmp_path / "go"
        go.write_text(f"#!/bin/sh\necho {version}\n")
        go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nonexistent" if version is None else f"{tmp_path}:/usr/bin:/bin")
    assert command.main() == 0
    said = capsys.readouterr().out
    assert MODULE in said and "integration/client" in said and "1.24 or newer" in said


# --- images and their registry


def test_what_is_served_can_be_pulled_by_tag_and_by_digest() -> None:
    blobs = Blobs()
    layer = Layer()
    layer.file("hello", b"hello\n")
    index = blobs.add_index([blobs.add_image([layer.data()], ["sh"], created_by="a test")])
    with serving(blobs, {"some/image:1": index}) as registry:

        def get(path: str, method: str = "GET") -> tuple[bytes, str]:
            request = urllib.request.Request(f"http://{registry}/v2/some/image/{path}", method=method)
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.read(), response.headers["Docker-Content-Digest"]

        assert get("manifests/1", "HEAD") == (b"", index["digest"])
        document, _ = get(f"manifests/{index['digest']}")
        (entry,) = json.loads(document)["manifests"]
        manifest = json.loads(get(f"manifests/{entry['digest']}")[0])
        assert get(f"blobs/{manifest['layers'][0]['digest']}")[0] == layer.data()
        for missing in ("manifests/2", f"blobs/sha256:{'0' * 64}"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(missing)
