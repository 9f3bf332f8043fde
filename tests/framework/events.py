"""containerd's event stream, as `ctr events` shows it, read while it comes."""

import json
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.framework.containerd import Containerd
from tests.framework.waiting import until

_LINE = re.compile(r" (/\S+) (\{.*\})$")
_MARK = "pymicro-test-mark"


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its topic, and its message's fields as JSON has them, without those that are zero."""

    topic: str
    content: dict[str, Any]

    @property
    def container(self) -> str:
        return str(self.content.get("container_id", ""))

    @property
    def process(self) -> str:
        """The id of the process that it is about: the exec's, or the container's for the first process."""
        return str(self.content.get("exec_id") or self.content.get("id") or self.container)

    @property
    def kind(self) -> str:
        """The topic's last word: `exec-added`, `start`, `exit`, ..."""
        return self.topic.rpartition("/")[2]

    def __str__(self) -> str:
        """What it says in two words, `exit e1`, and the status of an exit: `exit e1 7`."""
        status = f" {self.content.get('exit_status', 0)}" if self.kind == "exit" else ""
        return f"{self.kind} {self.process}{status}"


class EventStream:
    """What one subscriber has heard so far."""

    def __init__(self, containerd: Containerd, output: Path) -> None:
        self._containerd = containerd
        self._output = output
        self._said: str | None = None

    def end(self) -> None:
        """Keep what has been heard: the output is about to go."""
        self._said = self._output.read_text()

    @property
    def all(self) -> list[Event]:
        """All events, in the order in which they came."""
        said = self._output.read_text() if self._said is None else self._said
        whole = said.rpartition("\n")[0]
        found = (_LINE.search(line) for line in whole.splitlines())
        return [Event(line[1], json.loads(line[2])) for line in found if line]

    def of(self, container_id: str) -> list[Event]:
        """Return the task events of one container."""
        return [event for event in self.all if event.container == container_id and event.topic.startswith("/tasks/")]

    def told(self, container_id: str) -> list[str]:
        """Return the task events of one container, each in two or three words."""
        return [str(event) for event in self.of(container_id)]

    def until(self, holds: "Callable[[EventStream], bool]") -> None:
        """Wait until what has been heard makes `holds` true. Raises AssertionError."""
        until(lambda: holds(self))

    def until_told(self, container_id: str, what: str) -> None:
        """Wait for a container's event, `delete c1`. Raises AssertionError."""
        until(lambda: what in self.told(container_id))

    def synchronise(self) -> None:
        """Return when everything that containerd has published until now has been heard, which takes a subscriber."""
        marks: list[str] = []

        def heard() -> bool:
            marks.append(secrets.token_hex(4))
            self._containerd.ctr("namespaces", "label", self._containerd.namespace, f"{_MARK}={marks[-1]}")
            return any(event.content.get("labels", {}).get(_MARK) in marks for event in self.all)

        until(heard)


@contextmanager
def listening(containerd: Containerd) -> Iterator[EventStream]:
    """Yield what `ctr events` shows from now on; it goes on saying what it has heard after the block."""
    with tempfile.TemporaryDirectory(prefix="events-") as directory:
        output = Path(directory) / "events"
        with output.open("wb") as file:
            listener = subprocess.Popen(
                [containerd.bin / "ctr", "events"],
                env={**os.environ, **containerd.client_environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
            )
        stream = EventStream(containerd, output)
        try:
            stream.synchronise()
            yield stream
        finally:
            listener.kill()
            listener.wait()
            stream.end()
