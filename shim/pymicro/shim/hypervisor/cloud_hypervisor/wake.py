"""Waking a Cloud Hypervisor VM: from the process that has just been started to the guest that runs, in plain code."""

from pathlib import Path
from typing import Any

from pymicro.shim.errors import HostMissing, SandboxDied
from pymicro.shim.hypervisor.cloud_hypervisor import requests
from pymicro.shim.hypervisor.cloud_hypervisor.api import Api, Refused
from pymicro.shim.hypervisor.ending import step
from pymicro.shim.spawn import Child

OLDEST = (52,)
"""The first that leaves out of a saved VM the pages that its guest never touched."""


class Waking:
    """Brings one VM up, whose `first` request has been sent. `timeout` (seconds) bounds each step.

    Every method raises SandboxDied, StepTimeout, and HostMissing for a program that could not be started.
    """

    def __init__(self, child: Child, api: Api, binary: str, first: requests.Request, timeout: float) -> None:
        self._child = child
        self._api = api
        self._binary = binary
        self._first = first
        self._timeout = timeout

    def run(self, vsock: Path | None) -> None:
        """Wait until the VM is made, plug its vsock in, and let the guest run. Raises HostMissing for a Cloud
        Hypervisor that is too old.
        """
        try:
            self._step(self._first, sent=True)
        except SandboxDied:
            if not self._child.ended:
                self._demand_version()  # that may be why
            raise
        self._demand_version()
        if vsock:
            self._step(requests.add_vsock(vsock))
        self._step(requests.RESUME if self._first[0] == "vm.restore" else requests.BOOT)

    def _demand_version(self) -> None:
        answer = self._step(requests.PING)
        text = str(answer.get("version")) if isinstance(answer, dict) else ""
        if version(text) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise HostMissing(
                f"{self._binary} (paths.cloud_hypervisor) is version {text or 'unknown'}; {oldest} or newer is needed"
            )

    def _step(self, request: requests.Request, *, sent: bool = False) -> Any:
        """Return the answer to `request`, JSON of any kind; whatever goes wrong names it."""
        name = request[0]
        try:
            with step("Cloud Hypervisor", self._child, name, self._timeout):
                return self._api.answer(request) if sent else self._api.call(request)
        except Refused as error:
            raise SandboxDied(f"Cloud Hypervisor refused {name}: {error}") from error


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version such as "v53.0.0" or "53.0-12-gabcdef"."""
    numbers = text.removeprefix("v").partition("-")[0].split(".")
    return tuple(int(number) for number in numbers if number.isdigit())
