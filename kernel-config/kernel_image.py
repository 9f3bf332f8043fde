"""vmlinux: does it carry the note by which a VMM finds the PVH entry?"""

import struct
from pathlib import Path

PT_NOTE = 4
XEN_ELFNOTE_PHYS32_ENTRY = 18
"""The note type of the 32-bit PVH entry point, from xen/include/public/elfnote.h."""


def notes(elf: bytes) -> list[tuple[bytes, int]]:
    """Return owner and type of each note in the PT_NOTE segments of a little-endian 64-bit ELF file.

    Raises ValueError for anything else.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a little-endian 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 32)
    entry_size, count = struct.unpack_from("<HH", elf, 54)
    found = []
    for index in range(count):
        kind, _flags, start, _virtual, _physical, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry_size)
        position, end = start, start + size
        while kind == PT_NOTE and position + 12 <= end:
            name_size, value_size, note_type = struct.unpack_from("<III", elf, position)
            found.append((elf[position + 12 : position + 12 + name_size].rstrip(b"\0"), note_type))
            position += 12 + (name_size + 3 & ~3) + (value_size + 3 & ~3)
    return found


def boots_by_pvh(vmlinux: Path) -> bool:
    """Tell whether a VMM can start this kernel by `-kernel vmlinux`. Raises ValueError when it is no kernel at all."""
    return (b"Xen", XEN_ELFNOTE_PHYS32_ENTRY) in notes(vmlinux.read_bytes())
