"""ttrpc streams: both ends of this library against each other, and against a peer that breaks the rules."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymicro.ttrpc import Client, ClientStream, Code, ProtocolError, Server, ServerStream, StatusError, StreamMethod
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.streaming import INBOX_MESSAGES

from tests.unit.ttrpc_harness import (
    SERVICE,
    BytesValue,
    Peer,
    Probe,
    StringValue,
    client_and_peer,
    echo,
    run,
    services,
    serving,
    text_payload,
    until,
)

Strings = ServerStream[StringValue, StringValue]
FLOOD = 500
"""Messages: many more than an inbox holds."""


async def count_down(stream: Strings) -> None:
    """One request, many messages; a negative number fails after some."""
    request = await stream.receive()
    assert request is not None
    assert await stream.receive() is None
    number = int(request.value or "0")
    for i in range(abs(number), 0, -1):
        await stream.send(StringValue(value=str(i)))
    if number < 0:
        raise StatusError(Code.FAILED_PRECONDITION, "below zero")


async def join(stream: Strings) -> StringValue:
    """Many messages, one response."""
    return StringValue(value=",".join([message.value async for message in stream]))


@asynccontextmanager
async def connected(probe: Probe | None = None, stall: float | None = 1.0) -> AsyncIterator[Client]:
    table = services(probe or Probe())
    table[SERVICE] |= {
        "CountDown": StreamMethod(count_down, StringValue),
        "Join": StreamMethod(join, StringValue, server_streams=False),
    }
    async with serving(Server(table, stall=stall)) as address, await Client.connect(address, stall=stall) as client:
        yield client


async def texts(stream: ClientStream[StringValue, StringValue]) -> list[str]:
    return [message.value async for message in stream]


def test_both_sides_stream() -> None:
    async def scenario() -> None:
        async with connected() as client, await client.stream(SERVICE, "Repeat", StringValue) as stream:
            for i in range(FLOOD):
                await stream.send(StringValue(value=str(i)))
                answer = await stream.receive()
                assert answer is not None
                assert answer.value == str(i)
            await stream.close_send()
            assert await stream.receive() is None
            assert await stream.receive() is None

    run(scenario())


def test_the_server_streams() -> None:
    async def scenario() -> None:
        async with connected() as client:
            stream = await client.stream(SERVICE, "CountDown", StringValue, request=StringValue(value="500"))
            assert await texts(stream) == [str(i) for i in range(500, 0, -1)]
            empty = await client.stream(SERVICE, "CountDown", StringValue, request=StringValue())
            assert await texts(empty) == []

    run(scenario())


def test_the_client_streams() -> None:
    async def scenario() -> None:
        async with connected() as client:
            stream = await client.stream(SERVICE, "Join", StringValue, server_streams=False)
            for text in "abc":
                await stream.send(StringValue(value=text))
            await stream.close_send()
            assert await texts(stream) == ["a,b,c"]
            nothing = await client.stream(SERVICE, "Join", StringValue, server_streams=False)
            await nothing.close_send()
            assert await texts(nothing) == [""]  # an empty answer is an answer

    run(scenario())


def test_an_empty_message_is_a_message() -> None:
    async def scenario() -> None:
        async with connected() as client, await client.stream(SERVICE, "Repeat", StringValue) as stream:
            await stream.send(StringValue())
            await stream.close_send()
            assert await texts(stream) == [""]

    run(scenario())


def test_messages_come_before_the_error_that_ends_the_stream() -> None:
    async def scenario() -> None:
        async with connected() as client:
            stream = await client.stream(SERVICE, "CountDown", StringValue, request=StringValue(value="-3"))
            await asyncio.sleep(0.05)  # all of it has arrived
            assert [await anext(stream) for _ in range(3)] == [StringValue(value=text) for text in "321"]
            for _ in range(2):
                with pytest.raises(StatusError, match="below zero"):
                    await stream.receive()

    run(scenario())


def test_an_unknown_stream_method_is_unimplemented() -> None:
    async def scenario() -> None:
        async with connected() as client, await client.stream(SERVICE, "None", StringValue) as stream:
            with pytest.raises(StatusError) as caught:
                await stream.receive()
            assert caught.value.code == Code.UNIMPLEMENTED

    run(scenario())


def test_a_message_that_cannot_be_decoded_ends_the_handler_with_a_status() -> None:
    async def scenario() -> None:
        async with connected() as client, await client.stream(SERVICE, "Repeat", StringValue) as stream:
            await stream.send(BytesValue(value=b"\xff"))
            with pytest.raises(StatusError, match=r"no google\.protobuf\.StringValue") as caught:
                await stream.receive()
            assert caught.value.code == Code.INTERNAL

    run(scenario())


def test_an_oversize_message_is_not_sent() -> None:
    async def scenario() -> None:
        async with connected() as client, await client.stream(SERVICE, "Repeat", StringValue) as stream:
            with pytest.raises(StatusError) as caught:
                await stream.send(BytesValue(value=bytes(frames.MAX_PAYLOAD)))
            assert caught.value.code == Code.RESOURCE_EXHAUSTED
            await stream.send(StringValue(value="x" * 4_000_000))
            answer = await stream.receive()
            assert answer is not None
            assert len(answer.value) == 4_000_000

    run(scenario())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.text(max_size=5)), max_size=60))
def test_interleaved_streams_keep_their_own_messages_in_order(script: list[tuple[int, str]]) -> None:
    async def scenario() -> None:
        async with connected() as client:
            streams = [await client.stream(SERVICE, "Repeat", StringValue) for _ in range(5)]
            for number, text in script:
                await streams[number].send(StringValue(value=text))
                assert await echo(client, text) == text
            for stream in streams:
                await stream.close_send()
            for number, stream in enumerate(streams):
                assert await texts(stream) == [text for chosen, text in script if chosen == number]

    run(scenario())


# Back-pressure


def test_a_late_reader_gets_everything_in_order() -> None:
    async def scenario() -> None:
        async with connected(stall=None) as client:
            request = StringValue(value=str(FLOOD))
            stream = await client.stream(SERVICE, "CountDown", StringValue, request=request)
            await asyncio.sleep(0.05)
            assert len(stream.inbox._items) <= INBOX_MESSAGES
            assert await texts(stream) == [str(i) for i in range(FLOOD, 0, -1)]

    run(scenario())


@pytest.mark.parametrize(("size", "limit"), [(100_000, 63), (500_000, 20)])
def test_a_sleeping_handler_stops_the_sender(size: int, limit: int) -> None:
    async def scenario() -> None:
        probe = Probe()
        async with connected(probe, stall=None) as client:
            stream = await client.stream(SERVICE, "Sleep", StringValue)
            sent = 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    while True:
                        await stream.send(StringValue(value="x" * size))
                        sent += 1
            assert sent < limit
            probe.release.set()

    run(scenario())


def test_a_reader_that_catches_up_in_time_keeps_its_stream() -> None:
    async def scenario() -> None:
        async with connected(stall=0.2) as client, await client.stream(SERVICE, "Repeat", StringValue) as stream:
            for _ in range(INBOX_MESSAGES):
                await stream.send(StringValue(value="x"))
            await until(lambda: len(stream.inbox._items) == INBOX_MESSAGES)
            for _ in range(INBOX_MESSAGES):
                await stream.receive()
            await asyncio.sleep(0.3)
            await stream.send(StringValue(value="still there"))
            assert await stream.receive() == StringValue(value="still there")

    run(scenario())


def test_a_handler_that_returns_without_reading_blocks_nobody() -> None:
    async def one(stream: Strings) -> None:
        await stream.receive()
        await asyncio.sleep(0.1)

    async def scenario() -> None:
        server = Server({SERVICE: {**services(Probe())[SERVICE], "One": StreamMethod(one, StringValue)}}, stall=None)
        async with serving(server) as address, await Client.connect(address) as client:
            stream = await client.stream(SERVICE, "One", StringValue)
            for _ in range(FLOOD):
                await stream.send(StringValue(value="x"))
            assert await echo(client, "through") == "through"
            assert await stream.receive() is None

    run(scenario())


def test_a_sleeping_handler_loses_its_stream_and_blocks_nobody_else() -> None:
    async def scenario() -> None:
        probe = Probe()
        async with connected(probe, stall=0.1) as client:
            stream = await client.stream(SERVICE, "Sleep", StringValue)
            for _ in range(FLOOD):
                await stream.send(StringValue(value="x"))
            assert await echo(client, "through") == "through"
            with pytest.raises(StatusError) as caught:
                await stream.receive()
            assert caught.value.code == Code.RESOURCE_EXHAUSTED
            await probe.cancellation.wait()

    run(scenario())


def test_a_sleeping_client_loses_its_stream_and_blocks_nobody_else() -> None:
    async def scenario() -> None:
        async with connected(stall=0.1) as client:
            request = StringValue(value=str(FLOOD))
            stream = await client.stream(SERVICE, "CountDown", StringValue, request=request)
            assert await echo(client, "through") == "through"
            got = [(await anext(stream)).value for _ in range(INBOX_MESSAGES)]
            assert got == [str(i) for i in range(FLOOD, FLOOD - INBOX_MESSAGES, -1)]
            with pytest.raises(StatusError) as caught:
                await stream.receive()
            assert caught.value.code == Code.RESOURCE_EXHAUSTED

    run(scenario())


# The end of a stream


def test_giving_a_stream_up_ends_it_for_the_server() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def read_all(stream: Strings) -> None:
            async for _ in stream:
                pass
            ended.set()

        server = Server({SERVICE: {"Read": StreamMethod(read_all, StringValue)}})
        async with serving(server) as address, await Client.connect(address) as client:
            async with await client.stream(SERVICE, "Read", StringValue) as stream:
                await stream.send(StringValue())
            await ended.wait()
            with pytest.raises(RuntimeError, match="closed"):
                await stream.send(StringValue())
            assert client.connected

    run(scenario())


def test_a_disconnect_cancels_a_stream_handler() -> None:
    async def scenario() -> None:
        probe = Probe()
        async with serving(Server(services(probe))) as address:
            async with await Client.connect(address) as client:
                await client.stream(SERVICE, "Sleep", StringValue)
                await probe.running.wait()
            await probe.cancellation.wait()

    run(scenario())


def test_a_stream_has_one_reader() -> None:
    async def scenario() -> None:
        async with connected() as client, await client.stream(SERVICE, "Repeat", StringValue) as stream:
            first = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="one reader"):
                await stream.receive()
            await stream.close_send()
            assert await first is None

    run(scenario())


def test_a_side_that_does_not_stream_cannot_send() -> None:
    async def send_anyway(stream: Strings) -> StringValue:
        await stream.send(StringValue())
        return StringValue()

    async def scenario() -> None:
        server = Server({SERVICE: {"Join": StreamMethod(send_anyway, StringValue, server_streams=False)}})
        async with serving(server) as address, await Client.connect(address) as client:
            stream = await client.stream(SERVICE, "Join", StringValue, request=StringValue(), server_streams=False)
            with pytest.raises(RuntimeError, match="does not stream"):
                await stream.send(StringValue())
            with pytest.raises(StatusError, match="does not stream"):
                await stream.receive()

    run(scenario())


def test_data_after_the_end_is_refused_and_ends_the_handler() -> None:
    async def scenario() -> None:
        probe = Probe()
        async with serving(Server(services(probe))) as address, await Peer.connect(address) as peer:
            peer.request(1, "Sleep", flags=frames.REMOTE_OPEN)
            await probe.running.wait()
            peer.end(1)
            peer.end(1)  # saying it twice does no harm
            peer.request(3, "Echo", "x")
            assert await peer.text() == (3, "x")
            peer.data(1, "too late")
            assert await peer.status() == (1, Code.INVALID_ARGUMENT)
            await probe.cancellation.wait()

    run(scenario())


def test_the_last_data_may_carry_a_message() -> None:
    async def scenario() -> None:
        async with serving(Server(services(Probe()))) as address, await Peer.connect(address) as peer:
            peer.request(1, "Repeat", flags=frames.REMOTE_OPEN)
            peer.send(1, frames.DATA, frames.REMOTE_CLOSED, text_payload("last"))
            assert await peer.frame() == (1, frames.DATA, 0, text_payload("last"))
            assert await peer.frame() == (1, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA, b"")

    run(scenario())


def test_the_first_message_may_come_with_the_request() -> None:
    async def scenario() -> None:
        async with serving(Server(services(Probe()))) as address, await Peer.connect(address) as peer:
            peer.request(1, "Repeat", "first", flags=frames.REMOTE_OPEN)
            assert await peer.frame() == (1, frames.DATA, 0, text_payload("first"))
            peer.data(1, "second")
            assert await peer.frame() == (1, frames.DATA, 0, text_payload("second"))
            peer.end(1)
            assert await peer.frame() == (1, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA, b"")

    run(scenario())


def test_an_oversize_message_ends_its_stream_only() -> None:
    async def scenario() -> None:
        probe = Probe()
        async with serving(Server(services(probe))) as address, await Peer.connect(address) as peer:
            peer.request(1, "Sleep", flags=frames.REMOTE_OPEN)
            await probe.running.wait()
            size = frames.MAX_PAYLOAD + 1
            peer.writer.write(size.to_bytes(4, "big") + bytes.fromhex("00000001 03 00") + bytes(size))
            assert await peer.status() == (1, Code.RESOURCE_EXHAUSTED)
            await probe.cancellation.wait()
            peer.request(3, "Echo", "x")
            assert await peer.text() == (3, "x")

    run(scenario())


def test_the_client_half_closes_and_opens_with_the_published_flags() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            both = await client.stream(SERVICE, "Repeat", StringValue)
            await client.stream(SERVICE, "CountDown", StringValue, request=StringValue())
            await both.send(StringValue(value="x"))
            await both.close_send()
            await both.close_send()  # saying it twice sends it once
            await client.close()
            seen = []
            while (frame := await peer.frame()) is not None:
                seen.append((frame.stream, frame.kind, frame.flags))
            assert seen == [
                (1, frames.REQUEST, frames.REMOTE_OPEN),
                (3, frames.REQUEST, frames.REMOTE_CLOSED),
                (1, frames.DATA, 0),
                (1, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA),
            ]

    run(scenario())


def test_a_server_that_streams_where_it_must_not_breaks_the_protocol() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            stream = await client.stream(SERVICE, "Join", StringValue, server_streams=False)
            peer.data(1, "x")
            with pytest.raises(ProtocolError):
                await stream.receive()

    run(scenario())


def test_a_response_may_end_a_stream_of_messages() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            stream = await client.stream(SERVICE, "Repeat", StringValue)
            peer.data(1, "a")
            peer.send(1, frames.RESPONSE)
            assert await texts(stream) == ["a"]

    run(scenario())


def test_an_ended_stream_is_forgotten() -> None:
    async def scenario() -> None:
        probe = Probe()
        async with connected(probe) as client:
            for _ in range(3):
                await texts(await client.stream(SERVICE, "CountDown", StringValue, request=StringValue(value="2")))
            await until(lambda: not client._connection._streams)

    run(scenario())
