"""`make install` and `make uninstall`: what lies where, and that nothing of others is lost, nor a running pod's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pymicro.ctl import install
from pymicro.ctl.install import InUse, NotOurs, Target


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory in which everything lies that would be installed on this host."""
    monkeypatch.setattr(install, "LINKS", tmp_path / "local/bin")
    monkeypatch.setattr(install, "SETTINGS", tmp_path / "etc/pymicro/config.toml")
    monkeypatch.setattr(install, "TEMPLATES", tmp_path / "templates")

    def python(target: Target) -> None:
        for name in install.PROGRAMS:
            program = target.path(target.prefix) / "venv/bin" / name
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text("#!/bin/sh\n")

    monkeypatch.setattr(install, "_install_python", python)
    return tmp_path


def installed(here: Path, kernel: str = "kernel", destdir: str = "") -> Path:
    """Install with a kernel of this content; return the prefix."""
    artefacts = here / "artefacts"
    (artefacts / "vsock/bin").mkdir(parents=True, exist_ok=True)
    (artefacts / "vsock/bin/vhost-device-vsock").write_text("program")
    (artefacts / "vmlinux").write_text(kernel)
    (artefacts / "image.erofs").write_text("image")
    (artefacts / "manifest.json").write_text("{}")
    target = Target(here / "opt/pymicro", destdir)
    install.install(target, artefacts / "vmlinux", artefacts / "image.erofs", artefacts / "vsock")
    return target.path(target.prefix)


@contextmanager
def process_of(program: Path) -> Iterator[None]:
    """Have a process that was started from there, as a pod's shim is."""
    argv = [sys.executable, "-c", "print(flush=True); input()", str(program.resolve())]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout
        running.stdout.readline()
        yield
        running.communicate(b"\n")


def test_what_lies_where(here: Path) -> None:
    prefix = installed(here)
    assert (prefix / "share/vmlinux").read_text() == "kernel"
    assert (prefix / "share/kernel.json").read_text() == (prefix / "share/image.json").read_text() == "{}"
    assert (prefix / "bin/vhost-device-vsock").read_text() == "program"
    for name in install.PROGRAMS:
        assert (here / "local/bin" / name).resolve() == (prefix / "venv/bin" / name).resolve()
    assert f'kernel = "{prefix}/share/vmlinux"' in (here / "etc/pymicro/config.toml").read_text()


def test_settings_are_kept(here: Path) -> None:
    installed(here)
    (here / "etc/pymicro/config.toml").write_text("mine")
    installed(here)
    assert (here / "etc/pymicro/config.toml").read_text() == "mine"
    install.uninstall(Target(here / "opt/pymicro", ""), purge=False)
    assert (here / "etc/pymicro/config.toml").read_text() == "mine"


def test_a_new_installation_leaves_running_pods_theirs_until_they_end(here: Path) -> None:
    prefix = installed(here, "old")
    shim = prefix / "venv/bin" / install.PROGRAMS[0]
    old = shim.resolve()
    with process_of(shim):
        installed(here, "new")
        assert old.exists()
        assert (prefix / "share/vmlinux").read_text() == "new"
        assert shim.resolve() != old
    installed(here, "newer")
    assert not old.exists()
    assert len(os.listdir(prefix / "releases")) == 1


def test_an_installation_that_fails_leaves_the_one_that_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = installed(here, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(install, "_install_guest", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        installed(here, "new")
    assert (prefix / "share/vmlinux").read_text() == "old"
    installed(here, "new")
    assert (prefix / "share/vmlinux").read_text() == "new"
    assert len(os.listdir(prefix / "releases")) == 1, "what was half done has gone"


def test_pods_are_seen_through_a_prefix_with_a_link_in_it(here: Path) -> None:
    (here / "data").mkdir()
    (here / "opt").symlink_to("data")
    prefix = installed(here)
    shim = prefix / "venv/bin" / install.PROGRAMS[0]
    old = shim.resolve()
    assert "data" in old.parts
    with process_of(shim):
        installed(here)
        assert old.exists()
        with pytest.raises(InUse):
            install.uninstall(Target(prefix, ""), purge=False)


def test_only_one_installs_at_a_time(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_the_middle(*_: object) -> None:
        with pytest.raises(InUse, match="just now"):
            installed(here)
        with pytest.raises(InUse, match="just now"):
            install.uninstall(Target(here / "opt/pymicro", ""), purge=False)

    monkeypatch.setattr(install, "_install_python", in_the_middle)
    installed(here)


@pytest.mark.parametrize("steps", range(6))
def test_killed_while_it_makes_its_links(here: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    prefix = installed(here, "old")
    real = install._link

    def killed(link: Path, to: Path) -> None:
        done.append(link)
        if len(done) > 1 + steps:  # the first is within the release
            install._unfinished(link).symlink_to(to)
            raise KeyboardInterrupt
        real(link, to)

    done: list[Path] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(install, "_link", killed)
        installed(here, "new")
    assert (prefix / "share/vmlinux").read_text() == ("new" if steps else "old")
    assert (prefix / "venv").resolve().parent == (prefix / "share").resolve().parent
    install.uninstall(Target(prefix, ""), purge=True)
    assert not prefix.exists()
    assert not list((here / "local/bin").iterdir())


@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_a_prefix_that_has_other_things_in_it_is_refused(here: Path, verb: str) -> None:
    theirs = here / "opt/pymicro/bin/theirs"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    with pytest.raises(NotOurs, match="a directory of its own"):
        installed(here) if verb == "install" else install.uninstall(Target(here / "opt/pymicro", ""), purge=True)
    assert theirs.exists()


def test_uninstall_leaves_nothing(here: Path) -> None:
    prefix = installed(here)
    install.uninstall(Target(prefix, ""), purge=True)
    assert not prefix.exists()
    assert not (here / "etc/pymicro").exists()
    assert not list((here / "local/bin").iterdir())
    install.uninstall(Target(prefix, ""), purge=True)  # which harms nobody


def test_uninstall_leaves_what_others_have_put_there(here: Path) -> None:
    prefix = installed(here)
    (prefix / "notes").touch()
    (here / "local/bin/pymicroctl").unlink()
    (here / "local/bin/pymicroctl").write_text("theirs")
    install.uninstall(Target(prefix, ""), purge=False)
    assert os.listdir(prefix) == ["notes"]
    assert (here / "local/bin/pymicroctl").read_text() == "theirs"


def test_uninstall_waits_for_the_pods_to_end(here: Path) -> None:
    prefix = installed(here)
    with process_of(prefix / "venv/bin" / install.PROGRAMS[0]), pytest.raises(InUse, match="1 processes of pods"):
        install.uninstall(Target(prefix, ""), purge=False)
    assert (prefix / "share/vmlinux").exists()
    install.uninstall(Target(prefix, ""), purge=False)


def test_a_staged_tree_names_the_place_where_it_will_be(here: Path) -> None:
    prefix = installed(here, destdir=str(here / "stage"))
    assert prefix == Path(f"{here}/stage{here}/opt/pymicro")
    assert (prefix / "share/vmlinux").read_text() == "kernel"
    link = Path(f"{here}/stage{here}/local/bin/pymicroctl")
    assert link.readlink() == here / "opt/pymicro/venv/bin/pymicroctl"
    assert not (here / "opt").exists()
