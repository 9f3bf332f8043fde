"""Keeps OpenSSL out of the shim: 4 MB in every pod and 10 ms of every start, for TLS that nobody here speaks.

asyncio, hashlib and qemu.qmp import it where it can be had; hashlib has its own SHA-256. To be imported first.
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
