"""Every request that Cloud Hypervisor is sent fits its published API description, without the program.

SCHEMAS holds what our requests use of the description. With CLOUD_HYPERVISOR_API=<file> it is compared with the
description itself: vmm/src/api/openapi/cloud-hypervisor.yaml in Cloud Hypervisor's sources.
"""

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pymicro.shim.channel.hybrid import GUEST_CID
from pymicro.shim.hypervisor.base import Share, VmSpec
from pymicro.shim.hypervisor.cloud_hypervisor import api, requests
from pymicro.shim.hypervisor.cloud_hypervisor.requests import Json, Request

DESCRIPTION = "CLOUD_HYPERVISOR_API"

PATHS = {
    "vmm.ping": ("get", None),
    "vm.create": ("put", "VmConfig"),
    "vm.boot": ("put", None),
    "vm.pause": ("put", None),
    "vm.resume": ("put", None),
    "vm.restore": ("put", "RestoreConfig"),
    "vm.snapshot": ("put", "VmSnapshotConfig"),
    "vm.add-vsock": ("put", "VsockConfig"),
    "vm.add-fs": ("put", "FsConfig"),
}
"""Method and body of each request."""

# A field is a type of JSON, the name of a schema, or [what a list holds]. "!" marks those that must be there.
SCHEMAS: dict[str, dict[str, str | list[str]]] = {
    "VmConfig": {
        "payload!": "PayloadConfig",
        "cpus": "CpusConfig",
        "memory": "MemoryConfig",
        "disks": ["DiskConfig"],
        "rng": "RngConfig",
        "serial": "SerialConfig",
        "console": "ConsoleConfig",
        "landlock_enable": "boolean",
        "landlock_rules": ["LandlockConfig"],
    },
    "PayloadConfig": {"kernel": "string", "cmdline": "string"},
    "CpusConfig": {"boot_vcpus!": "integer", "max_vcpus!": "integer", "nested": "boolean"},
    "MemoryConfig": {"size!": "integer", "shared": "boolean", "thp": "boolean"},
    "DiskConfig": {"path": "string", "readonly": "boolean", "image_type": "ImageType", "sparse": "boolean"},
    "RngConfig": {"src!": "string"},
    "SerialConfig": {"mode!": "ConsoleMode"},
    "ConsoleConfig": {"mode!": "ConsoleMode"},
    "LandlockConfig": {"path!": "string", "access!": "string"},
    "RestoreConfig": {"source_url!": "string"},
    "VmSnapshotConfig": {"destination_url": "string"},
    "VsockConfig": {"cid!": "integer", "socket!": "string"},
    "FsConfig": {"tag!": "string", "socket!": "string", "num_queues!": "integer", "queue_size!": "integer"},
}
ENUMS = {"ImageType": ["Raw"], "ConsoleMode": ["Tty", "Off"]}
"""The values that we use."""
JSON = {"string": str, "integer": int, "boolean": bool}

SPEC = VmSpec("/usr/bin/cloud-hypervisor", Path("/k/vmlinux"), Path("/i/image.erofs"), 2, 512, "kvm")
SENT = {
    "PING": requests.PING,
    "BOOT": requests.BOOT,
    "PAUSE": requests.PAUSE,
    "RESUME": requests.RESUME,
    "create": requests.create(SPEC, [Path("/run/x/vmm")]),
    "create, without Landlock": requests.create(SPEC, None),
    "restore": requests.restore(Path("/run/x/restore")),
    "snapshot": requests.snapshot(Path("/dev/shm/t/snapshot")),
    "add_vsock": requests.add_vsock(Path("/run/x/vmm/vsock")),
    "add_share": requests.add_share(Share("share", Path("/run/x/fs.sock"))),
}
"""Every request that there is, by what makes it."""


def misfits(value: object, kind: str | list[str], where: str) -> list[str]:
    """Return in what `value` is not what the description calls `kind`."""
    if isinstance(kind, list):
        assert isinstance(value, list), f"{where} is no list"
        return [found for item in value for found in misfits(item, kind[0], where)]
    if kind in JSON:
        return [] if type(value) is JSON[kind] else [f"{where} = {value!r} is no {kind}"]
    if kind in ENUMS:
        return [] if value in ENUMS[kind] else [f"{where} = {value!r} is none of {ENUMS[kind]}"]
    assert isinstance(value, dict), f"{where} is no object"
    fields = {name.rstrip("!"): field for name, field in SCHEMAS[kind].items()}
    required = {name[:-1] for name in SCHEMAS[kind] if name.endswith("!")}
    return [
        *(f"{where} lacks {name}" for name in required - value.keys()),
        *(f"{where}.{name} is unknown" for name in value.keys() - fields.keys()),
        *(found for name in value.keys() & fields for found in misfits(value[name], fields[name], f"{where}.{name}")),
    ]


@pytest.mark.parametrize("request_", SENT.values(), ids=list(SENT))
def test_request_fits_the_description(request_: Request) -> None:
    name, body = request_
    method, schema = PATHS[name]
    assert api.encode(request_).startswith(f"{method.upper()} /api/v1/{name} HTTP/1.1\r\n".encode())
    assert (body is None) == (schema is None)
    if schema:
        assert misfits(body, schema, name) == []


def test_no_request_is_left_out() -> None:
    made = {name for name, value in vars(requests).items() if inspect.isfunction(value) and _makes_a_request(value)}
    constants = {name for name, value in vars(requests).items() if isinstance(value, tuple) and name.isupper()}
    assert made | constants == {name.partition(",")[0] for name in SENT}
    assert {name for name, _ in SENT.values()} == PATHS.keys()


def _makes_a_request(function: Any) -> bool:  # whatever a module holds
    return bool(function.__module__ == requests.__name__ and function.__annotations__.get("return") == Request)


def test_a_wrong_request_is_found() -> None:
    wrong: Json = {"payload": {"kernel": 1, "cmd": ""}, "cpus": {"boot_vcpus": True}, "serial": {"mode": "Pipe"}}
    assert sorted(misfits(wrong, "VmConfig", "vm")) == [
        "vm.cpus lacks max_vcpus",
        "vm.cpus.boot_vcpus = True is no integer",
        "vm.payload.cmd is unknown",
        "vm.payload.kernel = 1 is no string",
        "vm.serial.mode = 'Pipe' is none of ['Tty', 'Off']",
    ]


def test_the_table_is_what_cloud_hypervisor_publishes() -> None:
    if not (path := os.environ.get(DESCRIPTION)):
        pytest.skip(f"{DESCRIPTION} names no API description: the requests were compared with this file's table alone")
    document = yaml.safe_load(Path(path).read_text())
    schemas = document["components"]["schemas"]
    differences = [found for name, expected in PATHS.items() for found in _path_differs(document, name, expected)]
    differences += [found for name in SCHEMAS for found in _schema_differs(schemas[name], name)]
    differences += [
        f"{kind} has no {value}" for kind in ENUMS for value in ENUMS[kind] if value not in schemas[kind]["enum"]
    ]
    assert differences == []
    assert schemas["VsockConfig"]["properties"]["cid"]["minimum"] <= GUEST_CID


def _path_differs(document: Json, name: str, expected: tuple[str, str | None]) -> list[str]:
    operations = document["paths"].get(f"/{name}", {})
    method, schema = expected
    body = operations.get(method, {}).get("requestBody")
    found = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2] if body else None
    return [] if method in operations and found == schema else [f"{name}: {sorted(operations)} {found}"]


def _schema_differs(published: Json, schema: str) -> list[str]:
    ours = {name.rstrip("!"): field for name, field in SCHEMAS[schema].items()}
    properties = published["properties"]
    required = {name[:-1] for name in SCHEMAS[schema] if name.endswith("!")}
    missing = [f"{schema}.{name} must be there" for name in published.get("required", ()) if name not in required]
    other = [name for name, field in ours.items() if name not in properties or _kind(properties[name]) != field]
    return missing + [f"{schema}.{name}: {properties.get(name)}" for name in other]


def _kind(published: Json) -> str | list[str]:
    if published.get("type") == "array":
        kind = _kind(published["items"])
        assert isinstance(kind, str)
        return [kind]
    return str(published.get("type") or published["$ref"].rpartition("/")[2])
