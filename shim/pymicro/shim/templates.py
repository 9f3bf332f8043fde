"""Templates: VMs saved where the agent has imported all it will ever need and waits for its vsock device.

A start from a template skips the guest's boot. Nothing of a pod is in one: no share, no vsock, no name, and entropy
and clock are set anew in each clone. Templates lie on tmpfs, readable by root alone, one per key of all that shapes
them. Here they are found and removed, by plain code that is cheap to import; `template_builder` makes them.
"""

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from msgspec import Struct
from pymicro.shim import early
from pymicro.shim import template_files as files
from pymicro.shim.errors import InvalidSettings
from pymicro.shim.filelock import FileLock, try_lock
from pymicro.shim.template_files import Damaged, Facts
from pymicro.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.hypervisor.base import Hypervisor, Origin, Template, VmSpec

OK = "ok"
_NAME_LENGTH = 16
_FIRST_CPU = 16 * 1024
"""Characters of /proc/cpuinfo that hold one CPU for certain: all of a large host's take long."""


class Store(Struct, frozen=True):
    """Where templates are kept, how many, and how many MiB of the file system all of them may hold."""

    directory: Path
    most: int
    most_mib: int

    def look_up(self, name: str, *, locked: bool = False) -> "Origin | None":
        """Return what a start goes on from, None if the template `name` is still to be made.

        A damaged one is discarded, with a warning, and this start is a cold boot: whatever damaged it may be at work
        still. `locked` says that the caller holds the template's lock.
        """
        try:
            self.claim()
            try:
                return self._sound(name)
            except Damaged:
                if locked:
                    return self._sound_or_removed(name)
                if (lock := self.try_lock(name)) is None:  # whoever has it looks for itself
                    raise
                with lock:
                    return self._sound_or_removed(name)
        except Damaged as error:
            return _cold(f"template {name} is discarded: {error}")
        except (InvalidSettings, OSError) as error:
            return _cold(str(error))

    def template(self, name: str) -> "Template":
        """Return the template `name`, which the caller knows to be sound."""
        from pymicro.shim.hypervisor.base import Template

        where = self.directory / name
        return Template(where / files.MEMORY, where / files.STATE)

    def _sound(self, name: str) -> "Template | None":
        """Return the template, None if there is none. Raises Damaged."""
        try:
            files.check(self.directory / name, name)
        except FileNotFoundError:
            return None
        with suppress(OSError):
            os.utime(self.directory / name)  # for names(): it was used
        return self.template(name)

    def _sound_or_removed(self, name: str) -> "Template | None":
        """Look under the template's lock, so that one which was just put in its place is not taken for the old one."""
        try:
            return self._sound(name)
        except Damaged:
            self.remove(name)
            raise

    def claim(self) -> None:
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

    def try_lock(self, name: str) -> FileLock | None:
        """Return the lock that whoever makes the template `name` holds, None if somebody has it. Raises OSError."""
        return try_lock(str(self.directory / f"{name}.lock"))

    def scratch(self, name: str, purpose: str = "") -> Path:
        """Return where this process makes or removes a template; `freeing` finds it by the pid."""
        return self.directory / f"{name}{purpose}.{os.getpid()}"

    def discard(self, name: str, why: str) -> None:
        """Remove a template and say why."""
        early.warning(__name__, f"template {name} is discarded: {why}")
        with suppress(OSError):  # a start goes on without it
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a template, at once for whoever looks for it. VMs that were started from it go on. Raises OSError."""
        leaving = self.scratch(name, ".removed")
        delete(leaving)
        with suppress(FileNotFoundError):
            os.rename(self.directory / name, leaving)
        delete(leaving)

    def condition(self, name: str, *, thorough: bool = False) -> str:
        """Return OK, or what is wrong with a template; `thorough` reads its RAM through."""
        try:
            manifest = files.check(self.directory / name, name, thorough=thorough)
        except FileNotFoundError:
            return "gone"
        except Damaged as error:
            return f"damaged: {error}"
        return f"stale: {why}" if (why := files.staleness(manifest)) else OK

    def facts(self, name: str) -> Facts:
        """Return what is known of a template; zeros where its files do not say."""
        return files.facts(self.directory / name)

    def names(self) -> list[str]:
        """Return the names of all templates, the least recently used first."""
        found = []
        for entry in self._entries():
            with suppress(FileNotFoundError):
                if _is_name(entry.name):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
        return [name for _, name in sorted(found)]

    def prune(self, *, thorough: bool = False) -> dict[str, str]:
        """Remove what no start can use: damaged, stale and half-made templates. Return each with the reason."""
        removed = {}
        for name in self.names():
            if self.condition(name, thorough=thorough) != OK and (lock := self.try_lock(name)):
                with lock:
                    if (condition := self.condition(name, thorough=thorough)) != OK:
                        self.remove(name)
                        removed[name] = condition
        for name in {entry.name.partition(".")[0] for entry in self._entries() if "." in entry.name}:
            if _is_name(name) and (lock := self.try_lock(name)):
                with lock:
                    removed.update(self.sweep(name))
        return removed

    def sweep(self, name: str) -> dict[str, str]:
        """Remove what killed builders of `name` have left. The caller holds its lock, so nobody else makes it."""
        left = [entry for entry in self._entries() if entry.name.startswith(f"{name}.")]
        halves = [entry for entry in left if entry.is_dir(follow_symlinks=False)]
        for half in halves:
            delete(Path(half.path))
        return {half.name: "half-made: its builder is gone" for half in halves}

    def bound(self, newest: str) -> list[str]:
        """Remove the least recently used ones but `newest` until number and bytes are in bounds; return their names."""
        held = {name: files.held_bytes(self.directory / name) for name in self.names()}
        others = [name for name in held if name != newest]
        removed = []
        while others and (len(held) > self.most or sum(held.values()) > self.most_mib << 20):
            removed.append(others.pop(0))
            del held[removed[-1]]
            self.remove(removed[-1])
        return removed

    def _entries(self) -> "list[os.DirEntry[str]]":
        try:
            with os.scandir(self.directory) as entries:
                return list(entries)
        except FileNotFoundError:
            return []


def key(spec: "VmSpec", hypervisor: "Hypervisor") -> str:
    """Return the name of the template for `spec` on this host: 16 hex digits of everything that shapes it.

    Raises OSError.
    """
    versions = f"{messages.PROTOCOL_VERSION} {files.FORMAT}"
    facts = [hypervisor.identity(spec), _host_cpu(), versions, json.dumps(files.sources(spec))]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:_NAME_LENGTH]


def _is_name(name: str) -> bool:
    """Tell templates from whatever else lies there: a setting may name a directory that is not ours alone."""
    return len(name) == _NAME_LENGTH and not name.strip("0123456789abcdef")


def _host_cpu() -> str:
    """The first CPU's model and flags: a VM saved with them must not go on without them."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = file.read(_FIRST_CPU).partition("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(("vendor", "model", "stepping", "flags")))


def _cold(why: str) -> "Origin":
    """Return a cold boot, having said why."""
    from pymicro.shim.hypervisor.base import Boot

    early.warning(__name__, f"no template for this pod, it boots cold: {why}")
    return Boot()


def delete(path: Path) -> None:
    """Remove `path`, whatever it is, if it is there."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
