"""Installing a checkout on this host, and removing it: what `make install` and `make uninstall` run.

Runs from the checkout, by any Python 3.11 and without other packages. What goes where:

    <prefix>/releases/<number>/                  one installation, whole, with the following three in it:
    <prefix>/current                             a link to the newest release; what follows are links into it
    <prefix>/venv                                the shim and pymicroctl, with their libraries
    <prefix>/share/{vmlinux,image.erofs,*.json}  the guest's kernel and image, with their manifests
    <prefix>/bin/vhost-device-vsock              for hosts without /dev/vhost-vsock
    /usr/local/bin/                              links to the shim and to pymicroctl
    /etc/pymicro/config.toml                     the settings; a file that is there already is kept

A pod that runs keeps the release that it began with: its shim imports from there until its end. The next installation
removes those that nobody uses any more.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAMS = ("containerd-shim-pymicro-v1", "pymicroctl")
LINKS = Path("/usr/local/bin")
SETTINGS = Path("/etc/pymicro/config.toml")
TEMPLATES = Path("/dev/shm/pymicro-templates")  # noqa: S108  # the default of templates.directory, root's alone

MARK = ".pymicro"
"""A file that says that a prefix is ours: what lies in it may be replaced and removed."""
PARTS = ("venv", "share", "bin")
CURRENT = "current"

SETTINGS_TEXT = """\
# pymicro's settings. Every key has a default; docs/configuration.md explains them all.

[paths]
kernel = "{prefix}/share/vmlinux"
image = "{prefix}/share/image.erofs"
vhost_device_vsock = "{prefix}/bin/vhost-device-vsock"

[vm]
# vcpus = 1
# memory_mib = 256
"""

# The plugin that owns CRI's runtimes changed its name with version 3 of containerd's configuration.
SNIPPET = """\
[plugins."{plugin}".containerd.runtimes.pymicro]
  runtime_type = "io.containerd.pymicro.v1"
  privileged_without_host_devices = true
  pod_annotations = ["io.pymicro.*"]
  [plugins."{plugin}".containerd.runtimes.pymicro.options]
    TypeUrl = "io.pymicro.v1.options"
    ConfigPath = "{settings}"
"""
PLUGINS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
RELEASES = {2: "containerd 1.6 and 1.7", 3: "containerd 2.x"}


@dataclass(frozen=True, slots=True)
class Target:
    """Where to install: `prefix` as the installed programs see it, all of it below `destdir` while installing."""

    prefix: Path
    destdir: str

    def path(self, installed: Path) -> Path:
        """Return where a file goes now that will be at `installed` in the end."""
        return Path(f"{self.destdir}{installed}")


class NotOurs(Exception):
    """The prefix is a directory that has other things than an installation of pymicro in it."""


class InUse(Exception):
    """Processes run that belong to the installation."""


def install(target: Target, kernel: Path, image: Path, vhost_device_vsock: Path) -> None:
    """Install beside an earlier installation, which stays as it is until the new one is complete; then replace it.

    Raises NotOurs, InUse, OSError and CalledProcessError.
    """
    prefix = target.path(target.prefix)
    _require_ours(prefix)
    prefix.mkdir(parents=True, exist_ok=True)
    with _alone(prefix):
        number = max((int(name) for name in _releases(prefix)), default=0) + 1
        release = Target(target.prefix / "releases" / str(number), target.destdir)
        staged = target.path(release.prefix)
        try:
            _install_python(release)
            _install_guest(staged / "share", kernel, image)
            shutil.copytree(vhost_device_vsock, staged / "share/vhost-device-vsock", symlinks=True)
            _link(staged / "bin/vhost-device-vsock", Path("../share/vhost-device-vsock/bin/vhost-device-vsock"))
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        _link(prefix / CURRENT, Path("releases", str(number)))  # all three at once
        for part in PARTS:
            _link(prefix / part, Path(CURRENT, part))
        for name in PROGRAMS:
            _link(target.path(LINKS / name), target.prefix / "venv/bin" / name)
        settings = target.path(SETTINGS)
        if not settings.exists():
            settings.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text(SETTINGS_TEXT.format(prefix=target.prefix))
        for name in _releases(prefix):
            if int(name) != number and not _users(target.prefix / "releases" / name):
                shutil.rmtree(prefix / "releases" / name)


def _releases(prefix: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return [name for name in os.listdir(prefix / "releases") if name.isdecimal()]
    return []


def _require_ours(prefix: Path) -> None:
    if prefix.exists() and any(prefix.iterdir()) and not (prefix / MARK).exists():
        raise NotOurs(
            f"{prefix} has other things in it than an installation of pymicro, which must not be lost: give PREFIX a"
            " directory of its own"
        )


@contextmanager
def _alone(prefix: Path) -> Iterator[None]:
    """Mark the prefix as ours and keep others from changing it meanwhile. Raises InUse, OSError."""
    with (prefix / MARK).open("a") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"somebody else installs or removes {prefix} just now") from None
        yield


def _users(*directories: Path) -> list[int]:
    """Return the pids of the processes whose command line names something below one of the directories."""
    wanted = {f"{path}/".encode() for each in directories for path in (str(each), os.path.realpath(each))}
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            command = Path("/proc", pid, "cmdline").read_bytes()
            if int(pid) != os.getpid() and any(path in command for path in wanted):
                found.append(int(pid))
    return found


def _install_python(target: Target) -> None:
    venv = target.path(target.prefix) / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, str(REPOSITORY)], check=True)
    if target.destdir:
        for script in (venv / "bin").iterdir():
            _strip_destdir(script, str(venv), str(target.prefix / "venv"))


def _strip_destdir(script: Path, staged: str, final: str) -> None:
    """Make a script of the virtual environment name the place where it will run."""
    if script.is_symlink():
        return
    content = script.read_bytes()
    if staged.encode() in content:
        script.write_bytes(content.replace(staged.encode(), final.encode()))


def _install_guest(share: Path, kernel: Path, image: Path) -> None:
    share.mkdir(parents=True)
    shutil.copy2(kernel, share / "vmlinux")
    shutil.copy2(image, share / "image.erofs")
    for name, artefact in (("kernel.json", kernel), ("image.json", image)):
        manifest = artefact.with_name("manifest.json")
        if manifest.exists():
            shutil.copy2(manifest, share / name)


def _link(link: Path, to: Path) -> None:
    """Make a symbolic link, or let the one that is there point to another place, in one step."""
    link.parent.mkdir(parents=True, exist_ok=True)
    new = _unfinished(link)
    new.unlink(missing_ok=True)
    new.symlink_to(to)
    new.replace(link)


def _unfinished(link: Path) -> Path:
    return link.with_name(f".{link.name}.new")


def uninstall(target: Target, *, purge: bool) -> None:
    """Remove what `install` made; the settings only with `purge`. Harmless where nothing is installed.

    Raises NotOurs, and InUse while pods run: their shims and containerd need the programs.
    """
    prefix = target.path(target.prefix)
    _require_ours(prefix)
    with _alone(prefix) if prefix.exists() else nullcontext():
        if not target.destdir and (users := _users(*(prefix / part for part in ("releases", *PARTS)))):
            raise InUse(
                f"{len(users)} processes of pods still run from {prefix}, such as {min(users)}: end the pods first,"
                " `pymicroctl ps` lists them"
            )
        for name in PROGRAMS:
            link = target.path(LINKS / name)
            if link.is_symlink() and link.readlink() == target.prefix / "venv/bin" / name:
                link.unlink()
            _unfinished(link).unlink(missing_ok=True)
        for name in (*PARTS, CURRENT):
            for link in (prefix / name, _unfinished(prefix / name)):
                link.unlink(missing_ok=True)
        shutil.rmtree(prefix / "releases", ignore_errors=True)
        (prefix / MARK).unlink(missing_ok=True)
    with suppress(OSError):  # somebody has put something of his own there
        prefix.rmdir()
    if not target.destdir:  # no VM that runs needs them
        shutil.rmtree(TEMPLATES, ignore_errors=True)
    if purge:
        shutil.rmtree(target.path(SETTINGS.parent), ignore_errors=True)


def snippet(version: int) -> str:
    """Return the part of containerd's configuration, of `version` 2 or 3, that lets the kubelet use pymicro."""
    return SNIPPET.format(plugin=PLUGINS[version], settings=SETTINGS)


def _say_what_is_next(target: Target) -> None:
    print(f"installed: {target.prefix}, links in {LINKS}, settings in {SETTINGS}")
    print("\nThis host:       pymicroctl check")
    print("A container:     ctr run --rm --runtime io.containerd.pymicro.v1 <image> hello uname -r")
    print("For Kubernetes and crictl add this to /etc/containerd/config.toml and restart containerd:")
    for version, releases in RELEASES.items():
        print(f"\n# {releases}: with version = {version}\n{snippet(version)}", end="")


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="install", description="install pymicro from this checkout, or remove it")
    parser.add_argument("verb", choices=("install", "uninstall"))
    parser.add_argument("--prefix", type=Path, default=Path("/opt/pymicro"))
    parser.add_argument("--destdir", default="")
    parser.add_argument("--purge", action="store_true", help="remove the settings too")
    parser.add_argument("artefacts", nargs="*", type=Path, help="vmlinux, image.erofs, directory of vhost-device-vsock")
    options = parser.parse_args()
    if not options.prefix.is_absolute() or options.prefix == Path("/"):
        parser.error(f"the prefix {options.prefix} must be an absolute path of its own")
    target = Target(options.prefix, options.destdir.rstrip("/"))
    try:
        if options.verb == "uninstall":
            uninstall(target, purge=options.purge)
            return 0
        if len(options.artefacts) != 3:
            parser.error("install needs a kernel, an image and the directory of vhost-device-vsock")
        install(target, *options.artefacts)
    except (NotOurs, InUse, OSError, subprocess.CalledProcessError) as error:
        print(f"{options.verb}: {error}", file=sys.stderr)
        return 1
    if not options.destdir:
        _say_what_is_next(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
