"""What the daemon does not carry around: OpenSSL, which asyncio, hashlib and qemu.qmp would bring."""

import subprocess
import sys

IMPORTS = """
import pymicro.shim.lean
import hashlib, sys
import pymicro.shim.serve, pymicro.shim.service, pymicro.shim.forward, pymicro.ttrpc, pymicro.shim.hypervisor.qemu.vm
print(hashlib.sha256(b"").hexdigest()[:8])
print("libcrypto" in open("/proc/self/maps").read())
"""


def test_the_daemon_is_without_openssl() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["e3b0c442", "False"], done.stderr


def test_typing_extensions_are_there_for_who_needs_them() -> None:
    script = """
from pymicro.shim import lean
lean.import_msgspec()
import msgspec, sys
print("typing_extensions" in sys.modules, "inspect" in sys.modules)
import typing_extensions
lean.import_msgspec()
print(msgspec.convert({"a": 1}, dict[str, int]), typing_extensions.__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["False False", "{'a': 1} typing_extensions"], done.stderr


def test_the_programs_first_import_keeps_it_out() -> None:
    script = """
import sys
sys.argv[1:] = ["-v"]
from pymicro.shim.__main__ import main
main()
print("OpenSSL", sys.modules["_hashlib"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "OpenSSL None" in done.stdout, done.stderr
