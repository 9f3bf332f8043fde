"""The guest's clock follows the host's, which each request tells; the tests set no clock."""

import time

import pytest
from pymicro.agent import clock

SECOND = 10**9


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """To what the wall clock is set, instead of setting it."""
    made: list[int] = []
    monkeypatch.setattr(time, "clock_settime_ns", lambda _clock, moment: made.append(moment))
    return made


@pytest.mark.parametrize("back", [True, False])
def test_a_clock_that_is_behind_is_set_to_what_the_host_told(settings: list[int], *, back: bool) -> None:
    told = time.time_ns() + 3 * SECOND
    clock.follow(told, back=back)
    assert settings == [told]


def test_a_request_that_took_long_does_not_set_the_clock_back(settings: list[int]) -> None:
    clock.follow(time.time_ns() - 3 * SECOND, back=False)
    assert settings == []


def test_the_first_request_sets_the_clock_whatever_the_template_had(settings: list[int]) -> None:
    told = time.time_ns() - 3600 * SECOND
    clock.follow(told, back=True)
    assert settings == [told]


def test_a_clock_that_is_right_is_left_alone(settings: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 5 * SECOND)
    clock.follow(5 * SECOND + clock.LEAST_NS - 1, back=True)
    clock.follow(5 * SECOND - clock.LEAST_NS + 1, back=True)
    assert settings == []
