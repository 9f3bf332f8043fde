"""Settings: defaults, the TOML file, a pod's `io.pymicro.*` annotations, and the VM size that follows from them.

Every key has a default here and a paragraph in docs/configuration.md. Read while the VM's start waits: only os and
msgspec are imported, what a mistake needs (difflib, type descriptions) when there is one.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from pymicro.shim import settings_file
from pymicro.shim.errors import InvalidRequest, InvalidSettings

PREFIX = "io.pymicro."
MIN_MEMORY_MIB = 96
GUEST_OVERHEAD_MIB = 128
"""What a VM gets beyond its containers' memory limit: kernel, agent and page cache of the guest itself."""
MEMORY_STEP_MIB = 64
"""VM memory that follows from a limit is rounded up to a multiple of this, so that similar pods have the same size."""
DEFAULT_CPU_PERIOD = 100_000
"""Microseconds; what the kernel takes where a CPU quota comes without a period."""

# The descriptions complete the sentence "allowed is ..." of an error message.
Memory = Annotated[int, Meta(ge=MIN_MEMORY_MIB, description=f"a whole number of at least {MIN_MEMORY_MIB} (MiB)")]
Count = Annotated[int, Meta(ge=1, description="a whole number of at least 1")]
Mebibytes = Annotated[int, Meta(ge=1, description="a whole number of at least 1 (MiB)")]
Switch = Annotated[bool, Meta(description="true or false")]
CountOrZero = Annotated[int, Meta(ge=0, description="a whole number, 0 for as many as the host has")]
Seconds = Annotated[float, Meta(gt=0, le=86400, description="a number of seconds above 0, at most 86400")]
AbsolutePath = Annotated[str, Meta(pattern="^/", description="an absolute path")]
OptionalPath = Annotated[str, Meta(pattern="^(/.*)?$", description='an absolute path, or "" to look for it')]
Program = Annotated[str, Meta(min_length=1, description="an absolute path, or a name to look up on PATH")]
HypervisorName = Annotated[Literal["qemu", "cloud-hypervisor"], Meta(description='"qemu" or "cloud-hypervisor"')]
Accel = Annotated[Literal["auto", "kvm", "tcg"], Meta(description='"auto", "kvm" or "tcg"')]
StartMode = Annotated[Literal["snapshot", "boot"], Meta(description='"snapshot" or "boot"')]
HostPid = Annotated[Literal["refuse", "guest"], Meta(description='"refuse" or "guest"')]
Level = Annotated[
    Literal["debug", "info", "warning", "error"], Meta(description='"debug", "info", "warning" or "error"')
]
Protocol = Annotated[Literal["ttrpc", "grpc"], Meta(description='"ttrpc" or "grpc"')]
Names = Annotated[tuple[str, ...], Meta(description="a list of strings")]


class Vm(Struct, frozen=True):
    """`[vm]`: the machine that a pod gets when nothing asks for more. Memory in MiB."""

    hypervisor: HypervisorName = "qemu"
    accel: Accel = "auto"
    vcpus: Count = 1
    memory_mib: Memory = 256
    max_vcpus: CountOrZero = 0
    start: StartMode = "snapshot"
    host_pid: HostPid = "refuse"


class Paths(Struct, frozen=True):
    """`[paths]`: files and programs of the host. "" means: look in the usual places."""

    kernel: AbsolutePath = "/opt/pymicro/share/vmlinux"
    image: AbsolutePath = "/opt/pymicro/share/image.erofs"
    qemu: Program = "qemu-system-x86_64"
    cloud_hypervisor: Program = "cloud-hypervisor"
    virtiofsd: OptionalPath = ""
    vhost_device_vsock: OptionalPath = ""


class Timeouts(Struct, frozen=True):
    """`[timeouts]`: limits of the external steps, in seconds."""

    vmm: Seconds = 10.0
    hello: Seconds = 60.0
    request: Seconds = 30.0
    drain: Seconds = 2.0
    hook: Seconds = 20.0
    unused: Seconds = 60.0


class Templates(Struct, frozen=True):
    """`[templates]`: where saved VMs are kept, on tmpfs, how many and how large, and whether starts wait for one."""

    directory: AbsolutePath = "/dev/shm/pymicro-templates"  # noqa: S108  # created for root alone
    most: Count = 8
    most_mib: Mebibytes = 512
    wait: Switch = True


class Annotations(Struct, frozen=True):
    """`[annotations]`: which `io.pymicro.*` annotations a pod may use."""

    allow: Names = ("io.pymicro.vcpus", "io.pymicro.memory_mib", "io.pymicro.start")


class Shim(Struct, frozen=True):
    """`[shim]`: how the shim talks with containerd. `protocol` says which ones can."""

    protocol: Protocol = "ttrpc"


class Log(Struct, frozen=True):
    """`[log]`: what the shim writes to containerd's log."""

    level: Level = "info"


class Settings(Struct, frozen=True):
    """All settings; an instance with nothing given holds the defaults."""

    vm: Vm = Vm()
    paths: Paths = Paths()
    timeouts: Timeouts = Timeouts()
    templates: Templates = Templates()
    annotations: Annotations = Annotations()
    shim: Shim = Shim()
    log: Log = Log()


class VmSize(Struct, frozen=True):
    """How big a VM is made."""

    vcpus: int
    memory_mib: int


ANNOTATIONS = {
    "io.pymicro.accel": "accel",
    "io.pymicro.hypervisor": "hypervisor",
    "io.pymicro.memory_mib": "memory_mib",
    "io.pymicro.start": "start",
    "io.pymicro.vcpus": "vcpus",
}
"""Every annotation that we know, and the key of `[vm]` that it overrides."""


_BODY = "the runtime options' ConfigBody"
_OPTIONS_OWN = frozenset({"TypeUrl", "ConfigPath", "ConfigBody"})
"""Keys of the runtime options themselves: CRI sends the whole section as the body where it names no file."""


def load(path: str | None = None, body: bytes = b"") -> Settings:
    """Return the settings of the file that settings_file.read(path) finds, changed by the TOML text `body`.

    Raises HostMissing when a file that was named is absent, InvalidSettings when the content makes no sense.
    """
    file = settings_file.read(path)
    settings = parse(file.content, file.path)
    return parse(body, _BODY, settings, without=_OPTIONS_OWN) if body else settings


def parse(content: bytes, file: str, usual: Settings | None = None, *, without: Iterable[str] = ()) -> Settings:
    """Return the settings that the TOML text `content` gives, `usual` where it says nothing; `file` is for messages.

    Top-level keys in `without` are not looked at. Raises InvalidSettings.
    """
    try:
        # decoded without types: the checks below give better messages than a decoder can
        document = msgspec.toml.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{file} is not valid TOML: {error}") from error
    document = {name: table for name, table in document.items() if name not in without}
    sections = {name: getattr(usual or Settings(), name) for name in Settings.__struct_fields__}
    _refuse_unknown(document, sections, f"{file}: unknown section", "[{}]")
    for name, table in document.items():
        if not isinstance(table, dict):
            raise InvalidSettings(f"{file}: {name} = {table!r} is wrong: [{name}] is a section, its keys go below it")
        sections[name] = _replace(sections[name], table, file, name)
    settings = Settings(**sections)
    _refuse_unknown(
        settings.annotations.allow, ANNOTATIONS, f"{file}: annotations.allow names the unknown annotation", "{}"
    )
    return settings


def _replace(section: Struct, table: Mapping[str, object], file: str, name: str) -> Struct:
    _refuse_unknown(table, section.__struct_fields__, f"{file}: unknown key in [{name}]:", "{}")
    types = {field.name: field.type for field in msgspec.structs.fields(section)}
    values = {}
    for key, value in table.items():
        try:
            values[key] = msgspec.convert(value, types[key])
        except msgspec.ValidationError as error:
            raise InvalidSettings(
                f"{file}: {name}.{key} = {value!r} is wrong: allowed is {_allowed(types[key])}"
            ) from error
    return msgspec.structs.replace(section, **values)


def _allowed(kind: Any) -> str:  # an Annotated type, which has no type of its own
    return str(next(meta.description for meta in kind.__metadata__))


def _refuse_unknown(names: Iterable[str], known: Iterable[str], what: str, form: str) -> None:
    """Raise InvalidSettings for the first of `names` that is not known, with the nearest one that is."""
    known = tuple(known)
    for name in names:
        if name not in known:
            raise InvalidSettings(f"{what} {form.format(name)}; {_nearest(name, known, form)}")


def _nearest(name: str, known: Iterable[str], form: str = "{}") -> str:
    import difflib

    known = tuple(known)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {form.format(close[0])}?"
    return f"known: {', '.join(form.format(each) for each in known)}"


def with_annotations(settings: Settings, annotations: Mapping[str, str]) -> Settings:
    """Return `settings` with what the pod's `io.pymicro.*` annotations ask for; other annotations are not ours.

    Raises InvalidRequest for one that is unknown or not allowed, or whose value makes no sense.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(Vm)}
    values = {}
    for name, text in annotations.items():
        if not name.startswith(PREFIX):
            continue
        if name not in ANNOTATIONS:
            raise InvalidRequest(f"unknown annotation {name}; {_nearest(name, ANNOTATIONS)}")
        if name not in settings.annotations.allow:
            raise InvalidRequest(
                f"the annotation {name} is not allowed on this host: annotations.allow in the settings would allow it"
            )
        key = ANNOTATIONS[name]
        try:
            values[key] = msgspec.convert(text, types[key], strict=False)  # annotations are strings, also of numbers
        except msgspec.ValidationError as error:
            raise InvalidRequest(
                f"the annotation {name} = {text!r} is wrong: allowed is {_allowed(types[key])}"
            ) from error
    if not values:
        return settings
    _refuse_too_much(settings, values)
    return msgspec.structs.replace(settings, vm=msgspec.structs.replace(settings.vm, **values))


def _refuse_too_much(settings: Settings, values: Mapping[str, Any]) -> None:  # values of Vm's fields
    """Raise InvalidRequest where a pod's author asks for more than the host has or its owner gives."""
    if values.get("vcpus", 0) > (limit := most_vcpus(settings)):
        raise InvalidRequest(
            f"the annotation io.pymicro.vcpus = {values['vcpus']} is over this host's limit of {limit} (vm.max_vcpus)"
        )
    if values.get("memory_mib", 0) > (limit := host_memory_mib()):
        raise InvalidRequest(
            f"the annotation io.pymicro.memory_mib = {values['memory_mib']} is over this host's memory of {limit} MiB"
        )


def most_vcpus(settings: Settings) -> int:
    """Return how many vCPUs a VM may have: `vm.max_vcpus`, and never more than the host has CPUs."""
    cpus = len(os.sched_getaffinity(0))
    return min(settings.vm.max_vcpus or cpus, cpus)


def host_memory_mib() -> int:
    """Return the host's memory in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def vm_size(settings: Settings, resources: Mapping[str, Any], annotations: Mapping[str, str] | None = None) -> VmSize:
    """Return the size of the VM for a pod whose first container has the limits `resources` (OCI `linux.resources`).

    The settings are the least it gets. A memory limit adds GUEST_OVERHEAD_MIB; a limit beyond the host's memory is as
    good as none and gives what the host has. The CRI annotations with the sum of a pod's limits count likewise.
    """
    annotations = annotations or {}
    memory, cpu = (resources.get(name) or {} for name in ("memory", "cpu"))  # JSON: any of them may be null
    wanted_memory = max(_number(memory.get("limit")), _number(annotations.get("io.kubernetes.cri.sandbox-memory")))
    memory_mib = settings.vm.memory_mib
    if wanted_memory > 0:
        mib = _ceil_div(wanted_memory, 1 << 20) + GUEST_OVERHEAD_MIB
        stepped = _ceil_div(mib, MEMORY_STEP_MIB) * MEMORY_STEP_MIB
        memory_mib = max(memory_mib, min(stepped, host_memory_mib()))
    wanted_vcpus = max(
        _vcpus(cpu.get("quota"), cpu.get("period")),
        _vcpus(
            annotations.get("io.kubernetes.cri.sandbox-cpu-quota"),
            annotations.get("io.kubernetes.cri.sandbox-cpu-period"),
        ),
    )
    return VmSize(min(max(settings.vm.vcpus, wanted_vcpus), most_vcpus(settings)), memory_mib)


def _vcpus(quota: object, period: object) -> int:
    return _ceil_div(_number(quota), _number(period) or DEFAULT_CPU_PERIOD)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _number(value: object) -> int:
    """Return a limit as a number of at least 0; absent, unlimited (-1) and unreadable ones give 0: no limit."""
    try:
        return max(int(str(value)), 0)
    except ValueError:
        return 0
