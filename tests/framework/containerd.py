"""A private containerd of a chosen version: its own directories and socket, our shim on its PATH, nothing left."""

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.framework import busybox, processes
from tests.framework.settings import write_settings
from tests.framework.tools import tool
from tests.framework.waiting import seconds

VERSIONS = ("1.6", "1.7", "1.7-grpc", "2.1", "2.4")
"""containerd's versions, and what its shims speak where that is not ttrpc. The last one needs a Go to build it."""
USUAL = "2.1"

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = Path("/run/pymicro")
SHIM = "containerd-shim-pymicro-v1"

START_TIMEOUT = seconds(30)
STOP_TIMEOUT = seconds(15)
CLEANUP = 5.0
"""Seconds that a shim's `delete` may take before containerd kills it: its default; a slower host needs more."""

# The shim's own socket and containerd's `.ttrpc` one must fit into a sockaddr_un (108 bytes).
LONGEST_DIRECTORY = 70

# Parts that touch the host outside our directories (/opt/containerd, /var/run/nri), or that would only fill the log.
UNWANTED = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
)
SNAPSHOTTER = "io.containerd.snapshotter.v1."
SCRATCH_MIB = 24
"""Size of a container's root filesystem where the blockfile snapshotter makes it."""


class ContainerdError(Exception):
    """containerd did not do what it should; the message carries the end of its log, or what `ctr` said."""


class Containerd:
    """One containerd in `directory`. The directory belongs to it alone and is emptied by `stop`, except for its log.

    A long directory is served from a short link in /run, because socket paths are limited.
    """

    def __init__(
        self,
        version: str,
        directory: Path,
        *,
        namespace: str = "default",
        settings: Mapping[str, Mapping[str, object]] | None = None,
        snapshotters: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """`namespace` is what clients use unless they say otherwise; `settings` are what every `write_settings` starts
        from; `snapshotters` are the settings of snapshotters that this daemon has besides the usual ones.
        """
        if version not in VERSIONS:
            raise ContainerdError(f"there is no containerd {version!r} to run; choose one of {', '.join(VERSIONS)}")
        self.lane = version
        self.version, _, protocol = version.partition("-")
        self.protocol = protocol or "ttrpc"
        self.directory = directory.resolve()
        self.home = self._short_home()
        self.bin = self.home / "bin"
        self.log = self.home / "containerd.log"
        self.address = str(self.home / "containerd.sock")
        self.settings = self.home / "config.toml"
        self.namespace = namespace
        self._usual_settings = {**(settings or {}), "shim": {"protocol": self.protocol}}
        self._scratch = self.home / "scratch"
        self._snapshotters = {"blockfile": {"scratch_file": str(self._scratch)}, **(snapshotters or {})}
        self._child: subprocess.Popen[bytes] | None = None
        self._extra_environment: Mapping[str, str] = {}

    def __repr__(self) -> str:
        return f"<Containerd {self.version} {self.protocol} at {self.home}>"

    def _short_home(self) -> Path:
        if len(str(self.directory)) <= LONGEST_DIRECTORY:
            return self.directory
        return Path("/run") / f"pymicro-dev-{hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What `ctr` and `pymicroctl` need to reach this daemon and its settings."""
        return {
            "CONTAINERD_ADDRESS": self.address,
            "CONTAINERD_NAMESPACE": self.namespace,
            "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS": "1",  # of cgroup v1, with every command
            "PYMICRO_CONFIG": str(self.settings),
        }

    def start(self, *, shim: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Start the daemon, wait until it answers, and load the image `localhost/busybox:latest`.

        Whatever an earlier instance left in the directory is removed first. `shim` replaces the shim of this checkout's
        Python environment, `environment` adds to the daemon's (and so the shim's). Raises ContainerdError.
        """
        self.remove_remains()
        self.lay_out(shim)
        self._extra_environment = environment or {}
        self.log.write_bytes(b"")
        self._spawn()
        self._load_image()

    def crash(self) -> None:
        """Kill the daemon as a crash would, leaving everything else as it is. `revive` starts it again."""
        for process in self.daemons():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if self._child:
            self._child.wait()

    def revive(self) -> None:
        """Start the daemon again after `crash`; it finds its containers where they were. Raises ContainerdError."""
        self._spawn()

    def stop(self) -> None:
        """End all tasks, the daemon and everything it started; remove its state. Harmless if it does not run."""
        if self.responds():
            self.end_containers()
        for process in self.daemons():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT
        while self.daemons() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.remove_remains()

    def remove_remains(self) -> None:
        """Free what a killed or half-started instance left: processes, each bundle's resources, mounts, files."""
        processes.end_processes_of(self.home)
        if self._child:
            self._child.wait()
        for bundle in sorted(self.home.glob("state/io.containerd.runtime.v2.task/*/*")):
            self._delete_bundle(bundle)
            _unlink_socket(bundle)
        processes.end_processes_of(self.home)
        processes.unmount_under(self.home)
        for sandbox in self.sandboxes():
            processes.unmount_under(sandbox)
            shutil.rmtree(sandbox, ignore_errors=True)
        for name in ("root", "state", "bin"):
            shutil.rmtree(self.home / name, ignore_errors=True)
        for path in [
            *self.home.glob("containerd.sock*"),
            *self.home.glob("*.toml"),
            *(self.home / name for name in ("env", "busybox.tar", "scratch")),
        ]:
            path.unlink(missing_ok=True)
        if self.home != self.directory:
            self._unlink_home()

    def write_settings(self, **tables: dict[str, object]) -> None:
        """Write the shim's settings, `tables` over this daemon's usual ones: `write_settings(timeouts={"hello": 1})`.

        What a table does not name stays as usual, so a test need not know what the whole run was asked for.
        """
        usual = {name: dict(values) for name, values in self._usual_settings.items()}
        for name, values in tables.items():
            usual.setdefault(name, {}).update(values)
        write_settings(self.settings, **usual)

    def responds(self) -> bool:
        """Say whether the daemon answers a client now."""
        if not Path(self.address).exists():
            return False
        return self.ctr("version", check=False, timeout=10).returncode == 0

    def ctr(
        self, *arguments: str, check: bool = True, timeout: float = 60, stdin: int = subprocess.DEVNULL
    ) -> subprocess.CompletedProcess[str]:
        """Run `ctr` against this daemon, with the file descriptor `stdin` as its input, for `timeout` usual seconds.

        Raises ContainerdError for a failure (with `check`), and TimeoutExpired.
        """
        done = subprocess.run(
            [str(self.bin / "ctr"), *arguments],
            env={**os.environ, **self.client_environment},
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds(timeout),
        )
        if check and done.returncode:
            raise ContainerdError(f"ctr {shlex.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of the daemon's log, which carries the shims' log lines too."""
        with suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return "(no log)"

    # -- laying out the directory -------------------------------------------------------------------------------------

    def lay_out(self, shim: Path | None = None) -> None:
        """Put programs, settings and configuration in place, as `start` does; `shim` replaces this checkout's."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.home != self.directory:
            self._link_home()
        self.bin.mkdir()
        for program in tool(f"containerd-{self.version}").iterdir():
            (self.bin / program.name).symlink_to(program.resolve())
        (self.bin / SHIM).symlink_to(shim or REPOSITORY / ".venv/bin" / SHIM)
        (self.bin / "pymicroctl").symlink_to(REPOSITORY / ".venv/bin/pymicroctl")
        self.write_settings()
        with self._scratch.open("wb") as file:
            file.truncate(SCRATCH_MIB << 20)
        subprocess.run(["/usr/sbin/mkfs.ext4", "-q", self._scratch], check=True)
        (self.home / "containerd.toml").write_text(self._configuration())

    def _configuration(self) -> str:
        wanted = {f"{SNAPSHOTTER}{name}": values for name, values in self._snapshotters.items()}
        unwanted = "".join(f'  "{name}",\n' for name in UNWANTED if name not in wanted)
        plugins = ""
        for name, values in wanted.items():
            plugins += f'[plugins."{name}"]\n' + "".join(f'  {key} = "{value}"\n' for key, value in values.items())
        return (
            f"version = {3 if self.version.startswith('2') else 2}\n"
            f'root = "{self.home}/root"\nstate = "{self.home}/state"\n'
            f"disabled_plugins = [\n{unwanted}]\n"
            f'[grpc]\n  address = "{self.address}"\n'
            f'[debug]\n  level = "info"\n'
            f'[timeouts]\n  "io.containerd.timeout.shim.cleanup" = "{seconds(CLEANUP):g}s"\n{plugins}'
        )

    def _link_home(self) -> None:
        """Link what people look for from the long directory into the short one, which holds the data."""
        self.home.mkdir(mode=0o711, exist_ok=True)
        for name in ("env", "containerd.log", "config.toml"):
            link = self.directory / name
            if not link.is_symlink():
                link.symlink_to(self.home / name)

    def _unlink_home(self) -> None:
        for name in ("env", "config.toml"):
            with suppress(FileNotFoundError):
                (self.directory / name).unlink()
        if self.log.exists():
            (self.directory / "containerd.log").unlink(missing_ok=True)
            shutil.move(self.log, self.directory / "containerd.log")
        shutil.rmtree(self.home, ignore_errors=True)

    # -- the daemon ---------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        # a shim that may not keep its bytecode compiles itself at every start
        dropped = ("CONTAINERD_", "PYTHONDONTWRITEBYTECODE")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        daemon = {
            **inherited,
            "PATH": f"{self.bin}:{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin",
            "PYMICRO_CONFIG": str(self.settings),
            processes.MARK: str(self.home),
            **self._extra_environment,
        }
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [self.bin / "containerd", "--config", self.home / "containerd.toml"],
                env=daemon,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not self.responds():
            if (status := self._child.poll()) is not None:
                raise ContainerdError(f"containerd {self.version} ended with status {status}:\n{self.log_tail(15)}")
            if time.monotonic() > deadline:
                raise ContainerdError(
                    f"containerd {self.version} did not answer at {self.address} in {START_TIMEOUT:.0f} s:\n"
                    + self.log_tail(15)
                )
            time.sleep(0.05)

    def daemons(self) -> list[processes.Process]:
        """Return the daemon's process, if it runs."""
        marker = f"--config {self.home}/containerd.toml"
        return [process for process in processes.processes_of(self.home) if process.command.endswith(marker)]

    def _load_image(self) -> None:
        archive = self.home / "busybox.tar"
        busybox.write_archive(archive)
        try:
            self.ctr("images", "import", "--all-platforms", str(archive))
        except ContainerdError as error:
            raise ContainerdError(f"{error}\n{self.log_tail(15)}") from None
        archive.unlink()

    # -- ending -------------------------------------------------------------------------------------------------------

    def sandboxes(self) -> list[Path]:
        """Return the directories of our sandboxes on this host: those whose state names a bundle of ours."""
        found = []
        for state in RUN.glob("*/state.json"):
            with suppress(OSError):
                if f"{self.home}/state/" in state.read_text(errors="replace"):
                    found.append(state.parent)
        return sorted(found)

    def end_containers(self) -> None:
        """Kill and remove all tasks and containers of all namespaces."""
        for namespace in self._names("namespaces"):
            for task in self._names("tasks", namespace):
                self.ctr("-n", namespace, "tasks", "kill", "--all", "-s", "SIGKILL", task, check=False)
                self.ctr("-n", namespace, "tasks", "rm", "-f", task, check=False)
            for container in self._names("containers", namespace):
                self.ctr("-n", namespace, "containers", "rm", container, check=False)

    def _names(self, kind: str, namespace: str = "default") -> list[str]:
        return self.ctr("-n", namespace, kind, "ls", "-q", check=False).stdout.split()

    def _delete_bundle(self, bundle: Path) -> None:
        """Do what a restarted containerd would: have the shim free what the dead sandbox of this bundle held."""
        with suppress(OSError):
            shim = (bundle / "shim-binary-path").read_text().strip()
            argv = [shim, "-namespace", bundle.parent.name, "-address", self.address, "-id", bundle.name]
            environment = {
                **os.environ,
                "PATH": f"{self.bin}:{os.environ.get('PATH', '')}",
                "PYMICRO_CONFIG": str(self.settings),
            }
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*argv, "-bundle", bundle, "delete"],
                    cwd=bundle,
                    env=environment,
                    capture_output=True,
                    timeout=seconds(10),
                    check=False,
                )


def _unlink_socket(bundle: Path) -> None:
    """Remove the socket of a killed shim; containerd wrote its address into the bundle."""
    for name in ("bootstrap.json", "address"):
        with suppress(OSError):
            if found := re.search(r"unix://(/[^\"\s]+)", (bundle / name).read_text()):
                Path(found[1]).unlink(missing_ok=True)


@contextmanager
def claimed_directory(parent: Path) -> Iterator[Path]:
    """Yield a directory below `parent` that no other process uses now, the same one as last time where possible."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        with (parent / f"{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield parent / str(number)
            return
    raise ContainerdError(f"all directories below {parent} are in use")
