"""The ttrpc client, against a peer that answers as each test wants."""

import asyncio
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymicro.ttrpc import Client, Code, Disconnected, ProtocolError, Server, StatusError
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.messages_pb2 import Request, Response, Status

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
)


async def requests(peer: Peer, count: int) -> dict[str, int]:
    """Receive `count` requests; return their streams by their texts."""
    found = {}
    for _ in range(count):
        frame = await peer.frame()
        assert frame is not None
        assert (frame.kind, frame.flags) == (frames.REQUEST, 0)
        found[StringValue.FromString(Request.FromString(frame.payload).payload).value] = frame.stream
    return found


def test_streams_are_odd_and_rise() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            calls = [asyncio.create_task(echo(client, str(i))) for i in range(4)]
            streams = await requests(peer, 4)
            assert list(streams.values()) == [1, 3, 5, 7]
            for text, stream in streams.items():
                peer.respond(stream, text)
            assert await asyncio.gather(*calls) == ["0", "1", "2", "3"]

    run(scenario())


def test_the_request_says_all_that_was_asked() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            call = asyncio.create_task(echo(client, "x", timeout=2.5, metadata={"k": ["a", "b"]}))
            frame = await peer.frame()
            assert frame is not None
            request = Request.FromString(frame.payload)
            assert (request.service, request.method) == (SERVICE, "Echo")
            assert request.timeout_nano == 2_500_000_000
            assert [(pair.key, pair.value) for pair in request.metadata] == [("k", "a"), ("k", "b")]
            peer.respond(frame.stream, "y")
            assert await call == "y"

    run(scenario())


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_answers_in_any_order_reach_their_callers_and_cancelled_ones_disturb_nobody(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    texts = [str(i) for i in range(count)]
    order = data.draw(st.permutations(texts))
    cancelled = data.draw(st.sets(st.sampled_from(texts)))

    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            calls = {text: asyncio.create_task(echo(client, text)) for text in texts}
            streams = await requests(peer, count)
            for text in cancelled:
                calls[text].cancel()
            for text in order:
                peer.respond(streams[text], f"answer {text}")
            for text in texts:
                if text in cancelled:
                    with pytest.raises(asyncio.CancelledError):
                        await calls[text]
                else:
                    assert await calls[text] == f"answer {text}"

    run(scenario())


def test_a_timeout_is_a_status_and_the_late_answer_is_dropped() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            with pytest.raises(StatusError, match=r"did not answer in 0\.02 s") as caught:
                await echo(client, "late", timeout=0.02)
            assert caught.value.code == Code.DEADLINE_EXCEEDED
            peer.respond((await requests(peer, 1))["late"], "too late")
            call = asyncio.create_task(echo(client, "next"))
            peer.respond((await requests(peer, 1))["next"], "in time")
            assert await call == "in time"
            assert not client._connection._calls

    run(scenario())


def test_a_timeout_also_bounds_a_peer_that_does_not_read() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # the transport can, its type is too wide
            filling = asyncio.create_task(echo(client, "x" * 4_000_000))
            await asyncio.sleep(0.05)
            with pytest.raises(StatusError) as caught:
                await echo(client, "y", timeout=0.05)
            assert caught.value.code == Code.DEADLINE_EXCEEDED
            await client.close()
            with pytest.raises(Disconnected):
                await filling

    run(scenario())


def test_no_waiter_hangs_when_the_peer_goes_away() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            calls = [asyncio.create_task(echo(client, str(i))) for i in range(5)]
            await requests(peer, 5)
            stream = await client.stream(SERVICE, "Repeat", StringValue)
            reading = asyncio.create_task(stream.receive())
            await peer.close()
            results = await asyncio.gather(*calls, reading, return_exceptions=True)
            assert {type(result) for result in results} == {Disconnected}
            assert not client.connected
            with pytest.raises(Disconnected):
                await echo(client, "afterwards")
            with pytest.raises(Disconnected):
                await client.stream(SERVICE, "Repeat", StringValue)
            with pytest.raises(Disconnected):
                await stream.send(StringValue())
            await client.wait_closed()

    run(scenario())


def test_no_waiter_hangs_when_the_client_closes() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            call = asyncio.create_task(echo(client, "x"))
            await requests(peer, 1)
            await client.close()
            with pytest.raises(Disconnected):
                await call
            assert await peer.frame() is None

    run(scenario())


@pytest.mark.parametrize("who", ["peer", "client"])
def test_a_call_that_waits_for_room_is_freed_as_well(who: str) -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # the transport can, its type is too wide
            calls = [asyncio.create_task(echo(client, "x" * 4_000_000)) for _ in range(3)]
            await asyncio.sleep(0.05)
            start = asyncio.get_running_loop().time()
            closing = asyncio.create_task(client.close()) if who == "client" else None
            if closing is None:
                peer.writer.transport.abort()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(result) for result in results} == {Disconnected}
            assert asyncio.get_running_loop().time() - start < 0.5
            if closing is not None:
                await closing

    run(scenario())


def test_disconnected_is_a_connection_error() -> None:
    assert issubclass(Disconnected, ConnectionError)


def test_a_status_is_raised_with_its_details() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            call = asyncio.create_task(echo(client, "x"))
            stream = (await requests(peer, 1))["x"]
            status = Status(code=4711, message="strange")
            status.details.add(type_url="t", value=b"v")
            peer.send(stream, frames.RESPONSE, 0, Response(status=status).SerializeToString())
            with pytest.raises(StatusError) as caught:
                await call
            assert str(caught.value) == "code 4711: strange"
            assert caught.value.details[0].value == b"v"

    run(scenario())


def test_an_explicit_ok_is_no_error() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            call = asyncio.create_task(echo(client, "x"))
            stream = (await requests(peer, 1))["x"]
            peer.send(stream, frames.RESPONSE, 0, Response(status=Status(code=0)).SerializeToString())
            assert await call == ""

    run(scenario())


@pytest.mark.parametrize(
    ("kind", "payload", "error", "text"),
    [
        (frames.RESPONSE, b"\xff\xff", ProtocolError, "cannot be decoded"),
        (frames.DATA, b"", ProtocolError, "kind 3 instead of a response"),
        (frames.RESPONSE, Response(payload=b"\xff").SerializeToString(), StatusError, "answered no StringValue"),
    ],
)
def test_a_bad_answer_fails_its_call_only(kind: int, payload: bytes, error: type[Exception], text: str) -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            bad, good = (asyncio.create_task(echo(client, name)) for name in ("bad", "good"))
            streams = await requests(peer, 2)
            peer.send(streams["bad"], kind, 0, payload)
            peer.send(1000, kind, 0, payload)  # for nobody
            with pytest.raises(error, match=text):
                await bad
            peer.respond(streams["good"], "fine")
            assert await good == "fine"

    run(scenario())


def test_a_second_answer_is_dropped() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            call = asyncio.create_task(echo(client, "x"))
            stream = (await requests(peer, 1))["x"]
            response = Response(payload=StringValue(value="y").SerializeToString()).SerializeToString()
            peer.writer.write(2 * frames.encode(stream, frames.RESPONSE, 0, response))  # at once
            assert await call == "y"
            call = asyncio.create_task(echo(client, "next"))
            peer.respond((await requests(peer, 1))["next"], "z")
            assert await call == "z"

    run(scenario())


def test_an_oversize_answer_fails_its_call_only() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            large, small = (asyncio.create_task(echo(client, name)) for name in ("large", "small"))
            streams = await requests(peer, 2)
            size = frames.MAX_PAYLOAD + 1
            peer.writer.write(size.to_bytes(4, "big") + streams["large"].to_bytes(4, "big") + b"\2\0" + bytes(size))
            with pytest.raises(StatusError) as caught:
                await large
            assert caught.value.code == Code.RESOURCE_EXHAUSTED
            peer.respond(streams["small"], "fine")
            assert await small == "fine"

    run(scenario())


def test_an_oversize_request_is_not_sent() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            with pytest.raises(StatusError) as caught:
                await client.call(SERVICE, "Echo", BytesValue(value=bytes(frames.MAX_PAYLOAD)), StringValue)
            assert caught.value.code == Code.RESOURCE_EXHAUSTED
            call = asyncio.create_task(echo(client, "x"))
            assert await requests(peer, 1) == {"x": 1}
            peer.respond(1, "y")
            assert await call == "y"

    run(scenario())


def test_many_calls_wait_for_a_slow_reader_instead_of_piling_up() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # the transport can, its type is too wide
            calls = [asyncio.create_task(echo(client, f"{i} " + "x" * 100_000)) for i in range(100)]
            await asyncio.sleep(0.05)
            assert client._connection.transport.get_write_buffer_size() < 1_000_000
            peer.writer.transport.resume_reading()  # type: ignore[attr-defined]  # as above
            for _ in calls:
                for text, stream in (await requests(peer, 1)).items():
                    peer.respond(stream, text.split()[0])
            assert await asyncio.gather(*calls) == [str(i) for i in range(100)]

    run(scenario())


def test_when_the_stream_numbers_are_used_up_a_call_says_so() -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            client._connection._next_stream = 2**32 - 1
            call = asyncio.create_task(echo(client, "last"))
            peer.respond((await requests(peer, 1))["last"], "y")
            assert await call == "y"
            with pytest.raises(Disconnected, match="used up"):
                await echo(client, "one more")

    run(scenario())


def test_connecting_to_nothing_raises_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(FileNotFoundError):
            await Client.connect(tmp_path / "none.sock")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(tmp_path / "dead.sock"))
        with pytest.raises(ConnectionRefusedError):
            await Client.connect(tmp_path / "dead.sock")

    run(scenario())


@pytest.mark.parametrize("prefix", ["", "unix://"])
def test_a_path_may_have_a_scheme(tmp_path: Path, prefix: str) -> None:
    async def scenario() -> None:
        path = tmp_path / "s.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(path))
            listener.listen()
            server = Server(services(Probe()))
            task = asyncio.create_task(server.serve(listener))
            async with await Client.connect(f"{prefix}{path}") as client:
                assert await echo(client, "x") == "x"
            await server.close()
            await task

    run(scenario())


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.builds(frames.encode, st.integers(0, 5), st.integers(0, 4), st.integers(0, 7), st.binary(max_size=20)),
        max_size=20,
    )
)
def test_no_bytes_leave_a_caller_waiting(pieces: list[bytes]) -> None:
    async def scenario() -> None:
        async with client_and_peer() as (client, peer):
            calls = [asyncio.create_task(echo(client, "x")) for _ in range(2)]
            stream = await client.stream(SERVICE, "Repeat", StringValue)
            reading = asyncio.create_task(anext(stream, None))
            for piece in pieces:
                peer.writer.write(piece)
            peer.writer.write_eof()
            results = await asyncio.gather(*calls, reading, return_exceptions=True)
            assert all(
                isinstance(r, str | StringValue | None | Disconnected | StatusError | ProtocolError) for r in results
            )

    run(scenario())
