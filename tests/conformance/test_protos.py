"""The messages in protos/ are, on the wire, those that containerd publishes; the generated code is current."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc  # type: ignore[import-untyped]  # it ships no types

ROOT = Path(__file__).resolve().parents[2]
WELL_KNOWN = files("grpc_tools") / "_proto"

OURS = {
    "pymicro/protos": ROOT / "protos",
    "pymicro/ttrpc": ROOT / "shim/pymicro/ttrpc",
}

# The Go modules that carry the official files, and which of their files say what ours say.
OFFICIAL = {
    "github.com/containerd/containerd/api@v1.12.0": [
        "events/task.proto",
        "runtime/bootstrap/v1/bootstrap.proto",
        "runtime/task/v2/shim.proto",
        "runtime/task/v3/shim.proto",
        "services/ttrpc/events/v1/events.proto",
        "types/event.proto",
        "types/introspection.proto",
        "types/mount.proto",
        "types/runc/options/oci.proto",
        "types/runtimeoptions/v1/api.proto",
        "types/task/task.proto",
    ],
    "github.com/containerd/cgroups/v3@v3.1.3/cgroup1": ["stats/metrics.proto"],
    "github.com/containerd/cgroups/v3@v3.1.3/cgroup2": ["stats/metrics.proto"],
    "github.com/containerd/ttrpc@v1.2.10": ["request.proto", "google/rpc/status.proto"],
}

# ttrpc's Response names this message of another repository (googleapis), which no Go module carries as a .proto file.
RPC_STATUS = """
syntax = "proto3";
package google.rpc;
import "google/protobuf/any.proto";
message Status { int32 code = 1; string message = 2; repeated google.protobuf.Any details = 3; }
"""

# Names that differ although the bytes do not.
RENAMED = {".pymicro.ttrpc.Status": ".google.rpc.Status", ".pymicro.ttrpc.": ".ttrpc."}
SHARED_BY_V2 = (".containerd.task.v3.", ".containerd.task.v2.")


@dataclass(frozen=True)
class Interface:
    """Everything that a set of .proto files declares, by full name."""

    messages: dict[str, DescriptorProto]
    enums: dict[str, EnumDescriptorProto]
    services: dict[str, ServiceDescriptorProto]


def interface(descriptors: list[FileDescriptorProto]) -> Interface:
    found = Interface({}, {}, {})
    for file in descriptors:
        if file.package == "google.protobuf":
            continue
        for message in file.message_type:
            add_message(found, f".{file.package}", message)
        found.enums.update({f".{file.package}.{enum.name}": enum for enum in file.enum_type})
        found.services.update({f".{file.package}.{service.name}": service for service in file.service})
    return found


def add_message(found: Interface, scope: str, message: DescriptorProto) -> None:
    name = f"{scope}.{message.name}"
    found.messages[name] = message
    for nested in message.nested_type:
        add_message(found, name, nested)


def compile_protos(tmp_path: Path, includes: list[str], names: list[str]) -> list[FileDescriptorProto]:
    out = tmp_path / "descriptors"
    arguments = ["protoc", *(f"-I{path}" for path in includes), f"-I{WELL_KNOWN}", f"--descriptor_set_out={out}"]
    assert protoc.main([*arguments, *names]) == 0
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Interface:
    includes = [f"{name}={directory}" for name, directory in OURS.items()]
    names = [f"{name}/{path.name}" for name, directory in OURS.items() for path in directory.glob("*.proto")]
    return interface(compile_protos(tmp_path_factory.mktemp("ours"), includes, names))


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Interface:
    descriptors = []
    for location, names in OFFICIAL.items():
        module, _, version = location.partition("@")
        version, _, inside = version.partition("/")
        work = tmp_path_factory.mktemp("official")
        (work / "google/rpc").mkdir(parents=True)
        (work / "google/rpc/status.proto").write_text(RPC_STATUS)
        descriptors += compile_protos(work, [str(go_module(f"{module}@{version}") / inside), str(work)], names)
    return interface(descriptors)


def go_module(module: str) -> Path:
    """Return the directory of a Go module, downloaded by the ordinary client if it is not there yet."""
    if shutil.which("go") is None:
        pytest.skip("the official .proto files come as Go modules, and there is no `go` on PATH")
    environment = os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"}
    command = ["go", "mod", "download", "-json", module]
    try:
        result = subprocess.run(command, cwd="/", env=environment, capture_output=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the Go proxy does not answer: {module} is not to be had")
    answer = json.loads(result.stdout) if result.stdout else {"Error": result.stderr.decode(errors="replace")}
    if "Dir" not in answer:
        pytest.skip(f"{module} is not to be had: {answer.get('Error')}")
    return Path(answer["Dir"])


def official_name(name: str) -> str:
    for prefix, replacement in RENAMED.items():
        if name.startswith(prefix):
            return name.replace(prefix, replacement, 1)
    return name


def field_facts(field: FieldDescriptorProto) -> tuple[object, ...]:
    """Return all that decides about a field's bytes, and the names by which JSON and readers know it."""
    return (field.name, field.number, field.type, field.label, official_name(field.type_name), field.proto3_optional)


def test_every_message_has_the_official_fields(ours: Interface, official: Interface) -> None:
    compared = 0
    for name, message in ours.messages.items():
        theirs = official.messages[official_name(name)]
        assert sorted(map(field_facts, message.field)) == sorted(map(field_facts, theirs.field)), name
        assert [o.name for o in message.oneof_decl] == [o.name for o in theirs.oneof_decl], name
        assert message.options.map_entry == theirs.options.map_entry, name
        compared += 1
    assert compared > 80


def test_every_enum_has_the_official_values(ours: Interface, official: Interface) -> None:
    assert ours.enums
    for name, enum in ours.enums.items():
        theirs = {value.name: value.number for value in official.enums[official_name(name)].value}
        assert {value.name: value.number for value in enum.value} == theirs, name


def test_every_service_has_the_official_methods(ours: Interface, official: Interface) -> None:
    def facts(service: ServiceDescriptorProto) -> list[tuple[object, ...]]:
        return sorted(
            (
                method.name,
                # Our v2 service borrows the messages of v3; that they are equal is the next test.
                method.input_type.replace(*SHARED_BY_V2),
                method.output_type.replace(*SHARED_BY_V2),
                method.client_streaming,
                method.server_streaming,
            )
            for method in service.method
        )

    assert len(ours.services) >= 3
    for name, service in ours.services.items():
        assert facts(service) == facts(official.services[name]), name


def test_the_messages_of_task_v2_and_v3_are_identical(official: Interface) -> None:
    v2, v3 = (
        {
            name.rpartition(".")[2]: [(f.name, f.number, f.type, f.label) for f in message.field]
            for name, message in official.messages.items()
            if name.startswith(f".containerd.task.{version}.")
        }
        for version in ("v2", "v3")
    )
    assert v2 == v3
    assert len(v3) > 25


def test_no_task_event_is_missing(ours: Interface, official: Interface) -> None:
    events = {name for name in official.messages if name.startswith(".containerd.events.Task")}
    assert events <= ours.messages.keys()


def test_the_generated_code_is_current() -> None:
    script = [sys.executable, str(ROOT / "protos/generate.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_edited_generated_module_is_noticed(tmp_path: Path) -> None:
    for name in ("protos", "shim/pymicro/ttrpc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    module = tmp_path / "protos/pymicro/protos/events_pb2.pyi"
    module.write_text(module.read_text().replace("class TaskExit(", "class TaskGone("))
    script = [sys.executable, str(tmp_path / "protos/generate.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "events_pb2.py is not current" in result.stderr


def test_any_type_urls_are_the_names_that_containerd_expects() -> None:
    from pymicro.protos import cgroups_v1_pb2, cgroups_v2_pb2, events_pb2, runc_pb2, runtimeoptions_pb2

    names = {
        events_pb2.TaskExit.DESCRIPTOR.full_name: "containerd.events.TaskExit",
        cgroups_v1_pb2.Metrics.DESCRIPTOR.full_name: "io.containerd.cgroups.v1.Metrics",
        cgroups_v2_pb2.Metrics.DESCRIPTOR.full_name: "io.containerd.cgroups.v2.Metrics",
        runc_pb2.Options.DESCRIPTOR.full_name: "containerd.runc.v1.Options",
        runc_pb2.ProcessDetails.DESCRIPTOR.full_name: "containerd.runc.v1.ProcessDetails",
        runtimeoptions_pb2.Options.DESCRIPTOR.full_name: "runtimeoptions.v1.Options",
    }
    assert list(names.keys()) == list(names.values())


def test_the_daemon_loads_few_generated_modules() -> None:
    """Each generated module costs the daemon start-up time: serving tasks and events takes these and no others."""
    code = "from pymicro.protos import task_pb2, forward_pb2, events_pb2; import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.rpartition(".")[2] for name in result.stdout.split() if name.startswith("pymicro.protos.")}
    assert loaded == {"task_pb2", "process_pb2", "types_pb2", "forward_pb2", "events_pb2"}
