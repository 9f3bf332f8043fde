"""The shim's side of the control connection: requests with replies, events handed to one listener."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from msgspec import ValidationError, convert
from pymicro.shim.channel.base import Channel
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
from pymicro.shim.guestmessages import EVENTS, Event, Reply
from pymicro.wire import frames, messages

logger = logging.getLogger(__name__)

ERRORS: dict[str, type[ShimError]] = {
    messages.NOT_FOUND: NotFound,
    messages.ALREADY_EXISTS: AlreadyExists,
    messages.INVALID: InvalidRequest,
    messages.WRONG_STATE: WrongState,
}
"""What the agent's error kinds become; any other kind is a GuestError."""
_WORDS = 4096
"""Characters of the guest's error messages that are passed on."""


class AgentClient:
    """Talks to one agent. When the connection ends every pending call raises SandboxDied: nobody waits for ever."""

    def __init__(self, channel: Channel, on_event: Callable[[Event], None], timeout: float) -> None:
        """Take a control connection whose hello has been read; `timeout` (seconds) bounds each call."""
        self._channel = channel
        self._on_event = on_event
        self.timeout = timeout
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0
        self.ended: SandboxDied | None = None
        """Why the connection has ended, once it has."""
        self._outgoing: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read(), name="agent-reader")

    def __repr__(self) -> str:
        return f"<AgentClient pending={len(self._pending)} {'ended' if self.ended else 'connected'}>"

    async def call(self, method: str, params: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Return the agent's result for `method` (wire.messages gives the shapes).

        Raises SandboxDied when the connection ends, StepTimeout, or what the agent's error kind stands for.
        """
        if self.ended:
            raise self.ended
        self._last_id += 1
        call_id = self._last_id
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[call_id] = future
        limit = timeout or self.timeout
        try:
            request = {"id": call_id, "now_ns": time.time_ns(), "method": method, "params": params}
            self._outgoing.put_nowait((call_id, frames.encode(request)))
            async with asyncio.timeout(limit):
                return await future
        except TimeoutError:
            raise StepTimeout(f"the guest did not answer {method!r} in {limit:g} s (timeouts.request)") from None
        finally:
            self._pending.pop(call_id, None)

    async def wait_closed(self) -> None:
        """Return when the connection has ended."""
        await asyncio.shield(self._reader)

    async def close(self) -> None:
        """End the connection; pending calls raise SandboxDied. Idempotent."""
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        reason = "the guest's agent closed its control connection"
        writer = asyncio.create_task(self._write(), name="agent-writer")
        try:
            while True:
                self._take(await self._channel.read_message())
        except OSError as error:
            reason = f"{reason}: {error}"
        except (frames.FrameError, ValidationError) as error:
            reason = f"the guest's agent sent what makes no sense: {error}"
        except Exception as error:
            logger.exception("a message of the guest's agent could not be dealt with")
            reason = f"{reason}: {type(error).__name__}: {error}"
        finally:
            self.ended = SandboxDied(reason)
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(self.ended)
            writer.cancel()  # before the close: a write that waits for room would never hear of it
            await asyncio.wait([writer])
            self._channel.close()

    async def _write(self) -> None:
        """Write what calls have queued: in a task of its own, since a call that is given up must not leave half a
        frame.
        """
        try:
            while True:
                call_id, frame = await self._outgoing.get()
                if call_id in self._pending:  # a guest that has not read for a while is not to do what was given up
                    await self._channel.write(frame)
        except OSError as error:
            logger.debug("cannot write to the guest's agent: %s", error)
            with suppress(OSError):
                self._channel.socket.shutdown(socket.SHUT_RDWR)  # the reader takes it from here

    def _take(self, message: dict[str, Any]) -> None:
        """Hand over an event or a reply. Raises ValidationError where it is neither."""
        if (name := message.get("event")) is not None:
            kind = EVENTS.get(name) if isinstance(name, str) else None
            if kind is None:
                logger.debug("the agent told of something unknown: %s", name)
            else:
                self._on_event(convert(message, kind))
            return
        reply = convert(message, Reply)
        future = self._pending.get(reply.id)
        if future is None or future.done():
            logger.debug("the agent answered a call that nobody waits for any more: %s", reply.id)
        elif reply.error is not None:
            future.set_exception(ERRORS.get(reply.error.kind, GuestError)(reply.error.message[:_WORDS]))
        else:
            future.set_result(reply.result or {})
