"""The little of protobuf's encoding that `start` and `delete` need, by hand: to import the library takes longer than
both take to run.

The encoding is protobuf's documentation's (protobuf.dev, "Encoding").
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


def fields(message: bytes) -> "Iterator[tuple[int, int | bytes]]":
    """Yield number and value of each field, in the order of the bytes: numbers as they are on the wire, unsigned, and
    everything with a length as bytes. Fields of fixed size, which no message of ours has, are skipped.

    Raises ValueError that says at which byte the message makes no sense.
    """
    at = 0
    while at < len(message):
        begin = at
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise ValueError(f"byte {begin}: there is no field 0")
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif kind == _LENGTH:
            size, at = _varint(message, at)
            if size > len(message) - at:
                raise ValueError(f"byte {begin}: field {number} has {size} bytes, {len(message) - at} are left")
            yield number, message[at : at + size]
            at += size
        elif kind in _FIXED:
            at += _FIXED[kind]
            if at > len(message):
                raise ValueError(f"byte {begin}: field {number} is cut off")
        else:
            raise ValueError(f"byte {begin}: field {number} is of the unknown kind {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at byte `at`, and where it ends. Raises ValueError."""
    value = 0
    for index in range(_LONGEST_VARINT):
        if at + index >= len(message):
            raise ValueError(f"byte {at}: a number is cut off")
        byte = message[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & (1 << 64) - 1, at + index + 1
    raise ValueError(f"byte {at}: a number is longer than {_LONGEST_VARINT} bytes")


def text(value: "int | bytes") -> str:
    """Return a string field's value. Raises ValueError where it is none."""
    if isinstance(value, int):
        raise ValueError(f"the number {value} stands where a string should")  # noqa: TRY004  # the message's, not ours
    return value.decode()


def data(value: "int | bytes") -> bytes:
    """Return the value of a field of bytes or of a message. Raises ValueError where it is none."""
    if isinstance(value, int):
        raise ValueError(f"the number {value} stands where bytes should")  # noqa: TRY004  # the message's, not ours
    return value


def signed(value: "int | bytes") -> int:
    """Return an int32's or an enum's value: negative ones are on the wire as 64 bits. Raises ValueError."""
    if isinstance(value, bytes):
        raise ValueError(f"{len(value)} bytes stand where a number should")  # noqa: TRY004  # the message's, not ours
    return value - (1 << 64) if value >> 63 else value


def field(number: int, value: "int | str | bytes") -> bytes:
    """Return a field as protobuf writes it: nothing for 0 and for what is empty. Numbers are not negative."""
    if not value:
        return b""
    if isinstance(value, int):
        return varint(number << 3 | _VARINT) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | _LENGTH) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """Return a number of at least 0 in protobuf's variable length."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
