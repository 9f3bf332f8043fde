"""An installation that is replaced and removed while pods run: real, but for links, settings and templates."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymicro.ctl import install
from pymicro.ctl.install import InUse, Target

from tests.framework.containerd import SHIM
from tests.framework.ctr import Ctr
from tests.framework.processes import all_processes
from tests.framework.settings import IMAGE, KERNEL, artefact
from tests.framework.tools import tool
from tests.framework.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("only_our_runtime")]


@pytest.fixture
def target(ctr: Ctr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Yield where to install; containerd finds the shim that is installed there until the test ends."""
    monkeypatch.setattr(install, "LINKS", tmp_path / "bin")
    monkeypatch.setattr(install, "SETTINGS", tmp_path / "etc/config.toml")
    monkeypatch.setattr(install, "TEMPLATES", tmp_path / "templates")
    link = ctr.containerd.bin / SHIM
    usual = link.readlink()
    install._link(link, tmp_path / "bin" / SHIM)
    yield Target(tmp_path / "pymicro", "")
    ctr.clean_up()
    install._link(link, usual)


def put_in(target: Target) -> None:
    install.install(target, artefact(*KERNEL), artefact(*IMAGE), tool("vhost-device-vsock").parent)


def releases_in_use(target: Target) -> set[str]:
    """Return which releases processes run from."""
    prefix = f"{target.prefix}/releases/"
    return {
        word.removeprefix(prefix).partition("/")[0]
        for process in all_processes().values()
        for word in process.command.split()
        if word.startswith(prefix)
    }


def test_pods_outlive_an_upgrade_and_keep_an_installation_from_being_removed(ctr: Ctr, target: Target) -> None:
    put_in(target)
    old = ctr.start("sleep", "100000")
    assert releases_in_use(target) == {"1"}

    put_in(target)
    new = ctr.start("sleep", "100000")
    assert releases_in_use(target) == {"1", "2"}
    assert old.exec("echo", "well").stdout == "well\n"
    with pytest.raises(InUse, match="end the pods first"):
        install.uninstall(target, purge=True)
    old.remove()
    until(lambda: releases_in_use(target) == {"2"})

    put_in(target)
    assert sorted(os.listdir(target.prefix / "releases")) == ["2", "3"]
    new.remove()
    until(lambda: not releases_in_use(target))
    install.uninstall(target, purge=True)
    assert not target.prefix.exists()
