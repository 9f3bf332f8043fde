"""The floor of a start: the same VM with the same devices, brought up by hand until its agent says hello.

No containerd, no shim process, nothing imported on the way: what is left is QEMU, the helpers and the guest.
"""

import asyncio
import os
import shutil
import time
from pathlib import Path

import msgspec
from pymicro.shim import rootfs
from pymicro.shim.boot import boot, pod_place
from pymicro.shim.bundle import Bundle
from pymicro.shim.channel.base import Channel
from pymicro.shim.config import Settings, load
from pymicro.shim.timeline import Timeline

RUN = Path("/run/pymicro-bench")


def seconds_to_hello(settings_file: Path, start: str) -> float:
    """Bring a VM up in a process of its own (it unshares its mounts) and return the seconds until the hello.

    `start` is "boot" or "snapshot". Raises RuntimeError when it fails.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(write_end, repr(_measure(load(str(settings_file)), start)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with open(read_end, encoding="ascii") as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    if not text:
        raise RuntimeError(f"the VM of the floor did not come up (start = {start})")
    return float(text)


def _measure(settings: Settings, start: str) -> float:
    settings = msgspec.structs.replace(settings, vm=msgspec.structs.replace(settings.vm, start=start))
    directory = RUN / str(os.getpid())
    directory.mkdir(parents=True)
    rootfs.private_namespace()
    try:
        return asyncio.run(_up(settings, directory))
    finally:
        rootfs.unmount_below(str(directory))
        shutil.rmtree(directory)


async def _up(settings: Settings, directory: Path) -> float:
    def ignore(**_facts: object) -> None: ...

    def no_streams(_token: object, channel: Channel) -> None:
        channel.close()

    bundle = Bundle("/", {})
    begun = time.monotonic()
    with pod_place(str(directory), "floor", bundle, ignore) as place:
        async with boot(place, bundle, settings, no_streams, ignore, Timeline(time.monotonic_ns())):
            return time.monotonic() - begun
