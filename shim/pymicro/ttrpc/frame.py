"""Frames: a 10-byte header and up to 4 MiB of payload, encoded and incrementally decoded without any I/O.

The layout is that of containerd/ttrpc (PROTOCOL.md, channel.go), all numbers big-endian:
`length u32 | stream u32 | type u8 | flags u8`.
"""

import struct
from typing import Final, NamedTuple

MAX_PAYLOAD: Final = 4 << 20
"""Largest payload in bytes that a peer accepts (`messageLengthMax`)."""

REQUEST: Final = 1
RESPONSE: Final = 2
DATA: Final = 3

REMOTE_CLOSED: Final = 0x1
"""The sender will send no more data on this stream."""
REMOTE_OPEN: Final = 0x2
"""On a request: the sender goes on to send data on this stream."""
NO_DATA: Final = 0x4
"""The frame carries no message, which an empty payload alone does not say: an empty message encodes to nothing."""

_HEADER: Final = struct.Struct(">IIBB")


class Frame(NamedTuple):
    """One frame as it was received. `kind` and `flags` may have values that this version of the protocol lacks."""

    stream: int
    kind: int
    flags: int
    payload: bytes


class Oversize(NamedTuple):
    """The header of a frame that announced `size` bytes, more than MAX_PAYLOAD: its payload is thrown away."""

    stream: int
    kind: int
    flags: int
    size: int


def encode(stream: int, kind: int, flags: int, payload: bytes) -> bytes:
    """Return one frame. Raises ValueError when the payload exceeds MAX_PAYLOAD."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a payload of {len(payload)} bytes exceeds the limit of {MAX_PAYLOAD}")
    return _HEADER.pack(len(payload), stream, kind, flags) + payload


class Decoder:
    """Turns a byte stream, split anywhere, into frames. Holds at most one frame's bytes and what was fed last."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._discard = 0

    def __repr__(self) -> str:
        return f"<Decoder buffered={len(self._buffer)} discarding={self._discard}>"

    @property
    def at_boundary(self) -> bool:
        """Whether everything that was fed has been returned as whole frames."""
        return not self._buffer and not self._discard

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        if self._discard:
            skipped = min(self._discard, len(data))
            self._discard -= skipped
            data = data[skipped:]
        self._buffer += data

    def next(self) -> Frame | Oversize | None:
        """Return the next frame, or None when more bytes are needed.

        An oversize frame is reported as soon as its header is there; its payload is skipped as it arrives.
        """
        buffer = self._buffer
        if len(buffer) < _HEADER.size:
            return None
        size, stream, kind, flags = _HEADER.unpack_from(buffer)
        end = _HEADER.size + size
        if size > MAX_PAYLOAD:
            self._discard = max(0, end - len(buffer))
            del buffer[:end]
            return Oversize(stream, kind, flags, size)
        if len(buffer) < end:
            return None
        payload = bytes(memoryview(buffer)[_HEADER.size : end])
        del buffer[:end]
        return Frame(stream, kind, flags, payload)
