"""Keeps OpenSSL out of the shim: 4 MB in every pod and 10 ms of every start, for TLS that nobody here speaks.

asyncio, hashlib and qemu.qmp import it where it can be had; hashlib has its own SHA-256. To be imported first.
"""

import sys
from types import ModuleType

sys.modules["_hashlib"] = None  # type: ignore[assignment]  # how the import system marks what cannot be imported

_ssl = ModuleType("ssl", "What asyncio and qemu.qmp name when they are imported, and nothing of it works.")
for _name in ("SSLContext", "SSLObject", "SSLError", "SSLWantReadError", "SSLSyscallError"):
    setattr(_ssl, _name, type(_name, (Exception,), {}))
sys.modules["ssl"] = _ssl
