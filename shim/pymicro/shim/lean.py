"""Keeps out of the shim what its libraries import and nobody here uses. To be imported first.

OpenSSL is 4 MB in every pod and 10 ms of every start, for TLS that nobody here speaks: asyncio, hashlib and qemu.qmp
import it where it can be had; hashlib has its own SHA-256.
"""

import sys
from types import ModuleType


class _NoSsl(ModuleType):
    """Has every class that somebody compares with or names in a signature, and no object is ever one of them."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(name)
        named = type(name, (Exception,), {})
        setattr(self, name, named)
        return named


sys.modules["_hashlib"] = None  # type: ignore[assignment]  # how the import system marks what cannot be imported
sys.modules["ssl"] = _NoSsl("ssl")


def import_msgspec() -> None:
    """Import msgspec as where typing_extensions is not installed: it takes from typing what it needs, in half the time.

    Whoever wants that module later gets it.
    """
    if "typing_extensions" in sys.modules:
        return
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]  # as above
    import msgspec  # noqa: F401

    del sys.modules["typing_extensions"]
