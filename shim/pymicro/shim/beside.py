"""Work that the kernel may hold up, as a mount of a file server that does not answer: done beside the event loop."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from pymicro.shim.errors import StepTimeout

T = TypeVar("T")


async def beside(
    work: Callable[[], T], undo: Callable[[], object] = bool, *, what: str = "", limit: float | None = None
) -> T:
    """Return the result of `work`, done in a thread of its own. Raises what it does; StepTimeout, that names `what`,
    after `limit` seconds.

    Such a thread cannot be stopped. Where nobody waits for it any more, `undo` is called when it has ended. It does not
    keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            tell = partial(outcome.set_result, work())
        except BaseException as error:  # noqa: BLE001  # the caller gets it
            tell = partial(outcome.set_exception, error)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell)

    def abandoned(_: "asyncio.Future[T]") -> None:
        outcome.exception()  # it has been looked at
        undo()

    threading.Thread(target=run, name="beside", daemon=True).start()
    try:
        async with asyncio.timeout(limit):
            return await asyncio.shield(outcome)
    except TimeoutError:
        outcome.add_done_callback(abandoned)
        raise StepTimeout(f"{what} took longer than {limit:g} s (timeouts.request)") from None
    except asyncio.CancelledError:
        outcome.add_done_callback(abandoned)
        raise
