"""Framing: a 4-byte big-endian length, then one JSON object in UTF-8."""

import json

PREFIX_SIZE = 4
MAX_PAYLOAD = 16 * 1024 * 1024
"""Largest payload in bytes. An OCI spec with a long seccomp profile takes some 100 KiB; this leaves ample room."""


class FrameError(ValueError):
    """A frame that cannot be decoded: too large, not UTF-8, not JSON, or not a JSON object."""


def encode(message: "dict[str, object]") -> bytes:
    """Return `message` as one frame. Raises FrameError when it exceeds MAX_PAYLOAD."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    if len(payload) > MAX_PAYLOAD:
        raise FrameError(f"a message of {len(payload)} bytes exceeds the limit of {MAX_PAYLOAD}")
    return len(payload).to_bytes(PREFIX_SIZE, "big") + payload


def payload_size(prefix: bytes) -> int:
    """Return the payload length in bytes that a frame's first PREFIX_SIZE bytes announce.

    Raises FrameError when it exceeds MAX_PAYLOAD, so that a peer cannot make us buffer more.
    """
    size = int.from_bytes(prefix, "big")
    if len(prefix) != PREFIX_SIZE or size > MAX_PAYLOAD:
        raise FrameError(f"a frame announces {size} bytes, more than the limit of {MAX_PAYLOAD}")
    return size


def decode(payload: bytes) -> "dict[str, object]":
    """Return the JSON object in `payload`. Raises FrameError."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame of {len(payload)} bytes is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise FrameError(f"a frame holds {type(message).__name__} instead of an object")
    return message
