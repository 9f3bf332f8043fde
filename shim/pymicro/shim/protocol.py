"""Which protocol a shim speaks with containerd, ttrpc or gRPC, and how the answer of `start` says it.

gRPC is for containerd 1.7. containerd 1.6 does not know it. From 2.0 on containerd's gRPC client begins idle, and an
idle one is taken for a closed one (core/runtime/v2/shim.go, grpcDialContext): the pod is freed a moment after its
start. ttrpc works with all of them, so it is spoken wherever gRPC was asked for and would do harm.
"""

import json
import os
import select
from contextlib import suppress

from pymicro.shim import settings_file
from pymicro.shim.bootstrap import Bootstrap, result
from pymicro.shim.errors import ShimError

TTRPC = "ttrpc"
GRPC = "grpc"
GRPC_VERSION = "1.7"
"""The containerd whose gRPC shims live."""
_JSON_VERSION = 2
"""The version of a shim that containerd 1.7 takes; it refuses any higher one."""
_PATIENCE = 2.0
"""Seconds that `containerd -v` may take."""


class Choice:
    """A protocol, and what is worth a warning about it."""

    def __init__(self, protocol: str, warning: str = "") -> None:
        self.protocol = protocol
        self.warning = warning

    def __repr__(self) -> str:
        return f"<Choice {self.protocol} {self.warning}>"


def choose(said: Bootstrap, containerd: str) -> Choice:
    """Return what a new shim is to speak with the containerd whose program is `containerd`."""
    if not _grpc_is_set(said):
        return Choice(TTRPC)
    version = said.version or containerd_version(containerd)
    if version.split(".")[:2] == GRPC_VERSION.split("."):
        return Choice(GRPC)
    what = (
        f"containerd {version} ends"
        if version
        else f"what {containerd or 'containerd'} is cannot be told, and others end"
    )
    return Choice(
        TTRPC, f'shim.protocol = "grpc" is for containerd {GRPC_VERSION}: {what} gRPC shims; this one speaks ttrpc'
    )


def _grpc_is_set(said: Bootstrap) -> bool:
    """Tell whether the settings say gRPC. What is wrong with them is for the daemon to say: Create answers it."""
    with suppress(ShimError):
        content = settings_file.read(said.options.config_path).content + said.options.config_body
        # a TOML parser takes longer than the rest of `start`: without the word, not even escaped, it need not be asked
        if GRPC.encode() in content or b"\\" in content:
            from pymicro.shim import lean

            lean.import_msgspec()
            from pymicro.shim.config import load

            return load(said.options.config_path, said.options.config_body).shim.protocol == GRPC
    return False


def containerd_version(program: str) -> str:
    """Return the version that containerd's program says of itself, such as "1.7.24", "" where that is not to be had.

    It says "containerd <Go module> <version> <commit>" (cmd/containerd).
    """
    if not os.path.isabs(program):
        return ""
    said, say = os.pipe2(os.O_CLOEXEC)
    try:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, say, 1),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        pid = os.posix_spawn(program, [program, "-v"], os.environ, file_actions=actions)
    except OSError:
        os.close(said)
        return ""
    finally:
        os.close(say)
    with open(said, "rb", buffering=0) as pipe:
        words = pipe.read(4096).decode(errors="replace").split() if select.select([pipe], [], [], _PATIENCE)[0] else []
    with suppress(ProcessLookupError):
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    return words[2].removeprefix("v") if len(words) > 2 else ""


def answer(path: str, protocol: str, said: Bootstrap) -> bytes:
    """Return what `start` is to print for a shim that listens at `path` and speaks `protocol`."""
    if said.understood:
        return result(_address(path, protocol), protocol)
    return in_bundle(path, protocol)


def in_bundle(path: str, protocol: str) -> bytes:
    """Return what the bundle's file `address` is to hold, where containerd 1.6 and 1.7 look for it after a restart.

    Containerd of before 2.3 take the same as an answer: an address alone means ttrpc, version 2, and works with all of
    them; anything else takes JSON.
    """
    if protocol == TTRPC:
        return _address(path, protocol).encode()
    return json.dumps({"version": _JSON_VERSION, "address": _address(path, protocol), "protocol": protocol}).encode()


def _address(path: str, protocol: str) -> str:
    """Return the address in the form that containerd's client takes: for gRPC it writes `unix://` before it itself."""
    return path if protocol == GRPC else f"unix://{path}"
