"""What a guest can bring about again and again does not fill the host's log."""

import logging

import pytest
from pymicro.shim.sparing import MOST, Sparing


def test_the_first_warnings_are_said_and_that_there_are_more(caplog: pytest.LogCaptureFixture) -> None:
    warn = Sparing(logging.getLogger("test"))
    with caplog.at_level(logging.INFO):
        for number in range(MOST * 100):
            warn("number %d", number)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"number {number}" for number in range(MOST)
    ]
    assert len(caplog.records) == MOST + 1
