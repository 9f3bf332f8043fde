"""The ttrpc server, by what a client sees on the wire."""

import asyncio
import gc
import socket
import time
from collections.abc import Awaitable, Callable

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import given, settings
from hypothesis import strategies as st
from pymicro.ttrpc import Call, Client, Code, Method, Server, StatusError, current_call
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.messages_pb2 import Request
from pymicro.ttrpc.serving import ServerConnection
from pymicro.ttrpc.status import StatusOf
from pymicro.ttrpc.status import status_of as default_status_of

from tests.unit.ttrpc_harness import (
    SERVICE,
    BytesValue,
    Empty,
    Peer,
    Probe,
    StringValue,
    echo,
    run,
    services,
    serving,
    text_payload,
    until,
)

Scenario = Callable[[Probe, Peer], Awaitable[None]]


def against_server(scenario: Scenario) -> None:
    """Run `scenario` with one raw connection to a server; the connection must still work afterwards."""

    async def everything() -> None:
        probe = Probe()
        async with serving(Server(services(probe))) as address, await Peer.connect(address) as peer:
            await scenario(probe, peer)
            peer.request(999_999, "Echo", "still there")
            assert await peer.text() == (999_999, "still there")

    run(everything())


def test_a_unary_call_is_answered_without_a_status() -> None:
    async def scenario(_: Probe, peer: Peer) -> None:
        peer.request(1, "Echo", "hello")
        assert await peer.text() == (1, "hello")

    against_server(scenario)


@pytest.mark.parametrize(("service", "method"), [("test.Other", "Echo"), (SERVICE, "Other"), ("", "")])
def test_an_unknown_service_or_method_is_unimplemented(service: str, method: str) -> None:
    async def scenario(_: Probe, peer: Peer) -> None:
        peer.send(1, frames.REQUEST, 0, Request(service=service, method=method).SerializeToString())
        assert await peer.status() == (1, Code.UNIMPLEMENTED)

    against_server(scenario)


@pytest.mark.parametrize("stream", [0, 2, 1000])
def test_an_even_stream_is_refused(stream: int) -> None:
    async def scenario(probe: Probe, peer: Peer) -> None:
        peer.request(stream, "Echo")
        assert await peer.status() == (stream, Code.INVALID_ARGUMENT)
        assert probe.started == 0

    against_server(scenario)


@pytest.mark.parametrize("again", [1, 3, 5])
def test_a_stream_number_must_rise(again: int) -> None:
    async def scenario(probe: Probe, peer: Peer) -> None:
        peer.request(5, "Echo", "first")
        assert await peer.text() == (5, "first")
        peer.request(again, "Echo", "second")
        assert await peer.status() == (again, Code.INVALID_ARGUMENT)
        assert probe.started == 1

    against_server(scenario)


def test_a_reused_number_does_not_disturb_the_call_that_has_it() -> None:
    async def scenario(probe: Probe, peer: Peer) -> None:
        peer.request(1, "Wait", "a")
        peer.request(1, "Echo", "b")
        assert await peer.status() == (1, Code.INVALID_ARGUMENT)
        probe.release.set()
        assert await peer.text() == (1, "waited a")

    against_server(scenario)


def test_a_request_that_cannot_be_decoded_is_refused() -> None:
    async def scenario(_: Probe, peer: Peer) -> None:
        peer.send(1, frames.REQUEST, 0, b"\xff\xff")
        assert await peer.status() == (1, Code.INVALID_ARGUMENT)
        bad_payload = Request(service=SERVICE, method="Echo", payload=b"\xff\xff")
        peer.send(3, frames.REQUEST, 0, bad_payload.SerializeToString())
        assert await peer.status() == (3, Code.INTERNAL)

    against_server(scenario)


def test_an_oversize_frame_is_answered_and_skipped() -> None:
    async def scenario(probe: Probe, peer: Peer) -> None:
        size = frames.MAX_PAYLOAD + 100_000
        peer.writer.write(size.to_bytes(4, "big") + bytes.fromhex("00000007 01 00"))
        assert await peer.status() == (7, Code.RESOURCE_EXHAUSTED)
        peer.writer.write(b"\0" * size)
        peer.request(9, "Echo", "after")
        assert await peer.text() == (9, "after")
        assert probe.started == 1

    against_server(scenario)


def test_an_oversize_answer_becomes_a_status() -> None:
    async def large(_: Empty) -> BytesValue:
        return BytesValue(value=bytes(frames.MAX_PAYLOAD))

    async def scenario() -> None:
        server = Server({SERVICE: {"Large": Method(large, Empty)}})
        async with serving(server) as address, await Client.connect(address) as client:
            with pytest.raises(StatusError) as caught:
                await client.call(SERVICE, "Large", Empty(), BytesValue)
            assert caught.value.code == Code.RESOURCE_EXHAUSTED
            assert client.connected

    run(scenario())


def test_the_largest_request_and_answer_pass() -> None:
    async def same(request: BytesValue) -> BytesValue:
        return request

    async def scenario() -> None:
        server = Server({SERVICE: {"Same": Method(same, BytesValue)}})
        async with serving(server) as address, await Client.connect(address) as client:
            envelope = Request(service=SERVICE, method="Same").ByteSize() + 10  # two tags and two lengths of 4 bytes
            value = bytes(range(256)) * (frames.MAX_PAYLOAD // 256)
            value = value[: frames.MAX_PAYLOAD - envelope]
            answer = await client.call(SERVICE, "Same", BytesValue(value=value), BytesValue)
            assert answer.value == value
            with pytest.raises(StatusError, match="exceeds maximum message size"):
                await client.call(SERVICE, "Same", BytesValue(value=value + b"x"), BytesValue)

    run(scenario())


def test_a_fast_call_overtakes_a_slow_one() -> None:
    async def scenario(probe: Probe, peer: Peer) -> None:
        peer.request(1, "Wait", "slow")
        peer.request(3, "Echo", "fast")
        assert await peer.text() == (3, "fast")
        probe.release.set()
        assert await peer.text() == (1, "waited slow")

    against_server(scenario)


def test_unknown_kinds_of_frames_are_ignored() -> None:
    async def scenario(_: Probe, peer: Peer) -> None:
        peer.send(1, 77, 0, b"from the future")
        peer.send(3, frames.RESPONSE, 0, b"")

    against_server(scenario)


def test_data_outside_a_stream_is_refused() -> None:
    async def scenario(_: Probe, peer: Peer) -> None:
        peer.data(1, "nobody")
        assert await peer.status() == (1, Code.INVALID_ARGUMENT)

    against_server(scenario)


def test_data_on_a_unary_call_ends_it() -> None:
    async def scenario(probe: Probe, peer: Peer) -> None:
        peer.request(1, "Wait")
        await probe.running.wait()
        peer.data(1, "more")
        assert await peer.status() == (1, Code.INVALID_ARGUMENT)
        await probe.cancellation.wait()

    against_server(scenario)


@pytest.mark.parametrize("timeout", [20_000_000, 1, -5])
def test_a_deadline_cancels_the_handler(timeout: int) -> None:
    async def scenario(probe: Probe, peer: Peer) -> None:
        peer.request(1, "Wait", timeout_nano=timeout)
        assert await peer.status() == (1, Code.DEADLINE_EXCEEDED)
        assert probe.cancelled == probe.started

    against_server(scenario)


def test_a_far_deadline_does_not_matter() -> None:
    async def scenario(_: Probe, peer: Peer) -> None:
        peer.request(1, "Echo", "x", timeout_nano=2**63 - 1)
        assert await peer.text() == (1, "x")

    against_server(scenario)


def test_a_disconnect_cancels_the_handlers_of_that_connection_only() -> None:
    async def scenario() -> None:
        probe = Probe()
        async with serving(Server(services(probe))) as address, await Peer.connect(address) as staying:
            staying.request(1, "Wait", "a")
            await probe.running.wait()
            leaving = await Peer.connect(address)
            for stream in (1, 3, 5):
                leaving.request(stream, "Wait")
            await until(lambda: probe.started == 4)
            await leaving.close()
            await until(lambda: probe.cancelled == 3)
            probe.release.set()
            assert await staying.text() == (1, "waited a")
            assert probe.cancelled == 3

    run(scenario())


# What handlers raise


def answer_to(error: BaseException, status_of: StatusOf = default_status_of) -> StatusError:
    """Return the error that a client gets when a handler raises `error`, from a server that goes on."""
    found: list[StatusError] = []

    async def broken(_: Empty) -> Empty:
        raise error

    async def scenario() -> None:
        server = Server({SERVICE: {"Broken": Method(broken, Empty)}}, status_of=status_of)
        async with serving(server) as address, await Client.connect(address) as client:
            for _ in range(2):
                with pytest.raises(StatusError) as caught:
                    await client.call(SERVICE, "Broken", Empty(), Empty)
                found.append(caught.value)

    run(scenario())
    return found[-1]


def test_a_status_error_is_passed_on_with_its_details(caplog: pytest.LogCaptureFixture) -> None:
    detail = AnyMessage(type_url="x", value=b"y")
    answer = answer_to(StatusError(Code.NOT_FOUND, "no such thing", (detail,)))
    assert (answer.code, answer.message, answer.details) == (Code.NOT_FOUND, "no such thing", (detail,))
    assert str(answer) == "NOT_FOUND: no such thing"
    assert not caplog.records


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError("a"), Code.NOT_FOUND),
        (FileExistsError("a"), Code.ALREADY_EXISTS),
        (PermissionError("a"), Code.PERMISSION_DENIED),
        (TimeoutError("a"), Code.DEADLINE_EXCEEDED),
    ],
)
def test_some_built_in_errors_have_a_code(error: Exception, code: Code) -> None:
    answer = answer_to(error)
    assert (answer.code, answer.message) == (code, "a")


def test_a_defect_is_logged_and_answered_with_its_text(caplog: pytest.LogCaptureFixture) -> None:
    answer = answer_to(ZeroDivisionError("division by zero"))
    assert (answer.code, answer.message) == (Code.UNKNOWN, "division by zero")
    assert "test.Service/Broken failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_handlers_own_timeout_is_not_taken_for_the_deadline() -> None:
    async def impatient(_: Empty) -> Empty:
        raise TimeoutError("the disk did not answer")

    async def scenario() -> None:
        server = Server({SERVICE: {"Impatient": Method(impatient, Empty)}})
        async with serving(server) as address, await Client.connect(address) as client:
            with pytest.raises(StatusError, match="the disk did not answer"):
                await client.call(SERVICE, "Impatient", Empty(), Empty, timeout=60)

    run(scenario())


def test_the_server_may_classify_errors_itself(caplog: pytest.LogCaptureFixture) -> None:
    def status_of(error: BaseException) -> tuple[int, str] | None:
        return (Code.FAILED_PRECONDITION, "not now") if isinstance(error, LookupError) else None

    assert answer_to(KeyError("x"), status_of=status_of).code == Code.FAILED_PRECONDITION
    assert not caplog.records
    assert answer_to(FileNotFoundError("x"), status_of=status_of).code == Code.UNKNOWN


def test_a_broken_classification_does_not_end_the_server(caplog: pytest.LogCaptureFixture) -> None:
    def status_of(error: BaseException) -> tuple[int, str] | None:
        raise RuntimeError("cannot tell")

    assert answer_to(KeyError("x"), status_of=status_of).code == Code.INTERNAL
    assert "cannot tell" in caplog.text


def test_an_error_text_that_is_no_utf8_is_sent_all_the_same() -> None:
    assert answer_to(FileNotFoundError("/tmp/\udcff")).message == "/tmp/?"


def test_a_handler_that_waited_for_something_cancelled_still_answers() -> None:
    assert answer_to(asyncio.CancelledError()).code == Code.CANCELLED


def test_a_handler_that_returns_nothing_is_a_defect(caplog: pytest.LogCaptureFixture) -> None:
    async def nothing(_: Empty) -> Empty:
        return None  # type: ignore[return-value]  # the defect

    async def scenario() -> None:
        server = Server({SERVICE: {"Nothing": Method(nothing, Empty)}})
        async with serving(server) as address, await Client.connect(address) as client:
            with pytest.raises(StatusError) as caught:
                await client.call(SERVICE, "Nothing", Empty(), Empty)
            assert caught.value.code == Code.UNKNOWN

    run(scenario())
    assert "test.Service/Nothing failed" in caplog.text


# What handlers learn


def test_a_handler_sees_deadline_and_metadata() -> None:
    calls: list[Call] = []

    async def look(request: Empty) -> Empty:
        calls.append(current_call.get())
        return request

    async def scenario() -> None:
        server = Server({SERVICE: {"Look": Method(look, Empty)}})
        async with serving(server) as address, await Client.connect(address) as client:
            now = asyncio.get_running_loop().time()
            await client.call(SERVICE, "Look", Empty(), Empty, timeout=5, metadata={"a": ["1", "2"], "b": ["3"]})
            await client.call(SERVICE, "Look", Empty(), Empty)
            first, second = calls
            assert (first.service, first.method) == (SERVICE, "Look")
            assert first.metadata == {"a": ("1", "2"), "b": ("3",)}
            assert first.deadline == pytest.approx(now + 5, abs=1)
            assert (second.deadline, second.metadata) == (None, {})

    run(scenario())


# Who may connect


@pytest.mark.parametrize("verdict", [False, RuntimeError("cannot tell")])
def test_a_refused_connection_is_closed_unread(verdict: Exception | bool, caplog: pytest.LogCaptureFixture) -> None:
    def authorize(_: object) -> bool:
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    async def scenario() -> None:
        probe = Probe()
        async with serving(Server(services(probe), authorize=authorize)) as address:
            async with await Peer.connect(address) as peer:
                with pytest.raises(ConnectionError):
                    peer.request(1, "Echo")
                    while await peer.frame() is not None:
                        pass
                    raise ConnectionError
            assert probe.started == 0

    run(scenario())
    assert "refused" in caplog.text


def test_the_check_sees_the_socket() -> None:
    uids = []

    async def scenario() -> None:
        server = Server(
            services(Probe()),
            authorize=lambda sock: not uids.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)),  # type: ignore[func-returns-value]  # None on purpose
        )
        async with serving(server) as address, await Client.connect(address) as client:
            assert await echo(client, "hi") == "hi"

    run(scenario())
    assert len(uids[0]) == 12


# Load, back-pressure, the end


def test_a_thousand_calls_at_once() -> None:
    async def scenario() -> None:
        async with serving(Server(services(Probe()))) as address, await Client.connect(address) as client:
            answers = await asyncio.gather(*(echo(client, str(i)) for i in range(1000)))
            assert answers == [str(i) for i in range(1000)]

    run(scenario())


def test_calls_and_streams_that_ended_are_forgotten() -> None:
    async def scenario() -> None:
        async with serving(Server(services(Probe()))) as address, await Client.connect(address) as client:
            for _ in range(10):
                await echo(client, "x")
                async with await client.stream(SERVICE, "Repeat", StringValue) as stream:
                    await stream.close_send()
                    assert await stream.receive() is None
            open_ = (found for found in gc.get_objects() if isinstance(found, ServerConnection) and not found.closing)
            (connection,) = open_
            assert not connection.tasks
            assert not connection._streams

    run(scenario())


def test_connections_that_ended_are_forgotten() -> None:
    async def scenario() -> None:
        async with serving(Server(services(Probe()))) as address:
            gc.collect()
            before = sum(isinstance(found, ServerConnection) for found in gc.get_objects())
            for _ in range(5):
                async with await Client.connect(address) as client:
                    await echo(client, "x")
            await asyncio.sleep(0.05)
            gc.collect()
            assert sum(isinstance(found, ServerConnection) for found in gc.get_objects()) <= before

    run(scenario())


def test_a_client_that_does_not_read_cannot_pile_up_answers() -> None:
    size, count = 64 * 1024, 400

    async def scenario() -> None:
        probe = Probe()
        async with serving(Server(services(probe))) as address, await Peer.connect(address) as peer:
            text = "x" * size
            for i in range(count):
                peer.request(2 * i + 1, "Echo", text)
            last = -1
            while probe.started != last:
                last = probe.started
                await asyncio.sleep(0.1)
            assert 0 < probe.started < count // 4
            for i in range(count):
                assert await peer.text() == (2 * i + 1, text)

    run(scenario())


def test_closing_sends_the_answers_that_are_ready_and_cancels_the_rest() -> None:
    async def scenario() -> None:
        probe = Probe()
        server = Server(services(probe))
        async with serving(server) as address, await Peer.connect(address) as peer:
            peer.request(1, "Wait")
            peer.request(3, "Echo", "x" * 1_000_000)  # more than a socket's buffer
            await until(lambda: probe.started == 2)
            closing = asyncio.create_task(server.close())
            stream, text = await peer.text()
            assert (stream, len(text)) == (3, 1_000_000)
            assert await peer.frame() is None
            await closing
            assert probe.cancelled == 1
            with pytest.raises(ConnectionError):
                await Peer.connect(address)

    run(scenario())


def test_closing_may_let_handlers_finish() -> None:
    async def scenario() -> None:
        probe = Probe()
        server = Server(services(probe))
        async with serving(server) as address, await Peer.connect(address) as peer:
            peer.request(1, "Wait", "a")
            await probe.running.wait()
            closing = asyncio.create_task(server.close(grace=10))
            asyncio.get_running_loop().call_later(0.05, probe.release.set)
            assert await peer.text() == (1, "waited a")
            await closing

    run(scenario())


def test_closing_does_not_wait_for_a_client_that_never_reads() -> None:
    async def scenario() -> None:
        probe = Probe()
        server = Server(services(probe))
        async with serving(server) as address, await Peer.connect(address) as peer:
            peer.request(1, "Echo", "x" * 3_000_000)
            await until(lambda: probe.started == 1)
            start = time.monotonic()
            await server.close()
            assert 0.5 < time.monotonic() - start < 3

    run(scenario())


def test_cancelling_serve_cleans_up_as_well() -> None:
    async def scenario() -> None:
        probe = Probe()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # the kernel chooses an abstract name
            listener.listen()
            task = asyncio.create_task(Server(services(probe)).serve(listener))
            async with await Peer.connect(listener.getsockname().decode()) as peer:
                peer.request(1, "Wait")
                await probe.running.wait()
                task.cancel()
                assert await peer.frame() is None
            with pytest.raises(asyncio.CancelledError):
                await task
            assert listener.fileno() == -1
        assert probe.cancelled == 1

    run(scenario())


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.builds(
            frames.encode,
            st.integers(0, 9),
            st.integers(0, 4),
            st.integers(0, 7),
            st.binary(max_size=20)
            | st.sampled_from(["Echo", "Wait", "Repeat", "Sleep", "?"]).map(
                lambda name: Request(service=SERVICE, method=name, payload=text_payload("x")).SerializeToString()
            ),
        ),
        max_size=20,
    )
)
def test_no_bytes_bring_the_server_down(pieces: list[bytes]) -> None:
    async def scenario() -> None:
        async with serving(Server(services(Probe()))) as address:
            async with await Peer.connect(address) as peer:
                for piece in pieces:
                    peer.writer.write(piece)
                peer.writer.write_eof()
                while await peer.frame() is not None:
                    pass
            async with await Client.connect(address) as client:
                assert await echo(client, "alive") == "alive"

    run(scenario())
