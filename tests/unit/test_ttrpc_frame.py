"""ttrpc frames: any split of the bytes gives the same frames, and no bytes can break the decoder."""

from itertools import pairwise
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.frame import Decoder, Frame, Oversize

SMALL = 64
"""Stands in for the 4 MiB limit, so that Hypothesis meets it often."""

U32 = st.integers(0, 2**32 - 1)
BYTE = st.integers(0, 255)
WHOLE = st.builds(Frame, U32, BYTE, BYTE, st.binary(max_size=SMALL))
TOO_LARGE = st.builds(Oversize, U32, BYTE, BYTE, st.integers(SMALL + 1, 3 * SMALL))


def wire(frame: Frame | Oversize) -> bytes:
    payload = frame.payload if isinstance(frame, Frame) else b"x" * frame.size
    header = len(payload).to_bytes(4, "big") + frame.stream.to_bytes(4, "big") + bytes([frame.kind, frame.flags])
    return header + payload


def decode(decoder: Decoder, pieces: list[bytes]) -> list[Frame | Oversize]:
    found = []
    for piece in pieces:
        decoder.feed(piece)
        while (frame := decoder.next()) is not None:
            found.append(frame)
    return found


@given(st.lists(WHOLE | TOO_LARGE), st.lists(st.integers(0, 2000)))
def test_any_split_gives_the_same_frames(expected: list[Frame | Oversize], cuts: list[int]) -> None:
    data = b"".join(map(wire, expected))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(edges)]
    decoder = Decoder()
    with patch.object(frames, "MAX_PAYLOAD", SMALL):
        assert decode(decoder, pieces) == expected
    assert decoder.at_boundary


@given(st.lists(WHOLE, min_size=1))
def test_bytes_may_be_fed_before_the_frames_are_taken(expected: list[Frame]) -> None:
    decoder = Decoder()
    for frame in expected:
        decoder.feed(wire(frame))
    assert [decoder.next() for _ in expected] == expected
    assert decoder.next() is None


@given(WHOLE)
def test_encoding_is_the_published_layout(frame: Frame) -> None:
    assert frames.encode(*frame) == wire(frame)


def test_a_known_frame() -> None:
    assert frames.encode(1, frames.REQUEST, frames.REMOTE_OPEN, b"ab") == bytes.fromhex("00000002 00000001 01 02 6162")


@given(st.lists(st.binary(max_size=300)))
def test_no_bytes_break_the_decoder_or_make_it_hoard(pieces: list[bytes]) -> None:
    decoder = Decoder()
    with patch.object(frames, "MAX_PAYLOAD", SMALL):
        for piece in pieces:
            decode(decoder, [piece])
            assert len(decoder._buffer) < 10 + SMALL


def test_an_oversize_frame_is_reported_before_its_payload_arrives() -> None:
    decoder = Decoder()
    size = frames.MAX_PAYLOAD + 1
    decoder.feed(size.to_bytes(4, "big") + bytes.fromhex("00000007 01 00"))
    assert decoder.next() == Oversize(7, 1, 0, size)
    assert decoder.next() is None
    assert not decoder.at_boundary


def test_the_largest_frame_passes() -> None:
    payload = b"x" * frames.MAX_PAYLOAD
    decoder = Decoder()
    decoder.feed(frames.encode(1, frames.REQUEST, 0, payload))
    assert decoder.next() == Frame(1, frames.REQUEST, 0, payload)


def test_a_larger_frame_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="4194305 bytes exceeds the limit of 4194304"):
        frames.encode(1, frames.REQUEST, 0, b"x" * (frames.MAX_PAYLOAD + 1))
