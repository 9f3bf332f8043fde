"""The committed list of tests that runc passes and pymicro does not run, each with the reason."""

from pathlib import Path

import msgspec

LIST = Path(__file__).parent / "expected.toml"


class ListError(Exception):
    """The list of expected skips is wrong; the message says where."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the list."""

    reason: str


def expected_skips(text: str) -> dict[str, str]:
    """Return the reasons of a list in TOML: a table for each test, with its `reason`. Raises ListError."""
    try:
        entries = msgspec.toml.decode(text, type=dict[str, Entry])
    except msgspec.DecodeError as error:
        raise ListError(f"{LIST.name}: {error}") from error
    for name, entry in entries.items():
        if not name.startswith("Test") or not entry.reason.strip():
            raise ListError(f"{LIST.name}: {name}: a test's name starts with Test, and its reason is not empty")
    return {name: " ".join(entry.reason.split()) for name, entry in entries.items()}
