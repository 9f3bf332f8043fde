"""The command line that containerd gives a shim, and what else it says at start. Standard library only, and little of
it.

The flags are Go's: `-name value`, `-name=value`, `--name value`; a flag without a value is a switch. Unknown flags
are skipped with their value, because a newer containerd may add some.
"""

import os
from collections.abc import Sequence

SWITCHES = frozenset({"debug", "v", "info", "h", "help"})
_FALSE = frozenset({"false", "f", "0"})


class Arguments:
    """What containerd said. `action` is "start", "delete" or ""."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Parse `argv`, the program's name left out. Raises ValueError for a flag that lacks its value."""
        flags: dict[str, str] = {}
        rest: list[str] = []
        words = iter(argv)
        for word in words:
            if not word.startswith("-"):
                rest.append(word)
                continue
            name, equals, value = word.lstrip("-").partition("=")
            if name not in SWITCHES and not equals:
                try:
                    value = next(words)
                except StopIteration:
                    raise ValueError(f"the flag -{name} lacks its value") from None
            flags[name] = value
        self.action = rest[0] if rest else ""
        self.namespace = flags.get("namespace", "")
        self.address = flags.get("address", "")
        self.id = flags.get("id", "")
        self.containerd = flags.get("publish-binary", "")
        """containerd's own program; it says of itself which version it is."""
        self.bundle = flags.get("bundle") or os.getcwd()
        on = {name for name in SWITCHES if flags.get(name, "false").lower() not in _FALSE}
        self.debug = "debug" in on
        self.version = "v" in on
        self.info = "info" in on
        self.help = "h" in on or "help" in on

    def __repr__(self) -> str:
        return f"<Arguments {self.action} {self.namespace}/{self.id}>"
