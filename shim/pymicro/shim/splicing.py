"""What both directions of a process's stdio share: how much is moved at once, and how to wait for a descriptor."""

import asyncio

CHUNK = 1 << 20
"""Bytes that one splice moves at most."""
PIPE_SIZE = 1 << 20
"""What pipes and FIFOs are enlarged to: fewer turns of the loop for a process that writes much."""


async def ready(fd: int, *, write: bool) -> None:
    """Return when `fd` can be read from, or written to."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)

    def set_ready() -> None:
        if not future.done():
            future.set_result(None)

    add(fd, set_ready)
    try:
        await future
    finally:
        remove(fd)
