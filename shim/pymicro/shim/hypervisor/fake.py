"""A VMM without a VM: its guest is a scripted agent on socket pairs. For tests of everything above the VMM.

The guest answers every request as the real agent does when all goes well; a test replaces single answers, makes it
write, exit, or die.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymicro.shim.channel import memory
from pymicro.shim.channel.base import Channel
from pymicro.shim.errors import SandboxDied
from pymicro.shim.hypervisor.base import Device, Origin, VmExit, VmSpec
from pymicro.shim.spawn import Place
from pymicro.wire import frames, messages

Json = dict[str, Any]
"""A message: JSON of any kind."""
Answer = Callable[[Json], Awaitable[Json | None]]
"""Takes a request's params and returns the result (None for {}), or raises Refused."""

HELLO: Json = {
    "hello": "control",
    "version": messages.PROTOCOL_VERSION,
    "kernel": "6.12-fake",
    "boot_ms": 5,
    "agent_ms": 9,
}


class Refused(Exception):  # it is an answer
    """Makes the guest answer with an error of `kind`, one of messages.ERROR_KINDS."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class GuestProcess:
    """A process in the guest: its pid, its stream tokens, and what it has sent."""

    pid: int
    tokens: Json
    channels: dict[str, Channel] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=lambda: {"stdout": 0, "stderr": 0})
    exited: bool = False


class FakeGuest:
    """The agent's side of the protocol. `requests` are those that have come so far, as (method, params)."""

    def __init__(self, hello: Json | None = None) -> None:
        self.hello = HELLO if hello is None else hello
        self.requests: list[tuple[str, Json]] = []
        self.answers: dict[str, Answer] = {}
        self.processes: dict[tuple[str, str | None], GuestProcess] = {}
        self._dial: Callable[[], Channel] = self._not_running
        self._control: Channel | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_pid = 100

    def __repr__(self) -> str:
        return f"<FakeGuest processes={list(self.processes)} requests={len(self.requests)}>"

    @staticmethod
    def _not_running() -> Channel:
        raise RuntimeError("the guest does not run yet")

    # --- life

    def boot(self, dial: Callable[[], Channel]) -> None:
        """Begin: connect to the host by `dial` and say hello."""
        self._dial = dial
        self._spawn(self._serve())

    def stop(self) -> None:
        """Vanish, as when the VMM is killed: all connections break."""
        for task in self._tasks:
            task.cancel()
        for process in self.processes.values():
            for channel in process.channels.values():
                channel.close()
        if self._control is not None:
            self._control.close()

    def methods(self) -> list[str]:
        """Return the methods that have been called, in order."""
        return [method for method, _ in self.requests]

    def _spawn(self, work: Any) -> None:  # a coroutine; its result is of no interest
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        self._control = self._dial()
        with suppress(OSError):
            await self._control.write(frames.encode(self.hello))
            while True:
                self._spawn(self._answer(await self._control.read_message()))

    async def _answer(self, request: Json) -> None:
        method, params = request["method"], request["params"]
        self.requests.append((method, params))
        answer = self.answers.get(method) or getattr(self, f"do_{method}")
        try:
            reply: Json = {"result": await answer(params) or {}}
        except Refused as error:
            reply = {"error": {"kind": error.kind, "message": str(error)}}
        await self._say({"id": request["id"], **reply})

    async def _say(self, message: Json) -> None:
        assert self._control is not None
        with suppress(OSError):
            await self._control.write(frames.encode(message))

    # --- what a test makes it do

    def process(self, container: str, exec_id: str | None = None) -> GuestProcess:
        """Return a process. Raises Refused where there is none."""
        try:
            return self.processes[container, exec_id]
        except KeyError:
            raise Refused(messages.NOT_FOUND, f"no process {exec_id or 'init'} in {container}") from None

    async def stream(self, name: str, container: str, exec_id: str | None = None) -> Channel:
        """Return the connection of the stream `name` ("stdin", "stdout", "stderr"), opened when it is not yet."""
        process = self.process(container, exec_id)
        if name not in process.channels:
            process.channels[name] = channel = self._dial()
            await channel.write(frames.encode({"hello": "stream", "token": process.tokens[name]}))
        return process.channels[name]

    async def write(self, data: bytes, container: str, exec_id: str | None = None, stream: str = "stdout") -> None:
        """Have a process write `data`."""
        channel = await self.stream(stream, container, exec_id)
        await channel.write(data)
        self.process(container, exec_id).sent[stream] += len(data)

    async def end(self, stream: str, container: str, exec_id: str | None = None) -> None:
        """Say that an output has ended."""
        count = self.process(container, exec_id).sent[stream]
        name = {"container": container, "exec": exec_id}
        await self._say({"event": "eof", **name, "stream": stream, "bytes": count})

    async def exit(self, status: int, container: str, exec_id: str | None = None, *, ends: bool = True) -> None:
        """Have a process exit, its outputs ending with it unless a child holds them (`ends`)."""
        process = self.process(container, exec_id)
        process.exited = True
        name = {"container": container, "exec": exec_id}
        await self._say({"event": "exit", **name, "status": status, **process.sent})
        for stream in process.sent if ends else ():
            await self.end(stream, container, exec_id)

    async def run_out_of_memory(self, container: str) -> None:
        """Say that processes of a container have been killed for memory."""
        await self._say({"event": "oom", "container": container})

    # --- what it answers

    async def do_setup(self, _params: Json) -> None: ...

    async def do_create(self, params: Json) -> Json:
        return self._new(params["container"], None, params["streams"])

    async def do_exec(self, params: Json) -> Json:
        self.process(params["container"])
        return self._new(params["container"], params["exec"], params["streams"])

    def _new(self, container: str, exec_id: str | None, tokens: Json) -> Json:
        self._last_pid += 1
        self.processes[container, exec_id] = GuestProcess(self._last_pid, tokens)
        return {"pid": self._last_pid}

    async def do_start(self, params: Json) -> None:
        self.process(params["container"])

    async def do_signal(self, params: Json) -> None:
        process = self.process(params["container"], params["exec"])
        if process.exited:
            raise Refused(messages.WRONG_STATE, "the process has exited")
        if params["signal"] in {9, 15}:
            await self.exit(128 + params["signal"], params["container"], params["exec"])

    async def do_release(self, params: Json) -> None:
        """Forget nothing: there is no cache."""

    async def do_delete(self, params: Json) -> None:
        for channel in self.process(params["container"], params.get("exec")).channels.values():
            channel.close()
        del self.processes[params["container"], params.get("exec")]

    async def do_pids(self, params: Json) -> Json:
        own = {exec_id: process for (name, exec_id), process in self.processes.items() if name == params["container"]}
        execs = {exec_id: process.pid for exec_id, process in own.items() if exec_id and not process.exited}
        return {"pids": [own[None].pid, *execs.values()], "init": own[None].pid, "execs": execs}

    async def do_stats(self, _params: Json) -> Json:
        return {"files": {"memory.current": "4096\n"}}

    async def do_pause(self, _params: Json) -> None: ...
    async def do_resume(self, _params: Json) -> None: ...
    async def do_resize(self, _params: Json) -> None: ...
    async def do_update(self, _params: Json) -> None: ...
    async def do_close_stdin(self, _params: Json) -> None: ...


class FakeVm:
    """Implements hypervisor.base.Vm."""

    pid = 0

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self.devices: list[Device] = []
        self._incoming: asyncio.Queue[Channel] = asyncio.Queue()
        self._exit: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<FakeVm {'ended' if self._exit.done() else 'running'}>"

    def dial(self) -> Channel:
        """Open a connection from the guest to the host; returns the guest's end."""
        guest, host = memory.pair()
        self._incoming.put_nowait(host)
        return guest

    def die(self, status: int = -9, *last_lines: str, process: str = "fake") -> None:
        """End, as when the VMM or one of its helpers is killed. Idempotent."""
        if not self._exit.done():
            self._exit.set_result(VmExit(process, status, last_lines))
            self.guest.stop()

    async def attach(self, device: Device) -> None:
        """Take note of `device`."""
        self.devices.append(device)

    async def console_says(self, text: str) -> None:
        """Return at once: the guest has said it."""

    async def save(self, state: Path) -> None:
        """Write a state that no VM needs."""
        state.write_bytes(b"a fake VM")

    async def accept(self) -> Channel:
        """Return the next connection of the guest. Raises SandboxDied."""
        taking = asyncio.ensure_future(self._incoming.get())
        try:
            await asyncio.wait((taking, self._exit), return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                return taking.result()
            raise SandboxDied(str(self._exit.result()))
        except asyncio.CancelledError:
            if taking.done():
                taking.result().close()
            raise
        finally:
            taking.cancel()

    async def wait(self) -> VmExit:
        """Return when it has died."""
        return await asyncio.shield(self._exit)

    def console(self) -> Sequence[str]:
        """Return what the guest wrote to its console."""
        return ["[    0.1] a fake kernel says hello"]

    def close(self) -> None:
        """End it and close what nobody has accepted."""
        self.die()
        while not self._incoming.empty():
            self._incoming.get_nowait().close()


class FakeHypervisor:
    """Implements hypervisor.base.Hypervisor.

    `origins` are those of the VMs that it was asked for, `vms` those that were taken over, `running` how many have not
    ended. `spoil(origin)` may raise in place of being woken.
    """

    def __init__(self, guest: FakeGuest | None = None) -> None:
        self.guest = guest or FakeGuest()
        self.spoil: Callable[[Origin], None] = lambda _origin: None
        self.origins: list[Origin] = []
        self.vms: list[FakeVm] = []
        self.running = 0

    def identity(self, spec: VmSpec) -> str:
        """Return what tells VMs of different shapes apart."""
        return repr(spec)

    def spawn(self, spec: VmSpec, origin: Origin, place: Place, *, vsock: bool) -> "SpawnedFake":
        """Take note of what is wanted."""
        del spec, place
        self.origins.append(origin)
        self.running += 1
        return SpawnedFake(self, origin, vsock=vsock)

    @asynccontextmanager
    async def take_over(self, spawned: "SpawnedFake") -> AsyncIterator[FakeVm]:
        """Yield a VM whose guest is the script: without a vsock it gets no farther than to be ready for one."""
        try:
            vm = FakeVm(self.guest)
            self.vms.append(vm)
            if spawned.vsock:
                self.guest.boot(vm.dial)
            try:
                yield vm
            finally:
                vm.close()
        finally:
            spawned.end()


class SpawnedFake:
    """A VMM that has been started; it counts as running until it is ended."""

    def __init__(self, hypervisor: FakeHypervisor, origin: Origin, *, vsock: bool) -> None:
        self.origin = origin
        self.vsock = vsock
        self._spoil = hypervisor.spoil
        self._hypervisor: FakeHypervisor | None = hypervisor

    def wake(self) -> None:
        """Raise what `spoil` raises."""
        self._spoil(self.origin)

    def end(self) -> None:
        """End it. Idempotent."""
        if self._hypervisor:
            self._hypervisor.running -= 1
            self._hypervisor = None
