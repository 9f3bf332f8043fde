"""Framing: a 4-byte big-endian length, then one JSON object in UTF-8.

The C half of the standard library's json is used directly. Its Python half is what costs: it imports re, enum,
functools and collections, which takes the guest 200 ms under emulation.
"""

from _json import encode_basestring_ascii, make_encoder, make_scanner

PREFIX_SIZE = 4
MAX_PAYLOAD = 16 * 1024 * 1024
"""Largest payload in bytes. An OCI spec with a long seccomp profile takes some 100 KiB; this leaves ample room."""
MAX_FROM_GUEST = 1024 * 1024
"""Largest payload that the host takes from a guest: the pids of a container that has 100,000 processes."""
MAX_HELLO = 4096
"""Largest payload of a connection's first message, whoever it is that connects."""


class FrameError(ValueError):
    """A frame that cannot be decoded: too large, not UTF-8, not JSON, or not a JSON object."""


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """Return the number, unless it is so large that a float is infinite: that could not be said again."""
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text} is beyond what a number can be")
    return value


class _ScannerOptions:
    """What make_scanner reads from its argument: the attributes of a json.JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = staticmethod(_finite)
    parse_int = int
    parse_constant = staticmethod(_refuse_constant)


# Arguments: no search for cycles, default, string encoder, indent, key and item separator, sort, skip, allow NaN.
_encode = make_encoder(None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, False)
_scan = make_scanner(_ScannerOptions)  # type: ignore[arg-type]  # it reads attributes, whatever the type


def encode(message: "dict[str, object]") -> bytes:
    """Return `message` as one frame. Raises FrameError when it exceeds MAX_PAYLOAD."""
    payload = "".join(_encode(message, 0)).encode()
    if len(payload) > MAX_PAYLOAD:
        raise FrameError(f"a message of {len(payload)} bytes exceeds the limit of {MAX_PAYLOAD}")
    return len(payload).to_bytes(PREFIX_SIZE, "big") + payload


def payload_size(prefix: bytes, most: int = MAX_PAYLOAD) -> int:
    """Return the payload length in bytes that a frame's first PREFIX_SIZE bytes announce.

    Raises FrameError when it exceeds `most`, so that a peer cannot make us buffer more.
    """
    size = int.from_bytes(prefix, "big")
    if len(prefix) != PREFIX_SIZE or size > most:
        raise FrameError(f"a frame announces {size} bytes, more than the limit of {most}")
    return size


def decode(payload: bytes) -> "dict[str, object]":
    """Return the JSON object in `payload`. Raises FrameError."""
    try:
        text = payload.decode().strip(" \t\n\r")
        message, end = _scan(text, 0)
    # SystemError is CPython 3.11's answer to bad JSON when nobody has imported json.decoder.
    except (ValueError, RecursionError, StopIteration, SystemError) as error:
        raise FrameError(f"a frame of {len(payload)} bytes is not JSON: {error}") from error
    if end != len(text):
        raise FrameError(f"a frame of {len(payload)} bytes has something after its JSON at character {end}")
    if not isinstance(message, dict):
        raise FrameError(f"a frame holds {type(message).__name__} instead of an object")
    return message
