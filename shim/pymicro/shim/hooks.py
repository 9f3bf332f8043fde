"""The OCI hooks of the host: one program after the other gets the container's state as JSON on its stdin.

What hooks are, when they run and what their failure means is the runtime-spec's (config.md, "POSIX-platform Hooks",
and runtime.md, "Lifecycle"); where it leaves room, runc's way. `delete` and the guard, which take over from a daemon
that was killed, run them by plain code; `containerhooks` has the event loop do it.
"""

import json
import os
import select
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from pymicro.shim.errors import HookFailed, InvalidRequest, ShimError, StepTimeout
from pymicro.shim.hostprogram import Running, launch

Json = dict[str, Any]
"""A JSON object of a spec or of our own record: its values are checked where they are decoded."""

_KEPT = 2000
"""Bytes of a hook's output that its error shows, the last ones."""
_READ_SIZE = 64 * 1024
_LONGEST_POLL = 3600.0
"""Seconds; poll(2) takes no more than 24 days at once."""


class Hook(Struct, frozen=True, omit_defaults=True):
    """One hook. `timeout` is in seconds; without one the setting `timeouts.hook` holds."""

    path: Annotated[str, Meta(pattern="^/")]
    args: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None


def parse(kind: str, hooks: Sequence[Json]) -> tuple[Hook, ...]:
    """Return the spec's hooks of the kind `kind`. Raises InvalidRequest that names the one that is wrong."""
    parsed = []
    for number, hook in enumerate(hooks):
        try:
            parsed.append(msgspec.convert(hook, Hook))
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"the spec's {kind} hook #{number} is wrong: {error}") from error
    return tuple(parsed)


def state(spec: Mapping[str, Any], container_id: str, bundle: str, status: str, pid: int = 0) -> Json:
    """Return the state that a hook gets; `pid` is the task's, 0 for a container that has none any more."""
    known = {"ociVersion": spec.get("ociVersion"), "id": container_id, "status": status}
    process = {"pid": pid} if pid else {}
    return {**known, **process, "bundle": bundle, "annotations": spec.get("annotations") or {}}


class Call(Struct, frozen=True):
    """Which hook of its kind it is; `limit` is in seconds, for one without a time-out."""

    kind: str
    number: int
    limit: float


class Attempt:
    """A hook that runs, and the end of what it has said."""

    def __init__(self, called: Call, hook: Hook, state: Json, namespace: str = "") -> None:
        """Launch it, in the mount namespace `namespace`, "" for ours. Raises HookFailed."""
        self._name = f"error running {called.kind} hook #{called.number} ({hook.path})"
        self.limit = hook.timeout or called.limit
        self._whose = "its timeout" if hook.timeout else "timeouts.hook"
        self._said = b""
        self._timed_out = False
        self.output, write = os.pipe2(os.O_CLOEXEC)
        stdin = _memory(json.dumps(state).encode())
        try:
            self.running: Running = launch(
                hook.args or (hook.path,),
                # what has no "=" is no variable for anybody
                dict(entry.split("=", 1) for entry in hook.env or () if "=" in entry),
                (stdin, write, write),
                program=hook.path,
                directory=str(state.get("bundle") or "/"),
                namespace=namespace,
                dies_with_us=True,
            )
        except OSError as error:
            os.close(self.output)
            raise HookFailed(f"{self._name}: {error}") from error
        finally:
            os.close(stdin)
            os.close(write)
        os.set_blocking(self.output, False)

    def read(self) -> bool:
        """Take what it has said meanwhile; False when nothing more can come."""
        try:
            data = os.read(self.output, _READ_SIZE)
        except BlockingIOError:
            return True
        self._said = (self._said + data)[-_KEPT:]
        return bool(data)

    def end(self) -> None:
        """Reap it. One that has not ended, or has ended badly, is killed with all that it has started.

        What a hook has started that went well may live on, and hold its stdout: it may be somebody's daemon.
        """
        status = self.running.peek()
        self._timed_out = status is None
        if status == 0:
            self.running.reap()
        else:
            self.running.end()
        self.read()
        os.close(self.output)

    def wait(self) -> None:
        """Return when it has ended, or its time is over."""
        poller = select.poll()
        poller.register(self.running.pidfd, select.POLLIN)
        poller.register(self.output, select.POLLIN)
        deadline = time.monotonic() + self.limit
        while self.running.peek() is None and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poller.poll(min(left, _LONGEST_POLL) * 1000):
                if fd == self.output and not self.read():
                    poller.unregister(fd)

    def check(self) -> None:
        """Raise StepTimeout or HookFailed unless it went well."""
        text = "".join(c if c.isprintable() else " " for c in self._said.decode(errors="replace"))
        said = " ".join(text.split()) or "nothing"
        if self._timed_out:
            limit = f"{self.limit:g} s ({self._whose})"
            raise StepTimeout(f"{self._name}: it did not end in {limit} and was killed; it said: {said}")
        if status := self.running.status:
            how = f"exit status {status}" if status > 0 else f"signal {-status}"
            raise HookFailed(f"{self._name}: {how}; it said: {said}")


def _memory(content: bytes) -> int:
    """Return a descriptor to read `content` from: whoever does not read it holds nobody up, as it would with a pipe."""
    fd = os.memfd_create("pymicro-hook-state", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


class Owed(Struct, frozen=True):
    """The poststop hooks that a container is owed, as state.json has them: whoever frees its sandbox runs them."""

    hooks: tuple[Hook, ...]
    state: Json
    limit: float

    def run_plainly(self) -> list[str]:
        """Run them, in the mount namespace that we are in. Return what went wrong: none keeps the next from running."""
        problems = []
        for number, hook in enumerate(self.hooks):
            try:
                attempt = Attempt(Call("poststop", number, self.limit), hook, self.state)
                try:
                    attempt.wait()
                finally:
                    attempt.end()
                attempt.check()
            except ShimError as error:
                problems.append(f"{self.state.get('id')}: {error}")
        return problems


def run_owed(recorded: object) -> list[str]:
    """Run what the value `recorded` of state.json says; return what went wrong. Nonsense in it is said and left out."""
    try:
        owed = msgspec.convert(recorded, Owed)
    except msgspec.ValidationError as error:
        return [f"the record of poststop hooks makes no sense, they do not run: {error}"]
    return owed.run_plainly()
