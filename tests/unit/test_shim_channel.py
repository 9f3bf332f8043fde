"""Connections of the guest, and the tokens by which its streams find their process."""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymicro.shim.channel import memory
from pymicro.shim.channel.base import Channel, ChannelClosed
from pymicro.shim.channel.hybrid import HybridListener
from pymicro.shim.channel.vsock import FIRST_CID, LAST_CID, VsockListener
from pymicro.shim.streams import Streams
from pymicro.wire import frames

from tests.framework.fakes import asynchronous, no_descriptor_leaks


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room in a socket's address."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@asynchronous
async def test_messages_in_pieces_and_in_one_piece() -> None:
    ours, theirs = memory.pair()
    one, two = frames.encode({"id": 1}), frames.encode({"id": 2, "text": "x" * 100_000})
    reading = asyncio.create_task(ours.read_message())
    for byte in one:
        await theirs.write(bytes([byte]))
        await asyncio.sleep(0)
    assert await reading == {"id": 1}
    writing = asyncio.create_task(theirs.write(two + one + two))
    assert [(await ours.read_message())["id"] for _ in range(3)] == [2, 1, 2]
    await writing
    ours.close()
    theirs.close()


@asynchronous
async def test_not_one_byte_more_is_read() -> None:
    """After a stream's hello come the process's raw bytes: they belong to somebody else."""
    ours, theirs = memory.pair()
    await theirs.write(frames.encode({"hello": "stream"}) + b"raw")
    await ours.read_message()
    assert os.read(ours.fileno(), 100) == b"raw"
    ours.close()
    theirs.close()


@pytest.mark.parametrize("data", [b"", b"\0\0", b"\0\0\0\x02{"])
@asynchronous
async def test_end_in_the_middle_of_a_message(data: bytes) -> None:
    ours, theirs = memory.pair()
    await theirs.write(data)
    theirs.close()
    with pytest.raises(ChannelClosed, match=r"after [012] of [42] bytes"):
        await ours.read_message()
    ours.close()


@asynchronous
async def test_announced_size_is_checked_before_anything_is_buffered() -> None:
    ours, theirs = memory.pair()
    await theirs.write((1 << 31).to_bytes(4, "big"))
    with pytest.raises(frames.FrameError, match="more than the limit"):
        await ours.read_message()
    ours.close()
    theirs.close()


@asynchronous
async def test_hybrid_listener(short: Path) -> None:
    listener = HybridListener(short / "vsock", 1234)
    assert listener.path == short / "vsock_1234", "Firecracker's convention"
    reader, writer = await asyncio.open_unix_connection(str(listener.path))
    channel = await listener.accept()
    writer.write(frames.encode({"hello": "control"}))
    assert await channel.read_message() == {"hello": "control"}
    channel.close()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    listener.close()
    listener.close()
    assert not listener.path.exists()


@asynchronous
async def test_hybrid_listener_whose_accept_is_cancelled(short: Path) -> None:
    listener = HybridListener(short / "vsock", 1)
    accepting = asyncio.create_task(listener.accept())
    await asyncio.sleep(0)
    accepting.cancel()
    await asyncio.wait([accepting])
    listener.close()


@asynchronous
async def test_kernel_vsock_reserves_a_cid() -> None:
    try:
        one, other = VsockListener(), VsockListener()
    except OSError as error:
        pytest.skip(f"no AF_VSOCK here: {error}")
    assert one.cid != other.cid
    assert all(FIRST_CID <= listener.cid <= LAST_CID for listener in (one, other))
    one.close()
    one.close()
    other.close()


class Taker:
    def __init__(self) -> None:
        self.channels: list[Channel] = []

    def __call__(self, channel: Channel) -> None:
        self.channels.append(channel)


def test_token_leads_to_its_process_once() -> None:
    streams, taker = Streams(), Taker()
    token = streams.expect(taker)
    first, second, third = (memory.pair() for _ in range(3))
    streams.claim(token, first[0])
    assert taker.channels == [first[0]]
    streams.claim(token, second[0])
    streams.claim("another", third[0])
    assert second[0].fileno() == third[0].fileno() == -1, "whoever guesses is turned away"
    for pair in (first, second, third):
        for channel in pair:
            channel.close()


@pytest.mark.parametrize("token", [None, 7, "", [], {"a": 1}, b"x"])
def test_tokens_that_are_none(token: object) -> None:
    """A guest may send whatever it likes."""
    streams = Streams()
    streams.expect(Taker())
    ours, theirs = memory.pair()
    streams.claim(token, ours)
    assert ours.fileno() == -1
    theirs.close()


def test_tokens_cannot_be_guessed() -> None:
    streams = Streams()
    tokens = {streams.expect(Taker()) for _ in range(100)}
    assert len(tokens) == 100
    assert all(token is not None and len(token) == 32 for token in tokens)


def test_forgotten_tokens_are_worth_nothing() -> None:
    streams, taker = Streams(), Taker()
    token = streams.expect(taker)
    assert streams.expect(None) is None
    streams.forget([token, None])
    ours, theirs = memory.pair()
    streams.claim(token, ours)
    assert taker.channels == []
    theirs.close()
