"""From readings to what is promised: quantiles, ratios and verdicts. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

PROMISED_WAVE = 20
"""How many starts at once the promise about waves is about."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A ratio or an amount, None where it was not measured.

    `promised` is the most that it may be, None without a promise; `least` and `most` are how far single rounds went.
    """

    name: str
    value: float | None
    promised: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def verdict(self) -> str:
        """`ok`, `MISSED`, `not measured`, or nothing where nothing is promised."""
        if self.value is None:
            return "not measured"
        if self.promised is None:
            return ""
        return "ok" if self.value <= self.promised else "MISSED"


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest of `values` that at least `share` (0 to 1) of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def ratio(name: str, above: Sequence[float], below: Sequence[float], promised: float | None = None) -> Figure:
    """Return the median of the ratios of each round, in which both were measured one after the other.

    What slows the machine down for a while slows both, which a ratio of the two medians would not show.
    """
    rounds = [high / low for high, low in zip(above, below, strict=False)]
    if not rounds:
        return Figure(name, None, promised)
    return Figure(name, median(rounds), promised, min(rounds), max(rounds))


def ratios(readings: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Return the ratios of times and rates that were measured in turn, with what is promised of them."""
    compared = (
        ("guest ready: snapshot / cold", "ready.snapshot", "ready.cold", 0.15),
        ("run / its floor: snapshot", "run.snapshot", "floor.snapshot", 1.3),
        ("run / its floor: cold", "run.cold", "floor.cold", 1.15),
        ("run: snapshot / cold", "run.snapshot", "run.cold", None),
        ("run: snapshot / runc", "run.snapshot", "run.runc", None),
        ("run: cold / runc", "run.cold", "run.runc", None),
        ("exec: pymicro / runc", "exec.pymicro", "exec.runc", None),
        ("stdout rate: pymicro / runc", "stdout.pymicro", "stdout.runc", None),
    )
    return [
        ratio(name, readings.get(above, ()), readings.get(below, ()), promised)
        for name, above, below, promised in compared
    ]


def wave_figures(failed: Mapping[int, int], spread: Mapping[int, float | None]) -> list[Figure]:
    """Return what is promised of starts at once: `failed` counts by size of the wave, `spread` is its p99 / p50."""
    size = PROMISED_WAVE
    return [
        Figure(f"{size} at once: failed", float(failed[size]) if size in failed else None, 0.0),
        Figure(f"{size} at once: p99 / p50", spread.get(size), 2.0),
    ]


def memory_figures(pod: Mapping[str, float]) -> list[Figure]:
    """Return what is promised of one idle pod, whose PSS in MB (10^6 bytes) `pod` gives by kind of process."""
    forks = [pod.get(kind, 0.0) for kind in ("shim", "guard", "anchor")]  # they share the shim's pages
    return [
        Figure("idle pod: PSS of all, MB", pod.get("all"), 110.0),
        Figure("idle pod: PSS of the shim, MB", pod.get("shim"), 25.0),
        Figure("idle pod: with guard and anchor", sum(forks) if "shim" in pod else None),
    ]
