"""A template's files: RAM, the devices' state, and a manifest by which any later change of them is found.

Every start looks here before its VM runs, so little is imported.
"""

import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from msgspec import Struct
from pymicro.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.hypervisor.base import VmSpec

MANIFEST, MEMORY, STATE = "manifest", "memory", "state"
FORMAT = 2
"""Of the manifest; to be raised with any change of what it holds."""
_BLOCK = 64 * 1024

Json = dict[str, Any]
"""A manifest: JSON of any kind."""


class Damaged(Exception):  # a finding, as the errors of errors.py are
    """A template that must not be used; says why."""


class Facts(Struct, frozen=True):
    """A template's shape, when it was made (seconds since the epoch), and the bytes of tmpfs that it holds."""

    vcpus: int
    memory_mib: int
    created_at: float
    held_bytes: int


def sources(spec: "VmSpec") -> dict[str, list[str | int]]:
    """Return which kernel, image and VMM `spec` names: path, size, mtime (ns) and inode of each. Raises OSError."""
    paths = {"kernel": str(spec.kernel), "image": str(spec.image), "VMM": spec.binary}
    return {what: _identity(os.path.realpath(path)) for what, path in paths.items()}


def _identity(path: str) -> list[str | int]:
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns, status.st_ino]


def seal(where: Path, name: str, spec: "VmSpec") -> None:
    """Write the manifest of the RAM and state in `where`, which nobody changes any more. Raises OSError."""
    facts = {
        "name": name,
        "format": FORMAT,
        "protocol": messages.PROTOCOL_VERSION,
        "created_at": time.time(),
        "vcpus": spec.vcpus,
        "memory_mib": spec.memory_mib,
        "made_for": sources(spec),
        "memory_sha256": _memory_digest(where / MEMORY),
        **_fingerprints(where),
    }
    text = json.dumps(facts).encode()
    with open(where / MANIFEST, "xb") as file:
        file.write(text + b"\n" + _digest(text))


def check(where: Path, name: str, *, thorough: bool = False) -> Json:
    """Return the manifest of the template in `where`. Raises FileNotFoundError if there is none, Damaged.

    A start does not read the RAM: it is too large. A change of a file changes its ctime, which nobody can set; only a
    write through a mapping need not, on tmpfs. `thorough` reads it.
    """
    if not stat.S_ISDIR(os.lstat(where).st_mode):
        raise Damaged("it is no directory")
    try:
        facts = _manifest(where)
        if facts.get("name") != name:
            raise Damaged("its manifest is another template's")
        changed = [fact for fact, value in _fingerprints(where).items() if facts.get(fact) != value]
        if thorough and not changed and facts.get("memory_sha256") != _memory_digest(where / MEMORY):
            changed = [MEMORY]
    except OSError as error:
        raise Damaged(str(error)) from error
    if changed:
        raise Damaged(f"changed since it was made: {', '.join(changed)}")
    return facts


def staleness(facts: Json) -> str | None:
    """Return why no pod will ever use the template with this manifest again, None if one may."""
    if facts["protocol"] != messages.PROTOCOL_VERSION:
        return "its agent speaks another version's protocol"
    for what, recorded in facts["made_for"].items():
        path = recorded[0]
        try:
            if _identity(path) != recorded:
                return f"the {what} has changed: {path}"
        except OSError:
            return f"the {what} is gone: {path}"
    return None


def held_bytes(where: Path) -> int:
    """Return what the files in `where` take of their file system."""
    try:
        with os.scandir(where) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    except OSError:
        return 0


def facts(where: Path) -> Facts:
    """Return what is known of the template in `where`; zeros where its manifest does not say."""
    try:
        recorded = _manifest(where)
        return Facts(recorded["vcpus"], recorded["memory_mib"], recorded["created_at"], held_bytes(where))
    except (Damaged, OSError):
        return Facts(0, 0, 0.0, held_bytes(where))


def _manifest(where: Path) -> Json:
    """Return the manifest once its checksum has been found right. Raises Damaged, OSError."""
    text, _, digest = _read(where, MANIFEST).rpartition(b"\n")
    if digest != _digest(text):
        raise Damaged("its manifest is damaged")
    facts = json.loads(text)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise Damaged("another version has made it")
    return facts


def _read(where: Path, name: str) -> bytes:
    _status(where, name)
    return (where / name).read_bytes()


def _status(where: Path, name: str) -> os.stat_result:
    """Return a file's status. Raises Damaged where it is none: a FIFO, to begin with, would never be read through."""
    try:
        status = os.lstat(where / name)
    except FileNotFoundError as error:
        raise Damaged(f"its {name} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"its {name} is no file")
    return status


def _fingerprints(where: Path) -> Json:
    """Return what shows any later change of RAM and state."""
    memory = _status(where, MEMORY)
    return {
        MEMORY: [memory.st_size, memory.st_ino, memory.st_mtime_ns, memory.st_ctime_ns],
        STATE: hashlib.sha256(_read(where, STATE)).hexdigest(),
    }


def _memory_digest(path: Path) -> str:
    """Return the checksum of a sparse file: of all blocks that are not zero, and where they are.

    Holes and zeros count alike. Whoever maps the file and reads a hole makes zeros of it, for tmpfs does.
    """
    digest, block, zeros = hashlib.sha256(), bytearray(_BLOCK), bytes(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        digest.update(end.to_bytes(8, "big"))
        position = _next_data(file.fileno(), 0)
        while position < end:
            position -= position % _BLOCK
            length = os.preadv(file.fileno(), [block], position)
            if block[:length] != zeros[:length]:
                digest.update(position.to_bytes(8, "big") + block[:length])
            position = _next_data(file.fileno(), position + _BLOCK)
    return digest.hexdigest()


def _next_data(fd: int, position: int) -> int:
    """Return where the next bytes are that are no hole, from `position` on; far behind the end if there are none."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError:  # ENXIO
        return 1 << 62


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
