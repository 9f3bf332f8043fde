"""Small pieces: what is read from a bundle, log lines, timelines, and what -v and -info say."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pymicro.shim import early, logs
from pymicro.shim.bundle import Bundle
from pymicro.shim.errors import InvalidRequest
from pymicro.shim.timeline import Timeline

# --- bundles


def bundle(tmp_path: Path, spec: Any) -> Bundle:  # JSON of any kind
    (tmp_path / "config.json").write_text(json.dumps(spec))
    return Bundle.load(str(tmp_path))


def test_what_is_read_from_a_spec(tmp_path: Path) -> None:
    found = bundle(
        tmp_path,
        {
            "annotations": {"a": "b"},
            "linux": {
                "cgroupsPath": "/default/c1",
                "resources": {"memory": {"limit": 1}},
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/var/run/netns/x"}],
            },
        },
    )
    assert found.annotations == {"a": "b"}
    assert found.cgroups_path == "/default/c1"
    assert found.resources == {"memory": {"limit": 1}}
    assert found.netns_path == "/var/run/netns/x"


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"linux": None, "annotations": None},
        {"linux": {}},
        {"linux": {"namespaces": None, "resources": None, "cgroupsPath": None}},
        {"linux": {"namespaces": [{"type": "network"}]}},
    ],
)
def test_what_is_absent_is_empty(tmp_path: Path, spec: object) -> None:
    """Go writes null for what is empty, or leaves it out."""
    found = bundle(tmp_path, spec)
    assert (found.annotations, found.cgroups_path, found.resources, found.netns_path) == ({}, "", {}, "")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7"])
def test_config_that_makes_no_sense(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidRequest, match=r"config\.json (is not JSON|holds no JSON object)"):
        Bundle.load(str(tmp_path))


def test_config_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot read .*config\.json: No such file"):
        Bundle.load(str(tmp_path))


# --- logs


def test_early_warnings_wait_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    early.hold()
    early.warning("pymicro.a", "100 % early")
    early.warning("pymicro.b", "early too")
    assert not caplog.records
    early.release()
    early.warning("pymicro.c", "late")
    early.release()
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("pymicro.a", "100 % early"),
        ("pymicro.b", "early too"),
        ("pymicro.c", "late"),
    ]


BEFORE = "import logging\nfrom pymicro.shim import logs\nlogs.set_up('info')\nlog = logging.getLogger('x')\n"


def lines_of(script: str) -> list[str]:
    """Run `script` with the shim's logging on a pipe, and return what it writes."""
    result = subprocess.run([sys.executable, "-c", BEFORE + script], capture_output=True, text=True, check=True)
    return result.stderr.splitlines()


def test_lines_are_as_containerds_own_shims_write_them() -> None:
    (line,) = lines_of("log.info('sandbox %s: %s', 'c1', 'is \"up\"')\nlog.debug('too much')")
    assert re.fullmatch(r'time="\d{4}-\d\d-\d\dT\S+" level=info runtime=pymicro msg="sandbox c1: is \\"up\\""', line)


def test_one_record_is_one_line() -> None:
    """A guest's words are in them: they must not be able to forge a line, nor to control a terminal."""
    lines = lines_of("log.warning('%s', 'one\\ntime=\"x\" level=error\\r\\x1b[31m two')\n")
    assert len(lines) == 1
    assert "\x1b" not in lines[0]
    (line,) = lines_of("try: 1 / 0\nexcept ZeroDivisionError: log.exception('failed')")
    assert "ZeroDivisionError" in line


def test_text_of_a_guest_that_looks_like_json_is_quoted() -> None:
    (line,) = lines_of("log.error('%s', '{\"forged\": 1}\\nlevel=error')")
    assert "\n" not in line


def test_full_pipe_does_not_stop_the_shim() -> None:
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    saved = os.dup(2)
    try:
        os.dup2(sink, 2)
        handler = logs.FifoHandler()
        record = logging.LogRecord("x", logging.INFO, "x", 1, "x" * 4000, None, None)
        for _ in range(100):
            handler.emit(record)
    finally:
        os.dup2(saved, 2)
        for fd in (saved, source, sink):
            os.close(fd)


def test_timelines_stay_json_for_programs_that_read_them() -> None:
    (line,) = lines_of("from pymicro.shim.timeline import Timeline\nTimeline(0).log('c1')")
    assert json.loads(line.partition(" msg=")[2])["container"] == "c1"


# --- timelines


def test_timeline_is_one_json_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    begun = time.monotonic_ns()
    timeline = Timeline(begun)
    now = timeline.span("shim", begun)
    timeline.span("vmm", now - 5_000_000, now)
    timeline.record("guest_kernel", 12.345)
    timeline.log("c1", sandbox="pod")
    line = json.loads(caplog.messages[-1])
    assert (line["pymicro"], line["container"], line["sandbox"]) == ("start", "c1", "pod")
    assert line["phases_ms"]["vmm"] == 5.0
    assert line["phases_ms"]["guest_kernel"] == 12.3
    assert line["total_ms"] >= line["phases_ms"]["shim"] >= 0
