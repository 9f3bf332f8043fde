"""Work that is finished once it has begun, also when whoever asked for it has gone away."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns or raise what it raises. Being cancelled ends the waiting, not the work."""
    return await asyncio.shield(_begun(work))


class Turns:
    """Work of which one piece at a time is done. Who goes away while it waits is not served, so that a crowd of
    requests whose clients have given up holds nothing and does not keep the next client waiting.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def nobodys(self) -> None:
        """Return when it is nobody's turn."""
        async with self._turn:
            pass

    async def take(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Call `work` when it is its turn, and do what it returns unbroken. Return or raise what comes of it."""
        await self._turn.acquire()
        begun = _begun(work())
        begun.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(begun)


def _begun(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may be that nobody asks
    return task
