"""Containers from specs of the tests' own, for what `ctr` has no option for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.framework import busybox
from tests.framework.ctr import Ctr

Spec = dict[str, Any]  # JSON of the runtime-spec


def run_arguments(
    ctr: Ctr,
    directory: Path,
    *command: str,
    change: Callable[[Spec], None],
    options: tuple[str, ...] = ("--rm",),
    runtime: str = "",
) -> list[str]:
    """Return what `ctr` is to be called with to run `command` in a new container; `change` is applied to its spec.

    `directory` keeps its root filesystem, a busybox, and its spec; containers may share it.
    """
    root = directory / "root"
    if not root.exists():
        busybox.write_root(root)
    container_id = ctr.new_id()
    spec = json.loads(ctr("oci", "spec").stdout)
    spec["root"] = {"path": str(root)}
    spec["process"] |= {"args": list(command), "env": ["PATH=/bin"], "terminal": False}
    spec["linux"]["cgroupsPath"] = f"/{ctr.containerd.namespace}/{container_id}"
    change(spec)
    file = directory / f"{container_id}.json"
    file.write_text(json.dumps(spec))
    return ["run", *options, "--runtime", runtime or ctr.runtime, "--config", str(file), container_id]
