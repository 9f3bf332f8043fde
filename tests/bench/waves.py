"""Many starts at once: how long each took, and which failed."""

import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Self

from tests.bench.cases import IMAGE, new_id
from tests.bench.figures import quantile
from tests.framework.containerd import Containerd

LIMIT = 120.0
"""Seconds until a `ctr` that has not ended counts as failed."""


@dataclass(frozen=True, slots=True)
class Wave:
    """Starts that began together: the seconds that each success took, and what each failure said."""

    size: int
    seconds: tuple[float, ...]
    failures: tuple[str, ...] = ()

    @property
    def p50(self) -> float | None:
        return quantile(self.seconds, 0.5) if self.seconds else None

    @property
    def p99(self) -> float | None:
        return quantile(self.seconds, 0.99) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """p99 over p50, of those that succeeded."""
        return self.p99 / self.p50 if self.p50 and self.p99 else None


def wave(containerd: Containerd, runtime: str, size: int) -> Wave:
    """Begin `size` times `ctr run --rm` of `true` together."""
    runs = [("run", "--rm", "--runtime", runtime, IMAGE, new_id(), "true") for _ in range(size)]
    seconds, failures = together(containerd, runs)
    return Wave(size, tuple(seconds), tuple(failures))


def together(containerd: Containerd, commands: Sequence[Sequence[str]]) -> tuple[list[float], list[str]]:
    """Run all these `ctr` commands at once; return how long each took in seconds, and what those that failed said."""
    seconds: list[float] = []
    failures: list[str] = []
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        begun = time.monotonic()
        for command in commands:
            process = stack.enter_context(_Client(containerd, command))
            selector.register(process.stderr, selectors.EVENT_READ, process)
        while selector.get_map():
            ready = selector.select(begun + LIMIT - time.monotonic())
            if not ready:
                return seconds, [*failures, *[f"not within {LIMIT:g} s"] * len(selector.get_map())]
            for key, _ in ready:
                process = key.data
                if process.goes_on():
                    continue
                selector.unregister(key.fileobj)
                if process.wait():
                    failures.append(process.said)
                else:
                    seconds.append(time.monotonic() - begun)
    return seconds, failures


class _Client:
    """One `ctr` that is killed when its context is left; its stderr, which nobody else holds, ends when it does."""

    def __init__(self, containerd: Containerd, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [containerd.bin / "ctr", *command],
            env={**os.environ, **containerd.client_environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        self.stderr: IO[bytes] = self._process.stderr
        self._said = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self.stderr.close()

    @property
    def said(self) -> str:
        return self._said.decode(errors="replace").strip()

    def goes_on(self) -> bool:
        """Take what it has written; tell whether there will be more."""
        data = os.read(self.stderr.fileno(), 1 << 16)
        self._said += data
        return bool(data)

    def wait(self) -> int:
        """Return its exit status."""
        return self._process.wait()
