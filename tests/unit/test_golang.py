"""Building containerd's releases: which Go will do, and that what is built is what was released."""

import json
from pathlib import Path

import pytest

from tests.framework.debian import ToolError
from tests.framework.golang import GoMissing, Release

RELEASE = Release("v2.4.2", "h1:released", "1.26.6")


def fake_go(directory: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """Put a `go` first on PATH that prints `says`, whatever it is asked."""
    (directory / "go").write_text(f"#!/bin/sh\ncat <<'.'\n{says}\n.\n")
    (directory / "go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.parametrize("version", ["go1.26.6", "go1.26.10", "go1.27rc1", "go2.0"])
def test_new_enough(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_go(tmp_path, monkeypatch, version)
    assert RELEASE.require_go() == version


@pytest.mark.parametrize("version", ["go1.26.5", "go1.9.7", "go1.26", "devel +abc"])
def test_too_old(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_go(tmp_path, monkeypatch, version)
    with pytest.raises(GoMissing, match=r"PATH is .*; Go 1.26.6 or newer builds containerd v2.4.2"):
        RELEASE.require_go()


def test_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GoMissing, match="there is no `go` on PATH"):
        RELEASE.build(("cmd/ctr",), tmp_path)


def test_what_was_not_released_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_go(tmp_path, monkeypatch, json.dumps({"Sum": "h1:other", "Dir": str(tmp_path)}))
    with pytest.raises(ToolError, match="has the hash h1:other here; it was released with h1:released"):
        RELEASE.fetch()
