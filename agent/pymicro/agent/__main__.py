"""PID 1 of the guest: prepare the VM, dial the host, serve it until it hangs up."""

import time

BOOT_MS = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000  # before the imports: they are what it measures

from pymicro.agent import boot, control, vsock  # noqa: E402
from pymicro.agent.concurrency import log, spare  # noqa: E402
from pymicro.agent.devices import Ports  # noqa: E402
from pymicro.agent.errors import summary  # noqa: E402
from pymicro.agent.handlers import Agent  # noqa: E402
from pymicro.agent.reaper import Reaper  # noqa: E402


def main() -> None:
    """Run the agent. It returns when the host hangs up: then PID 1 ends, the kernel panics and the VM goes down."""
    try:
        boot.prepare()
        spare.start()
        reaper = Reaper()
        reaper.start()
        # A VM is snapshotted while it waits in here: nothing of one pod may be known before.
        ports = Ports()
        connection = control.Control(*vsock.dial_when_there(ports, lambda: boot.warm_up(reaper, ports)))
        connection.say_hello(BOOT_MS)
        connection.serve(Agent(connection, reaper, ports))
        log("the host hung up")
    except Exception as error:  # noqa: BLE001  # the last place that can say why
        log(f"the agent ends: {summary(error)}")


if __name__ == "__main__":
    main()
