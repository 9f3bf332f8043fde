"""Reading /proc/PID/smaps: what the memory of a process consists of."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

GUEST_RAM, TRANSLATED, ANONYMOUS, FILES = "guest RAM", "translated code", "other anonymous", "files"
PARTS = (GUEST_RAM, TRANSLATED, ANONYMOUS, FILES)

_HEADER = re.compile(r"([0-9a-f]+-[0-9a-f]+) (\S{4}) \S+ \S+ \d+ *(.*)")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping; its sizes in bytes. `path` is empty for anonymous memory."""

    addresses: str
    permissions: str
    path: str
    pss: int
    anonymous: int

    @property
    def shared(self) -> bool:
        return self.permissions.endswith("s")

    @property
    def part(self) -> str:
        """Which of PARTS it belongs to.

        A VMM has the guest's RAM in a memfd; QEMU also maps a template's file on tmpfs. The code that it translates
        under emulation is the only anonymous memory that is both written and executed.
        """
        if self.path.startswith(("/memfd:", "/dev/shm/")):
            return GUEST_RAM
        if self.path and not self.path.startswith("["):
            return FILES
        return TRANSLATED if self.permissions.startswith("rwx") else ANONYMOUS


def parse(text: str) -> Iterator[Mapping]:
    """Yield the mappings of a smaps file (proc(5))."""
    header: re.Match[str] | None = None
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        if found := _HEADER.fullmatch(line):
            if header:
                yield _mapping(header, sizes)
            header, sizes = found, {}
        elif line.endswith(" kB"):
            name, _, number = line.removesuffix(" kB").partition(":")
            sizes[name] = int(number) * 1024
    if header:
        yield _mapping(header, sizes)


def _mapping(header: re.Match[str], sizes: dict[str, int]) -> Mapping:
    addresses, permissions, path = header.groups()
    return Mapping(addresses, permissions, path, sizes.get("Pss", 0), sizes.get("Anonymous", 0))
