"""What the answer of `start` is, for the containerd that asks."""

from pymicro.shim.bootstrap import Bootstrap, result

TTRPC = "ttrpc"


def answer(path: str, said: Bootstrap) -> bytes:
    """Return what `start` is to print for a shim that listens at `path`."""
    return result(_address(path), TTRPC) if said.understood else in_bundle(path)


def in_bundle(path: str) -> bytes:
    """Return what the bundle's file `address` is to hold, where containerd 1.6 and 1.7 look for it after a restart.

    Containerd of before 2.3 take the same as an answer: an address alone means ttrpc, version 2, and works with all.
    """
    return _address(path).encode()


def _address(path: str) -> str:
    return f"unix://{path}"
