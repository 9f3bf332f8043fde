"""A container's statistics: from the guest's cgroup v2 files to the message that the host's clients expect.

Clients take their host's cgroup mode for the container's: on a v1 host the guest's v2 numbers are told in v1's terms,
as containerd's runc shim fills them. The meaning of the files: admin-guide/cgroup-v2.rst of the kernel.
"""

from collections.abc import Iterator, Mapping

from google.protobuf.message import Message
from pymicro.protos import cgroups_v1_pb2 as v1
from pymicro.protos import cgroups_v2_pb2 as v2
from pymicro.shim import cgroup
from pymicro.shim.errors import GuestError

UNLIMITED = (1 << 64) - 1
"""What cgroup v2 messages carry for "max"."""
UNLIMITED_V1 = 0x7FFF_FFFF_FFFF_F000
"""What a v1 memory controller reads where there is no limit: the most pages that its counter can hold, in bytes."""

Files = Mapping[str, str]
"""Texts of cgroup files by name; what a guest does not have is absent."""

_V1_MEMORY = {
    "cache": "file",
    "rss": "anon",
    "rss_huge": "anon_thp",
    "mapped_file": "file_mapped",
    "dirty": "file_dirty",
    "writeback": "file_writeback",
    "pg_fault": "pgfault",
    "pg_maj_fault": "pgmajfault",
    **{name: name for name in ("inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable")},
}
"""Fields of v1's MemoryStat and the lines of v2's memory.stat that count the same."""


def for_this_host(files: Files, cpus: int) -> v1.Metrics | v2.Metrics:
    """Return the statistics in the message that fits the host's cgroup mode; the VM has `cpus` CPUs. Raises GuestError
    for nonsense.
    """
    try:
        return v2_metrics(files) if cgroup.is_v2() else v1_metrics(files, cpus)
    except (ValueError, TypeError, AttributeError) as error:  # the guest is not to be trusted with the form of a file
        raise GuestError(f"the guest's statistics make no sense: {error}") from error


def v2_metrics(files: Files) -> v2.Metrics:
    """Return the statistics as a cgroup v2 host has them."""
    metrics = v2.Metrics(
        pids=v2.PidsStat(current=_number(files, "pids.current"), limit=_number(files, "pids.max")),
        cpu=v2.CPUStat(psi=_pressure(files, "cpu.pressure")),
        memory=v2.MemoryStat(
            usage=_number(files, "memory.current"),
            usage_limit=_number(files, "memory.max"),
            max_usage=_number(files, "memory.peak"),
            swap_usage=_number(files, "memory.swap.current"),
            swap_limit=_number(files, "memory.swap.max"),
            swap_max_usage=_number(files, "memory.swap.peak"),
            psi=_pressure(files, "memory.pressure"),
        ),
        memory_events=v2.MemoryEvents(),
        io=v2.IOStat(psi=_pressure(files, "io.pressure")),
    )
    _fill(metrics.cpu, _table(files, "cpu.stat"))
    _fill(metrics.memory, _table(files, "memory.stat"))
    _fill(metrics.memory_events, _table(files, "memory.events"))
    for major, minor, counts in _io(files):
        _fill(metrics.io.usage.add(major=major, minor=minor), counts)
    for size in _huge_page_sizes(files):
        metrics.hugetlb.add(
            pagesize=size,
            current=_number(files, f"hugetlb.{size}.current"),
            max=_number(files, f"hugetlb.{size}.max"),
            failcnt=_table(files, f"hugetlb.{size}.events").get("max", 0),
        )
    return metrics


def v1_metrics(files: Files, cpus: int) -> v1.Metrics:
    """Return the statistics as a cgroup v1 host has them. What v2 does not count stays 0 (paging) or is divided evenly:
    the usage of each CPU, of which clients such as nerdctl take the number.
    """
    cpu, events = _table(files, "cpu.stat"), _table(files, "memory.events")
    usage = cpu.get("usage_usec", 0) * 1000
    pids_limit = _number(files, "pids.max")
    metrics = v1.Metrics(
        pids=v1.PidsStat(current=_number(files, "pids.current"), limit=0 if pids_limit == UNLIMITED else pids_limit),
        cpu=v1.CPUStat(
            usage=v1.CPUUsage(
                total=usage,
                per_cpu=[usage // cpus] * cpus,
                kernel=cpu.get("system_usec", 0) * 1000,
                user=cpu.get("user_usec", 0) * 1000,
            ),
            throttling=v1.Throttle(
                periods=cpu.get("nr_periods", 0),
                throttled_periods=cpu.get("nr_throttled", 0),
                throttled_time=cpu.get("throttled_usec", 0) * 1000,
            ),
        ),
        memory=_v1_memory(files, failures=events.get("max", 0)),
        memory_oom_control=v1.MemoryOomControl(oom_kill=events.get("oom_kill", 0)),
        blkio=v1.BlkIOStat(),
    )
    for major, minor, counts in _io(files):
        for operation, size, number in (("Read", "rbytes", "rios"), ("Write", "wbytes", "wios")):
            metrics.blkio.io_service_bytes_recursive.add(
                op=operation, major=major, minor=minor, value=counts.get(size, 0)
            )
            metrics.blkio.io_serviced_recursive.add(op=operation, major=major, minor=minor, value=counts.get(number, 0))
    for size in _huge_page_sizes(files):
        metrics.hugetlb.add(
            pagesize=size,
            usage=_number(files, f"hugetlb.{size}.current"),
            failcnt=_table(files, f"hugetlb.{size}.events").get("max", 0),
        )
    return metrics


def _v1_memory(files: Files, failures: int) -> v1.MemoryStat:
    limit = min(_number(files, "memory.max", UNLIMITED), UNLIMITED_V1)
    swap_limit = min(_number(files, "memory.swap.max", UNLIMITED), UNLIMITED_V1)
    usage, swap = _number(files, "memory.current"), _number(files, "memory.swap.current")
    counts = _table(files, "memory.stat")
    memory = v1.MemoryStat(
        hierarchical_memory_limit=limit,
        hierarchical_swap_limit=min(limit + swap_limit, UNLIMITED_V1),
        usage=v1.MemoryEntry(limit=limit, usage=usage, max=_number(files, "memory.peak", usage), failcnt=failures),
        # v1 counts memory and swap together
        swap=v1.MemoryEntry(limit=min(limit + swap_limit, UNLIMITED_V1), usage=usage + swap),
        kernel=v1.MemoryEntry(limit=UNLIMITED_V1, usage=counts.get("kernel", 0)),
        kernel_tcp=v1.MemoryEntry(limit=UNLIMITED_V1, usage=counts.get("sock", 0)),
    )
    own = {field: counts.get(line, 0) for field, line in _V1_MEMORY.items()}
    _fill(memory, own | {f"total_{field}": value for field, value in own.items()})
    return memory


def _fill(message: Message, values: Mapping[str, int]) -> None:
    """Set the fields of `message` that have the name of a value; kernels count more than the messages carry."""
    for field in message.DESCRIPTOR.fields:
        if field.name in values:
            setattr(message, field.name, values[field.name])


def _number(files: Files, name: str, absent: int = 0) -> int:
    text = files.get(name, "").strip()
    if text == "max":
        return UNLIMITED
    return int(text) if text.isdecimal() else absent


def _table(files: Files, name: str) -> dict[str, int]:
    """Return a file of lines `name number`."""
    pairs = (line.split() for line in files.get(name, "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _io(files: Files) -> Iterator[tuple[int, int, dict[str, int]]]:
    """Yield major, minor and counters of each device in io.stat: lines `8:0 rbytes=1 wbytes=2 ...`."""
    for line in files.get("io.stat", "").splitlines():
        device, *words = line.split()
        major, _, minor = device.partition(":")
        if major.isdecimal() and minor.isdecimal():
            pairs = (word.partition("=") for word in words)
            yield int(major), int(minor), {key: int(value) for key, _, value in pairs if value.isdecimal()}


def _pressure(files: Files, name: str) -> v2.PSIStats | None:
    """Return a pressure file: lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`; None where the guest has none."""
    if name not in files:
        return None
    lines = (line.split() for line in files[name].splitlines())
    stalls = {words[0]: dict(word.split("=", 1) for word in words[1:] if "=" in word) for words in lines if words}
    return v2.PSIStats(some=_stall(stalls.get("some", {})), full=_stall(stalls.get("full", {})))


def _stall(values: Mapping[str, str]) -> v2.PSIData:
    averages = {name: float(values.get(name, 0)) for name in ("avg10", "avg60", "avg300")}
    return v2.PSIData(total=int(values.get("total", 0)), **averages)


def _huge_page_sizes(files: Files) -> list[str]:
    names = (name.split(".") for name in files if name.startswith("hugetlb.") and name.endswith(".current"))
    return sorted(parts[1] for parts in names if len(parts) == 3)
