"""crun's log and its errors in runc's words."""

from pathlib import Path

import pytest
from pymicro.agent.crun import in_runc_words, last_error

PREFIX = "unable to start container process: exec: "


@pytest.mark.parametrize(
    ("message", "program", "words"),
    [
        (
            "executable file `nope` not found in $PATH: No such file or directory",
            "nope",
            "executable file not found in $PATH",
        ),
        ("executable file `/x/nope` not found: No such file or directory", "/x/nope", "no such file or directory"),
        ("open executable: No such file or directory", "/x", "no such file or directory"),
        ("open executable: Permission denied", "/x", "permission denied"),
        (
            "the path `/etc/passwd` exists but it is not executable: Operation not permitted",
            "/etc/passwd",
            "permission denied",
        ),
        ("the path `/bin` is not a regular file: Operation not permitted", "/bin", "permission denied"),
        ("exec `/x`: Exec format error", "/x", "exec format error"),
    ],
)
def test_runcs_words(message: str, program: str, words: str) -> None:
    assert in_runc_words(message, program) == f'{PREFIX}"{program}": {words}'


@pytest.mark.parametrize(
    "message", ["chdir to `/nope`: No such file or directory", "mount `proc` to `proc`: Permission denied", ""]
)
def test_other_errors_stay(message: str) -> None:
    assert in_runc_words(message, "/bin/sh") == message


def test_last_error_is_the_last_message(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"msg":"a warning","level":"warning"}\n{"msg":"the error","level":"error"}\n\n')
    assert last_error(str(log)) == "the error"
    assert not log.exists()


def test_last_error_of_a_plain_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("not json\n")
    assert last_error(str(log)) == "not json"
    assert last_error(str(log)) == ""
