"""The bench's own arithmetic: what it makes of readings, and of what Linux and containerd print."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymicro.shim.requests import Mount

from tests.bench import figures, memory, report, smaps
from tests.bench.figures import Figure
from tests.bench.floor import _in_child
from tests.bench.options import Options, from_environment
from tests.bench.waves import Wave, together
from tests.bench.workload import parse_mounts
from tests.framework.containerd import USUAL, Containerd

# --- options


def test_the_environment_changes_what_is_measured() -> None:
    assert from_environment({}) == Options()
    assert from_environment({"ROUNDS": "2", "WAVES": "5,1,5", "IDLE": ""}) == Options(rounds=2, waves=(1, 5))


@pytest.mark.parametrize("text", ["0", "many", "1,,2", "-1"])
def test_a_number_that_makes_no_sense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="WAVES is"):
        from_environment({"WAVES": text})


# --- figures


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 10), (0.51, 11), (0.99, 20), (1.0, 20)])
def test_a_quantile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    assert figures.quantile(list(range(20, 0, -1)), share) == expected


def test_one_value_is_all_quantiles() -> None:
    assert figures.quantile([7.0], 0.01) == figures.quantile([7.0], 0.99) == 7.0


@pytest.mark.parametrize(
    ("value", "most", "verdict"),
    [(0.15, 0.15, "ok"), (0.151, 0.15, "MISSED"), (None, 0.15, "not measured"), (9.0, None, "")],
)
def test_a_promise_is_kept_up_to_its_limit(value: float | None, most: float | None, verdict: str) -> None:
    assert Figure("x", value, most).verdict == verdict


def test_each_ratio_divides_by_what_it_is_compared_with() -> None:
    readings = {"ready.snapshot": [1.0], "ready.cold": [4.0], "run.snapshot": [3.6], "floor.snapshot": [3.0]}
    readings |= {"run.cold": [12.0], "floor.cold": [12.0], "run.runc": [0.9], "exec.runc": [1.0], "exec.pymicro": [2.5]}
    found = {figure.name: (figure.value, figure.verdict) for figure in figures.ratios(readings)}
    assert found["guest ready: snapshot / cold"] == (0.25, "MISSED")
    assert found["run / its floor: snapshot"] == (1.2, "ok")
    assert found["run / its floor: cold"] == (1.0, "ok")
    assert found["run: snapshot / runc"] == (4.0, "")
    assert found["exec: pymicro / runc"] == (2.5, "")
    assert found["stdout rate: pymicro / runc"] == (None, "not measured")


def test_a_machine_that_is_slow_for_a_round_does_not_change_a_ratio() -> None:
    found = figures.ratio("x", above=[12.0, 60.0, 11.0], below=[10.0, 50.0, 11.0], promised=1.2)
    assert (found.value, found.least, found.most, found.verdict) == (1.2, 1.0, 1.2, "ok")


def test_the_promise_about_waves_is_about_twenty_that_all_succeed() -> None:
    kept = figures.wave_figures({5: 0, 20: 0}, {5: 9.0, 20: 1.9})
    assert [figure.verdict for figure in kept] == ["ok", "ok"]
    assert [figure.verdict for figure in figures.wave_figures({20: 1}, {20: 1.9})] == ["MISSED", "ok"]
    assert [figure.verdict for figure in figures.wave_figures({5: 0}, {5: 1.0})] == ["not measured"] * 2


def test_the_promises_about_memory_are_about_the_whole_pod_and_its_shim() -> None:
    found = figures.memory_figures({"all": 111.0, "shim": 20.0, "guard": 5.0, "anchor": 10.0})
    assert [(figure.value, figure.verdict) for figure in found] == [(111.0, "MISSED"), (20.0, "ok"), (35.0, "")]
    assert {figure.value for figure in figures.memory_figures({})} == {None}


# --- waves


@pytest.fixture
def stand_in(tmp_path: Path) -> Containerd:
    """One that does not run, and whose `ctr` is a shell with a command."""
    containerd = Containerd(USUAL, tmp_path / "home")
    containerd.bin = tmp_path
    script = tmp_path / "ctr"
    script.write_text('#!/bin/sh\neval "$*"\n')
    script.chmod(0o755)
    return containerd


def test_starts_at_once_run_beside_each_other(stand_in: Containerd) -> None:
    begun = time.monotonic()
    seconds, failures = together(stand_in, [("sleep", "0.5")] * 6)
    assert time.monotonic() - begun < 2.5
    assert len(seconds) == 6
    assert min(seconds) >= 0.5
    assert not failures


def test_a_start_that_fails_is_told_with_its_words_and_not_timed(stand_in: Containerd) -> None:
    seconds, failures = together(stand_in, [("true",), ("echo no room >&2; exit 3",)])
    assert len(seconds) == 1
    assert failures == ["no room"]


def test_what_hangs_is_a_failure(stand_in: Containerd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.waves.LIMIT", 0.3)
    seconds, failures = together(stand_in, [("exec sleep 60",), ("true",)])
    assert len(seconds) == 1
    assert failures == ["not within 0.3 s"]


def test_a_wave_of_failures_alone_has_no_quantiles() -> None:
    wave = Wave(2, (), ("no", "no"))
    assert (wave.p50, wave.p99, wave.spread) == (None, None, None)


# --- memory

SMAPS = """\
55e000000000-55e000100000 r--p 00000000 fe:00 1234                       /usr/bin/qemu system-x86_64
Size:               1024 kB
Rss:                 100 kB
Pss:                  50 kB
Anonymous:             4 kB
VmFlags: rd mr mw me sd
7f0000000000-7f0010000000 rw-s 00000000 00:01 175                        /memfd:pymicro-ram (deleted)
Size:             262144 kB
Pss:               27803 kB
Pss_Dirty:         27803 kB
Anonymous:             0 kB
7f1000000000-7f1040000000 rwxp 00000000 00:00 0
Pss:               40960 kB
Anonymous:         40960 kB
7f2000000000-7f2000100000 rw-p 00000000 00:00 0 \n\
Pss:                 300 kB
Anonymous:           300 kB
7f3000000000-7f3000100000 rw-p 00000000 00:00 0                          [heap]
Pss:                 700 kB
Anonymous:           700 kB
7f4000000000-7f4010000000 rw-p 00000000 00:19 99                         /dev/shm/pymicro-templates/k/memory
Pss:                9000 kB
Anonymous:          8000 kB
"""


def test_a_vmms_memory_is_told_apart_by_what_it_is_for() -> None:
    found = [(mapping.part, mapping.pss // 1024) for mapping in smaps.parse(SMAPS)]
    assert found == [
        (smaps.FILES, 50),
        (smaps.GUEST_RAM, 27803),
        (smaps.TRANSLATED, 40960),
        (smaps.ANONYMOUS, 300),
        (smaps.ANONYMOUS, 700),
        (smaps.GUEST_RAM, 9000),
    ]


def test_a_mapping_says_where_it_is_and_whether_its_pages_are_copies() -> None:
    shared, private = [mapping for mapping in smaps.parse(SMAPS) if mapping.part == smaps.GUEST_RAM]
    assert (shared.addresses, shared.shared) == ("7f0000000000-7f0010000000", True)
    assert (private.shared, private.anonymous) == (False, 8000 * 1024)


def test_the_parts_of_this_process_add_up_to_what_linux_says() -> None:
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    expected = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    found = sum(mapping.pss for mapping in smaps.parse(Path("/proc/self/smaps").read_text(encoding="utf-8"))) / 1024
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("name", "command", "kind"),
    [
        ("pymicro-anchor", ["/usr/bin/python3", "containerd-shim-pymicro-v1"], "anchor"),
        ("qemu-system-x86", ["/usr/bin/qemu-system-x86_64", "-name", "virtiofsd"], "qemu"),
        ("cloud-hyperviso", ["/opt/cloud-hypervisor", "--api-socket", "fd=8"], "cloud-hypervisor"),
        ("virtiofsd", ["/usr/lib/qemu/virtiofsd", "--fd=8"], "virtiofsd"),
        ("ld-linux-x86-64", ["/x/ld-linux-x86-64.so.2", "--library-path", "/x", "/x/virtiofsd"], "virtiofsd"),
        ("vhost-device-vs", ["/opt/pymicro/bin/vhost-device-vsock", "--vm"], "vhost-device-vsock"),
        ("other", ["/bin/other"], "other"),
    ],
)
def test_a_pods_process_is_known_by_its_program(name: str, command: list[str], kind: str) -> None:
    assert memory.kind_of(name, command) == kind


def test_a_process_that_the_bench_does_not_know_counts_as_well() -> None:
    with subprocess.Popen(["/bin/sleep", "100"]) as stranger:
        try:
            found = memory.pod_now(os.getpid())
        finally:
            stranger.kill()
    assert found.pss["sleep"] > 0
    assert found.pss["all"] == pytest.approx(found.pss["shim"] + found.pss["sleep"])


def test_the_guests_figures_add_up_to_its_memory() -> None:
    text = "MemTotal:  200000 kB\nMemFree:  150000 kB\nBuffers:  1000 kB\nCached:  9000 kB\nHugePages_Total:  0\n"
    found = memory.guest_says(text)
    assert found["guest: page cache"] == pytest.approx(10.24)
    assert found["guest: in use"] == pytest.approx(40.96)
    assert sum(found.values()) == pytest.approx(204.8)


# --- the floor


def test_a_snapshots_mounts_are_those_that_containerd_prints() -> None:
    text = "mount -t overlay overlay / -o workdir=/w,upperdir=/u,lowerdir=/l:/m,index=off\n"
    options = ("workdir=/w", "upperdir=/u", "lowerdir=/l:/m", "index=off")
    assert parse_mounts(text) == (Mount("overlay", "overlay", "", options),)
    with pytest.raises(ValueError, match="no mount command"):
        parse_mounts("KEY PARENT KIND\n")


def test_a_floor_that_fails_says_why() -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("no VM today")

    assert "no VM today" in _in_child(fail)["error"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell has started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_floor_cleans_up_before_the_bench_goes_on(tmp_path: Path, interruptible: None) -> None:
    def work() -> dict[str, object]:
        (tmp_path / "begun").touch()
        try:
            time.sleep(60)
        finally:
            (tmp_path / "begun").unlink()
        return {}

    def interrupt() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    begun = time.monotonic()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        _in_child(work)
    assert not (tmp_path / "begun").exists()
    assert time.monotonic() - begun < 30


# --- the report


def test_the_report_shows_each_promise_and_a_column_per_count_of_pods(tmp_path: Path) -> None:
    readings = {"ready.snapshot": [0.5, 0.3, 0.4], "ready.cold": [4.0, 4.0, 4.0]}
    usages = [
        memory.Usage(count, {"shim": 17.0, "qemu": 90.0 / count, "all": 107.0}, {"held by its file": 48.0})
        for count in (1, 10)
    ]
    waves = {"pymicro": [Wave(20, tuple(map(float, range(1, 20))), ("no room",))]}
    found = report.Report({"cpus": 2}, readings, waves, usages, 45.0)
    lines = list(report.lines(found))
    assert "guest ready: snapshot / cold           0.10     0.07     0.12   <= 0.15   ok" in lines
    assert "20 at once: failed                     1.00        -        -      <= 0   MISSED" in lines
    assert "MB per idle pod, of                       1       10" in lines
    assert "qemu                                   90.0      9.0" in lines

    report.write(found, tmp_path / "build" / "bench.json")
    facts = json.loads((tmp_path / "build" / "bench.json").read_text())
    assert facts["medians"] == {"ready.snapshot": 0.4, "ready.cold": 4.0}
    assert facts["figures"][0]["name"] == "guest ready: snapshot / cold"
    assert facts["figures"][0]["verdict"] == "ok"
    assert facts["waves"]["pymicro"][0]["failures"] == ["no room"]
    assert [column["pods"] for column in facts["memory_mb"]] == [1, 10]
