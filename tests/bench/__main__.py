"""`make bench`: what a microVM costs over runc and over the bare VMM, all in one run, interleaved.

Quote the ratios: absolute figures are those of this machine at this moment. ROUNDS, WAVES, IDLE and MEGABYTES may be
set in the environment (options.py).
"""

import os
import platform
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.bench import cases, memory, report
from tests.bench.floor import by_hand
from tests.bench.options import Options, from_environment
from tests.bench.waves import Wave, wave
from tests.framework.containerd import USUAL, Containerd

OUTPUT = Path("build/bench.json")
RUNTIMES = {"runc": cases.RUNC, "pymicro": cases.PYMICRO}

Step = Callable[[], Mapping[str, float]]
"""Measures one or more cases, named in what it returns."""


def main() -> int:
    """Measure, print the tables, write build/bench.json."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        options = from_environment(os.environ)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    try:
        with private_containerd() as (containerd, templates):
            found = measure(containerd, templates, options)
    except KeyboardInterrupt:
        say("interrupted; nothing is left behind")
        return 130
    report.write(found, OUTPUT)
    print("\n".join(report.lines(found)))
    print(f"\nwritten to {OUTPUT}")
    return 0


@contextmanager
def private_containerd() -> Iterator[tuple[Containerd, Path]]:
    """Run a containerd, with a directory of its own for templates; nothing of it stays, interrupted or not."""
    containerd = Containerd(USUAL, Path("build/bench"))
    templates = Path(f"/dev/shm/pymicro-bench{str(containerd.home).replace('/', '-')}")
    shutil.rmtree(templates, ignore_errors=True)
    try:
        containerd.start()
        containerd.write_settings(templates={"directory": str(templates)})
        yield containerd, templates
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave half of it
            signal.signal(number, signal.SIG_IGN)
        containerd.stop()
        shutil.rmtree(templates, ignore_errors=True)


def measure(containerd: Containerd, templates: Path, options: Options) -> report.Report:
    """Return all figures: the interleaved cases, then memory, then waves."""
    say("a first start of each kind, not counted")
    cases.run_true(containerd, cases.RUNC)
    cases.run_true(containerd, cases.PYMICRO)
    for start in ("snapshot", "boot"):
        by_hand(containerd, start)
    readings = compare(containerd, options)
    idle = memory.usage(containerd, options.idle, say)
    waves: dict[str, list[Wave]] = defaultdict(list)
    for size in options.waves:
        for name, runtime in RUNTIMES.items():
            say(f"{size} at once, {name}")
            waves[name].append(wave(containerd, runtime, size))
            for failure in waves[name][-1].failures:
                say(f"a start failed: {failure}")
    machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "rounds": options.rounds}
    held = sum(file.stat().st_blocks * 512 for file in templates.rglob("*"))
    return report.Report(machine, readings, waves, idle, held / memory.MEGABYTE)


def compare(containerd: Containerd, options: Options) -> dict[str, list[float]]:
    """Return the readings of the cases that are measured in turn."""
    runc, pymicro = cases.idle(containerd, cases.RUNC), cases.idle(containerd, cases.PYMICRO)
    # what a promise compares stands side by side
    steps: list[Step] = [
        lambda: {"run.runc": cases.run_true(containerd, cases.RUNC)},
        lambda: {"run.snapshot": cases.run_true(containerd, cases.PYMICRO)},
        lambda: _floor(containerd, "snapshot", "snapshot"),
        lambda: _floor(containerd, "boot", "cold"),
        lambda: {"run.cold": cases.run_true(containerd, cases.PYMICRO, *cases.COLD)},
        lambda: {"exec.runc": cases.exec_true(runc), "exec.pymicro": cases.exec_true(pymicro)},
        lambda: {"stdout.runc": cases.stdout_rate(runc, options.megabytes)},
        lambda: {"stdout.pymicro": cases.stdout_rate(pymicro, options.megabytes)},
    ]
    try:
        return interleaved(steps, options.rounds)
    finally:
        runc.remove()
        pymicro.remove()


def _floor(containerd: Containerd, start: str, name: str) -> dict[str, float]:
    found = by_hand(containerd, start)
    return {f"ready.{name}": found.ready, f"floor.{name}": found.run}


def interleaved(steps: list[Step], rounds: int) -> dict[str, list[float]]:
    """Run every step in turn, `rounds` times over, so that a machine whose speed drifts drifts for all of them."""
    readings: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        for step in steps:
            for name, value in step().items():
                readings[name].append(value)
    return readings


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
