"""How a VMM's process has ended, for plain code: nobody watches it yet."""

import time

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
