"""The settings file of a private containerd: it names the kernel, the guest image and the tools of this checkout."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.framework.debian import ToolError
from tests.framework.tools import tool

REPOSITORY = Path(__file__).resolve().parents[2]

# The variable that names a file to use instead, the builder, and the file in the directory that the builder prints.
KERNEL = ("PYMICRO_KERNEL", "kernel-config/build.py", "vmlinux")
IMAGE = ("PYMICRO_IMAGE", "rootfs-builder/build.py", "image.erofs")

CLOUD_HYPERVISOR = "CLOUD_HYPERVISOR"
"""The variable that names Cloud Hypervisor's program, where PATH does not have it: Debian does not either."""


@functools.cache
def artefact(variable: str, builder: str, name: str) -> Path:
    """Return the path of the kernel or image, built first if the cache lacks it. Raises ToolError."""
    if chosen := os.environ.get(variable):
        return Path(chosen).resolve()
    argv = ["/usr/bin/python3", str(REPOSITORY / builder), "--print-path"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ToolError(f"{builder} failed with exit code {done.returncode}; its output is above")
    return Path(done.stdout.splitlines()[-1]) / name


def dev_paths() -> dict[str, str]:
    """Return the `[paths]` of a development settings file. Raises ToolError."""
    found = {
        "kernel": str(artefact(*KERNEL)),
        "image": str(artefact(*IMAGE)),
        "vhost_device_vsock": str(tool("vhost-device-vsock") / "vhost-device-vsock"),
    }
    if chosen := os.environ.get(CLOUD_HYPERVISOR):
        found["cloud_hypervisor"] = str(Path(chosen).resolve())
    return found


def write_settings(file: Path, **extra: dict[str, object]) -> None:
    """Write a settings file with the paths of this checkout; `extra` adds or extends tables: `timeouts={"boot": 5}`."""
    tables: dict[str, dict[str, object]] = {"paths": dict(dev_paths())}
    for name, values in extra.items():
        tables.setdefault(name, {}).update(values)
    lines = [line for name, values in tables.items() for line in (f"[{name}]", *_assignments(values), "")]
    file.write_text("\n".join(lines))


def _assignments(values: dict[str, object]) -> list[str]:
    """TOML's strings, numbers, booleans and arrays of them are written as in JSON."""
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


def main() -> int:
    """Print the kernel, the image and the directory of each tool, for `make install`; build what is missing."""
    try:
        for path in (artefact(*KERNEL), artefact(*IMAGE), tool("vhost-device-vsock").parent):
            print(path)
    except ToolError as error:
        print(f"settings: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
