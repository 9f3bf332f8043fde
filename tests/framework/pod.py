"""Containers that share one VM, for tests in which isolation is not the point: starting one takes no boot."""

from collections.abc import Sequence

from tests.framework.busybox import NAME as BUSYBOX
from tests.framework.containerd import Containerd
from tests.framework.ctr import PYMICRO, RUNC, Container, Ctr
from tests.framework.leftovers import Leftovers

GROUP = "io.containerd.runc.v2.group"


class Pod(Ctr):
    """A client whose containers all join the VM of a first one, which sleeps. Containers of runc stay by themselves."""

    def __init__(self, containerd: Containerd, runtime: str = PYMICRO) -> None:
        super().__init__(containerd, runtime)
        self._nothing = Leftovers(containerd, self.ids)
        self.id = self.new_id("pod")
        self("run", "--detach", "--null-io", "--runtime", runtime, BUSYBOX, self.id, "sleep", "100000")

    @property
    def first(self) -> Container:
        """The container whose end would be the VM's."""
        return Container(self, self.id)

    def end_containers(self) -> None:
        """End what a test has started, but not the VM."""
        self.end_clients()
        for task in set(self("tasks", "ls", "-q").stdout.split()) - {self.id}:
            self("tasks", "rm", "--force", task, check=False)
        for container in set(self("containers", "ls", "-q").stdout.split()) - {self.id}:
            self("containers", "rm", container, check=False)

    def end(self) -> None:
        """End the VM too, and prove that nothing is left."""
        self.clean_up()
        self._nothing.check()

    def run_arguments(
        self, command: Sequence[str], options: Sequence[str], runtime: str | None, container_id: str | None
    ) -> list[str]:
        if (runtime or self.runtime) != RUNC:
            options = ["--annotation", f"{GROUP}={self.id}", *options]
        return super().run_arguments(command, options, runtime, container_id)


class SharedPod:
    """The pod that tests take turns with, started when the first one asks for it."""

    def __init__(self) -> None:
        self._pod: Pod | None = None

    def take(self, containerd: Containerd, runtime: str) -> Pod:
        """Return a pod that runs; a test may have ended the one before."""
        if self._pod and self._pod.first.status != "RUNNING":
            self.end()
        if not self._pod:
            self._pod = Pod(containerd, runtime)
        return self._pod

    def end(self) -> None:
        """End the pod, if there is one, and prove that nothing is left of it."""
        pod, self._pod = self._pod, None
        if pod:
            pod.end()
