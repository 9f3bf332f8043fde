"""The figures of one run of the bench, as JSON and as tables."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tests.bench.figures import Figure, memory_figures, ratios, wave_figures
from tests.bench.memory import Usage
from tests.bench.waves import Wave


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured: `readings` by case (seconds; `stdout` MB/s), `waves` by runtime, `memory` by count."""

    machine: Mapping[str, object]
    readings: Mapping[str, Sequence[float]]
    waves: Mapping[str, Sequence[Wave]]
    memory: Sequence[Usage]
    template_mb: float

    @property
    def medians(self) -> dict[str, float]:
        return {name: median(values) for name, values in self.readings.items()}

    @property
    def figures(self) -> list[Figure]:
        """The ratios, and what else is promised."""
        waves = {wave.size: wave for wave in self.waves.get("pymicro", ())}
        failed = {size: len(wave.failures) for size, wave in waves.items()}
        spread = {size: wave.spread for size, wave in waves.items()}
        one_pod = self.memory[0].pss if self.memory and self.memory[0].pods == 1 else {}
        return [*ratios(self.readings), *wave_figures(failed, spread), *memory_figures(one_pod)]


def write(report: Report, file: Path) -> None:
    """Write the report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "machine": report.machine,
        "readings": report.readings,
        "medians": report.medians,
        "figures": [{**asdict(figure), "verdict": figure.verdict} for figure in report.figures],
        "waves": {runtime: [_wave(wave) for wave in waves] for runtime, waves in report.waves.items()},
        "memory_mb": [asdict(usage) for usage in report.memory],
        "template_mb": report.template_mb,
    }
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _wave(wave: Wave) -> dict[str, object]:
    return {**asdict(wave), "p50": wave.p50, "p99": wave.p99}


def lines(report: Report) -> Iterator[str]:
    """Yield the report as tables."""
    yield f"{'':34}{'median':>9}{'least':>9}{'most':>9}   seconds; stdout: MB/s"
    for name, values in report.readings.items():
        yield f"{name:34}{median(values):9.2f}{min(values):9.2f}{max(values):9.2f}"
    yield ""
    yield f"{'':34}{'measured':>9}{'least':>9}{'most':>9}{'promised':>10}"
    yield from (_figure(figure) for figure in report.figures)
    yield ""
    yield f"{'at once':34}{'p50':>9}{'p99':>9}{'p99/p50':>9}{'failed':>8}   seconds"
    yield from (_wave_line(runtime, wave) for runtime, waves in report.waves.items() for wave in waves)
    yield ""
    yield from _memory_lines(report.memory)
    yield f"{'the template, once per host':34}{report.template_mb:9.1f}"


def _figure(figure: Figure) -> str:
    numbers = "".join(map(_number, (figure.value, figure.least, figure.most)))
    promised = "" if figure.promised is None else f"<= {figure.promised:g}"
    return f"{figure.name:34}{numbers}{promised:>10}   {figure.verdict}".rstrip()


def _wave_line(runtime: str, wave: Wave) -> str:
    name = f"{runtime}, {wave.size}"
    return f"{name:34}{_number(wave.p50)}{_number(wave.p99)}{_number(wave.spread)}{len(wave.failures):8}"


def _memory_lines(memory: Sequence[Usage]) -> Iterator[str]:
    """Yield a column per count of pods; each row is what one of them takes."""
    if not memory:
        return
    yield f"{'MB per idle pod, of':34}" + "".join(f"{usage.pods:9}" for usage in memory)
    yield from _rows([usage.pss for usage in memory])
    yield "guest RAM"
    yield from _rows([usage.ram for usage in memory], indent="  ")


def _rows(columns: Sequence[Mapping[str, float]], indent: str = "") -> Iterator[str]:
    for name in dict.fromkeys(name for column in columns for name in column):
        shown = indent + (f"  {name.partition(': ')[2]}" if name.startswith("qemu: ") else name)
        yield f"{shown:34}" + "".join(_number(column.get(name), 1) for column in columns)


def _number(value: float | None, digits: int = 2) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.{digits}f}"
