"""`make bench`: what a microVM costs over runc and over the bare VMM, all in one run, interleaved.

Quote the ratios: absolute times are those of this machine at this moment. ROUNDS (default 5) and WAVES (default 1,5,10)
may be set in the environment.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tests.bench import cases
from tests.bench.floor import seconds_to_hello
from tests.framework.containerd import Containerd

ROUNDS = int(os.environ.get("ROUNDS", "5"))
WAVES = [int(size) for size in os.environ.get("WAVES", "1,5,10").split(",")]
OUTPUT = Path("build/bench.json")
COLD = ("--annotation", "io.pymicro.start=boot")


def main() -> int:
    """Measure, print the table, write build/bench.json."""
    containerd = Containerd("2.1", Path("build/bench"))
    containerd.start()
    try:
        report = measure(containerd)
    finally:
        containerd.stop()
    OUTPUT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report)
    print(f"\nwritten to {OUTPUT}")
    return 0


def measure(containerd: Containerd) -> dict[str, dict[str, object]]:
    """Return all figures: medians of the interleaved cases, then memory and waves."""
    say("a first start of each kind, not counted")
    cases.run_true(containerd, cases.RUNC)
    cases.run_true(containerd, cases.PYMICRO)
    runc, pymicro = cases.idle(containerd, cases.RUNC), cases.idle(containerd, cases.PYMICRO)
    try:
        steps: dict[str, Callable[[], float]] = {
            "run.runc": lambda: cases.run_true(containerd, cases.RUNC),
            "run.snapshot": lambda: cases.run_true(containerd, cases.PYMICRO),
            "run.cold": lambda: cases.run_true(containerd, cases.PYMICRO, *COLD),
            "floor.snapshot": lambda: seconds_to_hello(containerd.settings, "snapshot"),
            "floor.cold": lambda: seconds_to_hello(containerd.settings, "boot"),
            "exec.runc": lambda: cases.exec_true(runc),
            "exec.pymicro": lambda: cases.exec_true(pymicro),
            "stdout.runc": lambda: cases.stdout_rate(runc),
            "stdout.pymicro": lambda: cases.stdout_rate(pymicro),
        }
        readings = interleaved(steps, ROUNDS)
        memory = cases.memory(pymicro)
    finally:
        runc.remove()
        pymicro.remove()
    medians = {name: median(values) for name, values in readings.items()}
    return {
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "rounds": ROUNDS},
        "readings": dict(readings),
        "medians": dict(medians),
        "ratios": dict(ratios(medians)),
        "pss_mib": {**memory, "all": sum(memory.values())},
        "waves": {str(size): quantiles(containerd, size) for size in WAVES},
    }


def interleaved(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every step in turn, `rounds` times over, so that a machine whose speed drifts drifts for all of them."""
    readings: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        for name, step in steps.items():
            readings[name].append(step())
    return readings


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """Return the ratios that the project's promises are about."""
    return {
        "run: snapshot / runc": medians["run.snapshot"] / medians["run.runc"],
        "run: cold / runc": medians["run.cold"] / medians["run.runc"],
        "run / its floor, snapshot": medians["run.snapshot"] / medians["floor.snapshot"],
        "run / its floor, cold": medians["run.cold"] / medians["floor.cold"],
        "guest ready: snapshot / cold": medians["floor.snapshot"] / medians["floor.cold"],
        "exec: pymicro / runc": medians["exec.pymicro"] / medians["exec.runc"],
        "stdout rate: pymicro / runc": medians["stdout.pymicro"] / medians["stdout.runc"],
    }


def quantiles(containerd: Containerd, size: int) -> dict[str, float]:
    """Return the median and the last of `size` starts at once, in seconds."""
    say(f"{size} at once")
    took = cases.wave(containerd, cases.PYMICRO, size)
    return {"p50": median(took), "p99": took[min(len(took) - 1, int(len(took) * 0.99))]}


def print_report(report: dict[str, dict[str, object]]) -> None:
    """Print the figures as a table; times in seconds, rates in MB/s, memory in MiB."""
    for title in ("medians", "ratios", "pss_mib"):
        print(f"\n{title}")
        for name, value in report[title].items():
            print(f"  {name:34}{value:10.2f}")
    print("\nstarts at once (s)")
    for size, value in report["waves"].items():
        print(f"  {size:34}{value}")


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
