"""Stand-ins and helpers of the shim's unit tests: asynchronous tests without a plugin, descriptors counted."""

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import pytest

LIMIT = 10.0
"""Seconds after which an asynchronous test has hung."""

P = ParamSpec("P")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def asynchronous(test: Callable[P, Coroutine[Any, Any, None]], limit: float = LIMIT) -> Callable[P, None]:
    """Run a coroutine function as a test: in a loop of its own, and never longer than `limit` seconds."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def limited() -> None:
            loop = asyncio.get_running_loop()
            problems: list[dict[str, Any]] = []
            loop.set_exception_handler(lambda _, context: problems.append(context))
            async with asyncio.timeout(limit):
                await test(*args, **kwargs)
            await asyncio.sleep(0)
            assert not problems, f"the loop caught {problems}"

        asyncio.run(limited())

    return run


def descriptors() -> dict[int, str]:
    """Return this process's open file descriptors and what they refer to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


@contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    """Fail if the block leaves a file descriptor open that was not open before."""
    before = descriptors()
    yield
    left = {fd: target for fd, target in descriptors().items() if fd not in before}
    assert not left, f"left open: {left}"


async def turns(count: int = 5) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object], limit: float = 5.0) -> None:
    """Return once `condition()` is true; fail after `limit` seconds."""
    async with asyncio.timeout(limit):
        while not condition():  # conditions of any kind, which set no event
            await asyncio.sleep(0.001)


class Fifo:
    """A FIFO as containerd's client makes it, and the client's end of it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        self._fd = -1

    def open_reader(self) -> None:
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def open_writer(self) -> None:
        """Raises OSError (ENXIO) while nobody reads."""
        self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def read(self, count: int) -> bytes:
        """Return exactly `count` bytes, fewer at the end of file."""
        data = bytearray()
        while len(data) < count:
            try:
                chunk = os.read(self._fd, min(count - len(data), 1 << 20))
            except BlockingIOError:
                await asyncio.sleep(0.001)
                continue
            if not chunk:
                break
            data += chunk
        return bytes(data)

    async def read_to_end(self) -> bytes:
        return await self.read(1 << 40)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await asyncio.sleep(0.001)
