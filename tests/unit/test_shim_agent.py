"""The agent client: replies in any order, errors by their kind, and nobody waits for a guest that is gone."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pymicro.shim import guestmessages
from pymicro.shim.agent import AgentClient
from pymicro.shim.channel import memory
from pymicro.shim.errors import (
    AlreadyExists,
    GuestError,
    InvalidRequest,
    NotFound,
    SandboxDied,
    ShimError,
    StepTimeout,
    WrongState,
)
from pymicro.wire import frames, messages

from tests.framework.fakes import asynchronous, no_descriptor_leaks, turns

Json = dict[str, Any]  # JSON of any kind


class Conversation:
    """A client and the other end of its connection."""

    def __init__(self) -> None:
        self.guest, host = memory.pair()
        self.events: list[guestmessages.Event] = []
        self.client = AgentClient(host, self.events.append, timeout=2)

    async def request(self) -> Json:
        """Return the next request that the client has sent."""
        return await self.guest.read_message(frames.MAX_PAYLOAD)

    async def say(self, *answers: object) -> None:
        await self.guest.write(b"".join(frames.encode(answer) for answer in answers))  # type: ignore[arg-type]  # also what makes no sense


@asynccontextmanager
async def conversation() -> AsyncIterator[Conversation]:
    with no_descriptor_leaks():
        talk = Conversation()
        try:
            yield talk
        finally:
            await talk.client.close()
            talk.guest.close()


@asynchronous
async def test_a_call_and_its_answer() -> None:
    async with conversation() as talk:
        call = asyncio.create_task(talk.client.call("start", {"container": "c1"}))
        request = await talk.request()
        assert (request["method"], request["params"]) == ("start", {"container": "c1"})
        assert abs(time.time_ns() - request["now_ns"]) < 60 * 10**9
        await talk.say({"id": request["id"], "result": {"pid": 42}})
        assert await call == {"pid": 42}
        assert repr(talk.client) == "<AgentClient pending=0 connected>"


@asynchronous
async def test_answers_in_any_order() -> None:
    async with conversation() as talk:
        calls = [asyncio.create_task(talk.client.call("stats", {"container": str(n)})) for n in range(20)]
        requests = [await talk.request() for _ in calls]
        assert len({request["id"] for request in requests}) == 20
        await talk.say(*({"id": r["id"], "result": {"for": r["params"]["container"]}} for r in reversed(requests)))
        assert [(await call)["for"] for call in calls] == [str(n) for n in range(20)]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (messages.NOT_FOUND, NotFound),
        (messages.ALREADY_EXISTS, AlreadyExists),
        (messages.INVALID, InvalidRequest),
        (messages.WRONG_STATE, WrongState),
        (messages.RUNTIME, GuestError),
        (messages.INTERNAL, GuestError),
        ("a kind of a newer agent", GuestError),
    ],
)
@asynchronous
async def test_error_kinds(kind: str, error: type[ShimError]) -> None:
    async with conversation() as talk:
        call = asyncio.create_task(talk.client.call("start", {}))
        request = await talk.request()
        await talk.say({"id": request["id"], "error": {"kind": kind, "message": "crun: no such program"}})
        with pytest.raises(error, match="crun: no such program") as caught:
            await call
        assert type(caught.value) is error


@asynchronous
async def test_no_answer_in_time_names_the_call_and_the_setting() -> None:
    async with conversation() as talk:
        with pytest.raises(StepTimeout, match=r"did not answer 'pause' in 0\.02 s \(timeouts\.request\)"):
            await talk.client.call("pause", {}, timeout=0.02)
        late = await talk.request()
        await talk.say({"id": late["id"], "result": {}})  # answered when nobody waits any more
        call = asyncio.create_task(talk.client.call("start", {}))
        request = await talk.request()
        await talk.say({"id": request["id"], "result": {"ok": True}})
        assert await call == {"ok": True}


@asynchronous
async def test_events_are_handed_over_in_order() -> None:
    async with conversation() as talk:
        name = {"container": "c1", "exec": None}
        await talk.say(*({"event": "eof", **name, "stream": "stdout", "bytes": n} for n in range(5)))
        await talk.say({"event": "exit", **name, "status": 7, "stdout": 4, "stderr": 0, "of a newer agent": 1})
        await talk.say({"event": "of a newer agent"}, {"event": "oom", "container": "c2"})
        await turns(20)
        ends = [guestmessages.Eof("c1", None, "stdout", n) for n in range(5)]
        assert talk.events == [*ends, guestmessages.Exit("c1", None, 7, 4, 0), guestmessages.Oom("c2")]


@asynchronous
async def test_connection_that_ends_ends_every_call() -> None:
    async with conversation() as talk:
        calls = [asyncio.create_task(talk.client.call("start", {})) for _ in range(3)]
        await turns()
        talk.guest.close()
        for call in calls:
            with pytest.raises(SandboxDied, match="closed its control connection"):
                await call
        await talk.client.wait_closed()
        with pytest.raises(SandboxDied):
            await talk.client.call("start", {})
        assert repr(talk.client) == "<AgentClient pending=0 ended>"


@asynchronous
async def test_closing_it_ends_every_call() -> None:
    async with conversation() as talk:
        call = asyncio.create_task(talk.client.call("start", {}))
        await turns()
        await talk.client.close()
        await talk.client.close()
        with pytest.raises(SandboxDied):
            await call


@asynchronous
async def test_closing_it_ends_a_call_that_cannot_even_be_sent() -> None:
    async with conversation() as talk:
        call = asyncio.create_task(talk.client.call("create", {"spec": "x" * (4 << 20)}, timeout=60))
        await asyncio.sleep(0.02)
        await asyncio.wait_for(talk.client.close(), 1)
        with pytest.raises(SandboxDied):
            await asyncio.wait_for(call, 1)


@asynchronous
async def test_guest_that_dies_while_a_call_is_being_sent() -> None:
    async with conversation() as talk:
        call = asyncio.create_task(talk.client.call("create", {"spec": "x" * (4 << 20)}, timeout=60))
        await asyncio.sleep(0.02)
        talk.guest.close()
        with pytest.raises(SandboxDied):
            await asyncio.wait_for(call, 1)


@pytest.mark.parametrize("end", ["cancelled", "timed out"])
@asynchronous
async def test_call_given_up_half_sent_does_not_spoil_the_next(end: str) -> None:
    """The guest reads slowly; whoever stops waiting must not leave half a frame on the connection."""
    async with conversation() as talk:
        large = {"spec": "x" * (2 << 20)}
        first = asyncio.create_task(talk.client.call("create", large, timeout=0.02 if end == "timed out" else None))
        await asyncio.sleep(0.01)
        if end == "cancelled":
            first.cancel()
        await asyncio.wait([first])
        second = asyncio.create_task(talk.client.call("start", {"container": "c2"}))
        assert (await talk.request())["params"] == large
        request = await talk.request()
        assert request["params"] == {"container": "c2"}
        await talk.say({"id": request["id"], "result": {}})
        assert await second == {}


@asynchronous
async def test_a_guest_that_talks_without_a_pause_leaves_others_their_turn() -> None:
    async with conversation() as talk:
        flood = frames.encode({"event": "invented"}) * 2000

        async def pour() -> None:
            while True:
                await talk.guest.write(flood)

        pouring = asyncio.create_task(pour())
        await asyncio.wait_for(asyncio.sleep(0.05), 0.5)
        pouring.cancel()
        await asyncio.wait([pouring])


@asynchronous
async def test_what_was_given_up_is_not_asked_for_when_the_guest_reads_again() -> None:
    async with conversation() as talk:
        first = asyncio.create_task(talk.client.call("create", {"spec": "x" * (2 << 20)}))  # fills the connection
        await turns()
        with pytest.raises(StepTimeout):
            await talk.client.call("exec", {"exec": "given up"}, timeout=0.02)
        wanted = asyncio.create_task(talk.client.call("exec", {"exec": "wanted"}))
        await turns()
        assert (await talk.request())["method"] == "create"
        assert (await talk.request())["params"] == {"exec": "wanted"}
        for call in (first, wanted):
            call.cancel()
        await asyncio.wait([first, wanted])


@asynchronous
async def test_a_guests_long_speech_is_cut() -> None:
    async with conversation() as talk:
        call = asyncio.create_task(talk.client.call("start", {}))
        request = await talk.request()
        await talk.say({"id": request["id"], "error": {"kind": messages.RUNTIME, "message": "so " * 200_000}})
        with pytest.raises(GuestError) as caught:
            await call
        assert len(str(caught.value)) < 5000


GARBAGE = {
    "not JSON": b"\0\0\0\1{",
    "no object": b"\0\0\0\2[]",
    "too large": b"\xff\xff\xff\xff",
    "larger than a guest's may be": b"\x00\x10\x00\x01",
    "half a frame": b"\0\0\0\5{}",
    "an event without a container": frames.encode({"event": "exit"}),
    "a status that is none": frames.encode(
        {"event": "exit", "container": "c", "exec": None, "status": 256, "stdout": 0, "stderr": 0}
    ),
    "a count below zero": frames.encode(
        {"event": "eof", "container": "c", "exec": None, "stream": "stdout", "bytes": -1}
    ),
    "an output that is none": frames.encode(
        {"event": "eof", "container": "c", "exec": None, "stream": "stdin", "bytes": 1}
    ),
    "both result and error": frames.encode({"id": 1, "result": {}, "error": {"kind": "x", "message": "y"}}),
    "an id that cannot be one": frames.encode({"id": [1], "result": {}}),
    "an error without a kind": frames.encode({"id": 1, "error": {}}),
    "neither result nor error": frames.encode({"id": 1}),
    "an error that is a word": frames.encode({"id": 1, "error": "no"}),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
@asynchronous
async def test_garbage_ends_the_connection_and_every_call(data: bytes) -> None:
    """A guest that talks nonsense is compromised or broken: its sandbox ends, with a clear error, and nothing hangs."""
    guest, host = memory.pair()
    client = AgentClient(host, lambda _event: None, timeout=5)
    call = asyncio.create_task(client.call("start", {}))
    await guest.read_message()
    await guest.write(data)
    await turns(20)
    if data == GARBAGE["half a frame"]:
        assert not call.done()
        guest.close()
    with pytest.raises(SandboxDied, match="the guest's agent"):
        await asyncio.wait_for(call, 1)
    await client.wait_closed()
    await client.close()
    guest.close()


@asynchronous
async def test_request_that_has_no_json_form_harms_nobody() -> None:
    async with conversation() as talk:
        with pytest.raises(TypeError):
            await talk.client.call("create", {"spec": object()})
        call = asyncio.create_task(talk.client.call("start", {}))
        request = await talk.request()
        await talk.say({"id": request["id"], "result": {}})
        assert await call == {}


@asynchronous
async def test_cancelling_who_waits_for_the_end_leaves_the_connection() -> None:
    async with conversation() as talk:
        waiting = asyncio.create_task(talk.client.wait_closed())
        await turns()
        waiting.cancel()
        await asyncio.wait([waiting])
        call = asyncio.create_task(talk.client.call("start", {}))
        request = await talk.request()
        await talk.say({"id": request["id"], "result": {}})
        assert await call == {}
