"""Templates: VMs saved where the agent has imported all it will ever need and waits for its vsock device.

A start from a template skips the guest's boot. Nothing of a pod is in one: no share, no vsock, no name, and entropy
and clock are set anew in each clone. Templates lie on tmpfs, readable by root alone, one per key of all that shapes
them.
"""

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymicro.shim.errors import InvalidSettings, ShimError, StepTimeout
from pymicro.shim.hypervisor.base import Boot, Hypervisor, Origin, Template, VmSpec
from pymicro.shim.spawn import Place
from pymicro.wire import messages

logger = logging.getLogger(__name__)

MANIFEST, MEMORY, STATE = "manifest.json", "memory", "state"
_POLL = 0.02


class Damaged(Exception):  # a finding, as the errors of errors.py are
    """A template that must not be used; says why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A template's shape, when it was made (seconds since the epoch), and the bytes of tmpfs that its RAM holds."""

    vcpus: int
    memory_mib: int
    created_at: float
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Store:
    """Where templates are kept, and how many. `timeout` (seconds) bounds the boot of a VM that becomes one."""

    directory: Path
    most: int
    timeout: float

    async def origin(self, spec: VmSpec, hypervisor: Hypervisor, place: Place) -> Origin:
        """Return the template for `spec`, built now if there is none yet; a cold boot, with a warning, if that
        fails.
        """
        try:
            self._claim()
            name = key(spec, hypervisor)
            if template := self.find(name):
                return template
            async with self._locked(name):
                return self.find(name) or await self._build(name, spec, hypervisor, place)
        except (ShimError, OSError) as error:
            logger.warning("no template for this pod, it boots cold: %s", error)
            return Boot()

    def _claim(self) -> None:
        """Make the directory; refuse one that others control, since they would own what every VM starts from.

        tmpfs is where everybody may create files, so somebody may have been there first. Raises InvalidSettings,
        OSError.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise InvalidSettings(
                f"{self.directory} (templates.directory) must be a directory that only this user can enter; remove it"
            )

    def find(self, name: str) -> Template | None:
        """Return the template called `name`; a damaged one is discarded with a warning."""
        where = self.directory / name
        try:
            return _checked(where, name)
        except FileNotFoundError:
            if where.exists():
                self.discard(name, "a file of it is missing")
        except (Damaged, OSError, ValueError) as error:
            self.discard(name, str(error))
        return None

    def discard(self, name: str, why: str) -> None:
        """Remove a template and say why."""
        logger.warning("template %s is discarded: %s", name, why)
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a template. VMs that were started from it go on: they have copies."""
        shutil.rmtree(self.directory / name, ignore_errors=True)

    def is_sound(self, name: str) -> bool:
        """Tell whether the template can be used as far as its files go."""
        try:
            _checked(self.directory / name, name)
        except (Damaged, OSError, ValueError):
            return False
        return True

    def facts(self, name: str) -> "Facts":
        """Return what is known of a template; zeros where its files do not say."""
        memory = self.directory / name / MEMORY
        held = memory.stat().st_blocks * 512 if memory.exists() else 0
        try:
            recorded = json.loads((self.directory / name / MANIFEST).read_text(encoding="utf-8"))
            return Facts(recorded["vcpus"], recorded["memory_mib"], recorded["created_at"], held)
        except (OSError, ValueError, KeyError, TypeError):
            return Facts(0, 0, 0.0, held)

    def names(self) -> list[str]:
        """Return the names of all templates, the least recently used first."""
        with suppress(FileNotFoundError):
            found = [entry for entry in os.scandir(self.directory) if entry.is_dir() and "." not in entry.name]
            return [entry.name for entry in sorted(found, key=lambda entry: entry.stat().st_mtime)]
        return []

    async def _build(self, name: str, spec: VmSpec, hypervisor: Hypervisor, place: Place) -> Template:
        """Boot a VM as far as the agent goes without its pod, save it, and put it in its place in one step."""
        self._sweep(name)
        scratch = self.directory / f"{name}.{os.getpid()}"
        begun = time.monotonic()
        try:
            scratch.mkdir(mode=0o700)
            memory, state = scratch / MEMORY, scratch / STATE
            with open(memory, "xb") as file:
                os.truncate(file.fileno(), spec.memory_mib << 20)
            async with hypervisor.take_over(hypervisor.spawn(spec, Boot(memory), place, ())) as vm:
                await vm.resume()
                await self._ready(vm.console_says(messages.READY))
                await vm.save(state)
            _write_manifest(scratch, name, spec)
            os.rename(scratch, self.directory / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        logger.info("built template %s in %.1f s", name, time.monotonic() - begun)
        self._prune(keep=name)
        return _checked(self.directory / name, name)

    async def _ready(self, waiting: Any) -> None:  # an awaitable of whatever
        try:
            async with asyncio.timeout(self.timeout):
                await waiting
        except TimeoutError:
            raise StepTimeout(f"the guest was not ready in {self.timeout:g} s (timeouts.hello)") from None

    def _sweep(self, name: str) -> None:
        """Remove what a builder that was killed has left. The lock is ours, so nobody else builds it."""
        for leftover in self.directory.glob(f"{name}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)

    def _prune(self, keep: str) -> None:
        others = [name for name in self.names() if name != keep]
        for name in others[: max(0, len(others) + 1 - self.most)]:
            logger.info("template %s is removed: %d are kept (template.most)", name, self.most)
            self.remove(name)

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[None]:
        """Hold the lock of the template `name`, which whoever builds it holds; it goes with its holder."""
        fd = os.open(self.directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            async with asyncio.timeout(self.timeout):
                while not _try_lock(fd):
                    await asyncio.sleep(_POLL)
            yield
        except TimeoutError:
            raise StepTimeout(f"another start did not finish template {name} in {self.timeout:g} s") from None
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def key(spec: VmSpec, hypervisor: Hypervisor) -> str:
    """Return the name of the template for `spec` on this host: 16 hex digits of everything that shapes it."""
    facts = [hypervisor.identity(spec), _host_cpu(), str(messages.PROTOCOL_VERSION)]
    for path in (spec.kernel, spec.image):
        status = path.stat()
        facts.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _host_cpu() -> str:
    """The first CPU's model and flags: a VM saved with them must not go on without them."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = file.read().partition("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(("vendor", "model", "stepping", "flags")))


def _write_manifest(scratch: Path, name: str, spec: VmSpec) -> None:
    shape = {"vcpus": spec.vcpus, "memory_mib": spec.memory_mib}
    facts = {"name": name, "created_at": time.time(), **shape, **_fingerprints(scratch)}
    with open(scratch / MANIFEST, "x", encoding="utf-8") as file:
        json.dump({**facts, "sha256": _digest(facts)}, file)


def _checked(where: Path, name: str) -> Template:
    """Return the template in `where`. Raises Damaged, FileNotFoundError, OSError, ValueError (its manifest)."""
    with open(where / MANIFEST, encoding="utf-8") as file:
        facts = json.load(file)
    digest = facts.pop("sha256", None) if isinstance(facts, dict) else None
    if not digest or facts.get("name") != name or digest != _digest(facts):
        raise Damaged("its manifest is another template's, or damaged")
    now = _fingerprints(where)
    if changed := [fact for fact, value in now.items() if facts.get(fact) != value]:
        raise Damaged(f"it has changed since it was made: {', '.join(changed)}")
    with suppress(OSError):
        os.utime(where)  # for names(): it was used
    return Template(where / MEMORY, where / STATE)


def _fingerprints(where: Path) -> dict[str, Any]:
    """What shows any later change of the two files.

    RAM is too large to be read at every start. A change of a file, by whatever means, changes its ctime, which nobody
    can set.
    """
    memory = (where / MEMORY).stat()
    return {
        "memory": [memory.st_size, memory.st_ino, memory.st_mtime_ns, memory.st_ctime_ns],
        "state": hashlib.sha256((where / STATE).read_bytes()).hexdigest(),
    }


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
