"""PID 1 of the guest: prepare the VM, dial the host, serve it until it hangs up."""

from pymicro.agent import boot, control
from pymicro.agent.concurrency import log
from pymicro.agent.errors import summary
from pymicro.agent.handlers import Agent
from pymicro.agent.reaper import Reaper
from pymicro.agent.uevents import Uevents


def main() -> None:
    """Run the agent. It returns when the host hangs up: then PID 1 ends, the kernel panics and the VM goes down."""
    boot_ms = control.uptime_ms()
    try:
        boot.prepare()
        uevents = Uevents()
        reaper = Reaper()
        reaper.start()
        # A VM is snapshotted while it waits in here: nothing of one pod may be known before.
        connection = control.Control(control.dial_when_there(uevents))
        connection.say_hello(boot_ms)
        connection.serve(Agent(connection, reaper, uevents))
        log("the host hung up")
    except Exception as error:  # noqa: BLE001  # the last place that can say why
        log(f"the agent ends: {summary(error)}")


if __name__ == "__main__":
    main()
