"""`pymicroctl ps`: the sandboxes of this host, from their run directories, and what their VMs take."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pymicro.shim import state

Condition = Literal["booting", "running", "dead"]


@dataclass(frozen=True, slots=True)
class Row:
    """A sandbox. Memory in MiB as the VM sees it; RSS and PSS of the VMM in bytes, None where they cannot be read."""

    sandbox: str
    namespace: str
    condition: Condition
    vmm_pid: int | None
    shim_pid: int | None
    vcpus: int | None
    memory_mib: int | None
    rss: int | None
    pss: int | None
    accel: str | None
    age_seconds: float | None
    containers: tuple[str, ...]
    directory: str


def run(*, as_json: bool) -> int:
    """Print the sandboxes; return the exit status."""
    rows = list(sandboxes(state.DEFAULT_RUN))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print("\n".join(table(rows)))
    return 0


def sandboxes(run_directory: str) -> Iterator[Row]:
    """Yield the sandboxes below `run_directory`, the oldest first; a directory without a readable state is skipped."""
    with suppress(FileNotFoundError):
        recorded = [(directory, state.read(str(directory))) for directory in Path(run_directory).iterdir()]
        rows = [_row(directory, facts) for directory, facts in recorded if facts]
        yield from sorted(rows, key=lambda row: -(row.age_seconds or 0))


def _row(directory: Path, recorded: dict[str, Any]) -> Row:  # JSON, of a shim that may be another version
    shim_runs = state.shim_runs(recorded)
    vmm_pid = recorded.get("vmm_pid")
    rss = pss = None
    condition: Condition = "booting" if shim_runs else "dead"
    if shim_runs and isinstance(vmm_pid, int) and (memory := _memory(vmm_pid, recorded["shim_pid"])):
        condition = "running"
        rss, pss = memory
    elif vmm_pid is not None:
        condition = "dead"
    created = recorded.get("created_at")
    return Row(
        sandbox=str(recorded.get("sandbox", "?")),
        namespace=str(recorded.get("namespace", "?")),
        condition=condition,
        vmm_pid=vmm_pid,
        shim_pid=recorded.get("shim_pid"),
        vcpus=recorded.get("vcpus"),
        memory_mib=recorded.get("memory_mib"),
        rss=rss,
        pss=pss,
        accel=recorded.get("accel"),
        age_seconds=max(time.time() - created, 0) if isinstance(created, int | float) else None,
        containers=tuple(dict.fromkeys(map(str, recorded.get("containers") or ()))),
        directory=str(directory),
    )


def _memory(vmm_pid: int, shim_pid: int) -> tuple[int, int | None] | None:
    """Return RSS and PSS of the VMM; None if it is gone, or if its pid belongs to another process by now."""
    import psutil

    try:
        vmm = psutil.Process(vmm_pid)
        if vmm.ppid() != shim_pid or vmm.status() == psutil.STATUS_ZOMBIE:
            return None
        rss = vmm.memory_info().rss
        try:
            return rss, vmm.memory_full_info().pss
        except psutil.AccessDenied:
            return rss, None
    except psutil.NoSuchProcess:
        return None


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    cells = [("SANDBOX", "NAMESPACE", "STATE", "VMM PID", "CPUS", "MEMORY", "RSS", "PSS", "ACCEL", "AGE", "CONTAINERS")]
    cells += [
        (
            row.sandbox,
            row.namespace,
            row.condition,
            _text(row.vmm_pid),
            _text(row.vcpus),
            _text(row.memory_mib, " MiB"),
            _size(row.rss),
            _size(row.pss),
            _text(row.accel),
            _age(row.age_seconds),
            ",".join(row.containers) or "-",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _text(value: object, unit: str = "") -> str:
    return "-" if value is None else f"{value}{unit}"


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / (1 << 20):.0f} MiB"


def _age(seconds: float | None) -> str:
    """Return an age in its two largest units, as people read it: 42s, 3m07s, 5h12m, 2d03h."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
