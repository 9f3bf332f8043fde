"""Mutated messages: good ones with a few faults, the same ones for the same seed."""

import random
from collections.abc import Callable, Iterator, Sequence

INTERESTING = (
    *(b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"),
    *(b"[" * 1500, b'"', b"{}", b"null", b"-1", b"1e999", b"9" * 40),
)
"""What numbers, texts and nesting break at."""
MOST_FAULTS = 4


def mutated(originals: Sequence[bytes], total: int, seed: int) -> Iterator[bytes]:
    """Yield messages until they are `total` bytes in all. One in four is as good as it was: the rest must go on."""
    source = random.Random(seed)
    while total > 0:
        message = source.choice(originals)
        for _ in range(source.randrange(1, MOST_FAULTS + 1) if source.randrange(4) else 0):
            message = source.choice(_FAULTS)(message, source, originals)
        total -= max(len(message), 1)
        yield message


def _place(message: bytes, source: random.Random) -> int:
    return source.randrange(len(message) + 1)


def _flip(message: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    if not message:
        return message
    place = source.randrange(len(message))
    return message[:place] + bytes([message[place] ^ (1 << source.randrange(8))]) + message[place + 1 :]


def _overwrite(message: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    place, what = _place(message, source), source.choice(INTERESTING)
    return message[:place] + what + message[place + len(what) :]


def _insert(message: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    place = _place(message, source)
    return message[:place] + source.choice((source.randbytes(source.randrange(1, 9)), *INTERESTING)) + message[place:]


def _remove(message: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    place = _place(message, source)
    return message[:place] + message[place + source.randrange(1, 9) :]


def _repeat(message: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    begin, end = sorted((_place(message, source), _place(message, source)))
    return message[:end] + message[begin:end] * source.randrange(1, 4) + message[end:]


def _cross(message: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    other = source.choice(others)
    return message[: _place(message, source)] + other[_place(other, source) :]


def _cut(message: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    return message[: _place(message, source)]


_FAULTS: tuple[Callable[[bytes, random.Random, Sequence[bytes]], bytes], ...] = (
    *(_flip, _flip, _overwrite, _insert, _remove, _repeat, _cross, _cut),
)
