"""Framing with the C half of json gives what the whole of json gives, and refuses what it refuses."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymicro.wire import frames

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.dictionaries(st.text(), VALUES, max_size=5)
BAD = (
    b"",
    b" ",
    b"[",
    b"{",
    b'{"a":1',
    b'{"a":1,}',
    b"nonsense",
    b'{"a":NaN}',
    b'{"a":1e999}',
    b'{"a":1} x',
    b"[1]",
    b'"a"',
    b"\xff",
    b"[" * 100_000,
)


@given(MESSAGES)
def test_round_trip(message: dict[str, object]) -> None:
    frame = frames.encode(message)
    payload = frame[frames.PREFIX_SIZE :]
    assert frames.payload_size(frame[: frames.PREFIX_SIZE]) == len(payload)
    assert frames.decode(payload) == message == json.loads(payload)


@given(MESSAGES)
def test_decodes_what_json_writes(message: dict[str, object]) -> None:
    assert frames.decode(json.dumps(message, indent=1, ensure_ascii=False).encode(errors="surrogatepass")) == message


@pytest.mark.parametrize("payload", BAD)
def test_bad_payload(payload: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.decode(payload)


def test_bad_payload_without_the_rest_of_json() -> None:
    """In the guest nobody has imported json: its C half then fails in another way."""
    paths = [path for path in sys.path if path.endswith("protos")]
    script = f"""
import sys
sys.path[:0] = {paths!r}
from pymicro.wire import frames
assert "json" not in sys.modules
for payload in {BAD!r}:
    try:
        frames.decode(payload)
    except frames.FrameError:
        continue
    raise SystemExit(repr(payload))
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True)


def test_too_large() -> None:
    with pytest.raises(frames.FrameError, match="exceeds"):
        frames.encode({"a": "x" * frames.MAX_PAYLOAD})
    with pytest.raises(frames.FrameError, match="announces"):
        frames.payload_size((frames.MAX_PAYLOAD + 1).to_bytes(4, "big"))
    with pytest.raises(frames.FrameError):
        frames.payload_size(b"\0\0")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_what_json_cannot_say(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        frames.encode({"a": value})
