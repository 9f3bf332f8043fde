"""What the shims say in containerd's log: which starts were cold, and what they warn of."""

import json
import re
from collections.abc import Iterable
from typing import Any

from tests.framework.containerd import Containerd

_LINE = re.compile(r'level=(\w+) runtime=pymicro msg=(".*"|\{.*\})$')
_EXPECTED = "KVM is not usable"
"""Every start on a host without KVM says so; it is no finding of a test."""


class ShimLog:
    """The shims' lines from now on."""

    def __init__(self, containerd: Containerd) -> None:
        self._log = containerd.log
        self._begin = self._log.stat().st_size

    def warnings(self) -> list[str]:
        """Return what has been said at level warning or above, oldest first."""
        said = [text for level, text in self._lines() if level in {"warning", "error", "critical"}]
        return [str(json.loads(text)) for text in said if _EXPECTED not in text]

    def cold(self, container_ids: Iterable[str]) -> list[str]:
        """Return which of these containers' VMs have booted a kernel: the phases of their starts say so.

        Raises KeyError for a container whose start has not been logged.
        """
        starts = self._starts()
        return [each for each in container_ids if "guest_kernel" in starts[each]["phases_ms"]]

    def _starts(self) -> dict[str, dict[str, Any]]:  # JSON, docs/performance.md says of what
        lines = [json.loads(text) for _, text in self._lines() if text.startswith('{"pymicro": "start"')]
        return {line["container"]: line for line in lines}

    def _lines(self) -> list[tuple[str, str]]:
        with self._log.open(errors="replace") as file:
            file.seek(self._begin)
            return [found.groups() for line in file if (found := _LINE.search(line))]  # type: ignore[misc]  # two groups
