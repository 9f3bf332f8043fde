"""How a VMM's process has ended, for plain code: nobody watches it yet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pymicro.shim.errors import SandboxDied, StepTimeout
from pymicro.shim.hypervisor.base import VmExit
from pymicro.shim.spawn import Child

_POLL = 0.002


def ended(child: Child, patience: float = 0) -> VmExit | None:
    """Return how `child` has ended, None if it has not after `patience` seconds. Raises HostMissing if it could not
    even be started.
    """
    deadline = time.monotonic() + patience
    while not child.ended:
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL)
    child.check()
    return VmExit(child.name, child.wait(), child.last_words())


@contextmanager
def step(vmm: str, child: Child, what: str, timeout: float) -> Iterator[None]:
    """Say of whatever goes wrong with the step `what` that it did, and how `vmm` has ended: SandboxDied, StepTimeout,
    HostMissing for a program that could not be started.
    """
    try:
        yield
    except TimeoutError as error:
        raise StepTimeout(
            f"{vmm} did not answer {what} in {timeout:g} s (timeouts.vmm); its last lines: {child.last_words()}"
        ) from error
    except (EOFError, OSError, ValueError) as error:
        child.check()
        raise SandboxDied(f"{ended(child, timeout) or f'{vmm} hangs'} (at {what})") from error
