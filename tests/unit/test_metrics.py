"""The guest's cgroup files, as clients of a v1 and of a v2 host read them."""

import pytest
from pymicro.shim import metrics
from pymicro.shim.errors import GuestError

FILES = {
    "cpu.stat": "usage_usec 3000\nuser_usec 2000\nsystem_usec 1000\nnr_periods 7\nnr_throttled 3\nthrottled_usec 40\n",
    "cpu.pressure": "some avg10=1.50 avg60=0.20 avg300=0.00 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
    "memory.current": "5242880\n",
    "memory.peak": "6291456\n",
    "memory.max": "33554432\n",
    "memory.swap.max": "0\n",
    "memory.swap.current": "0\n",
    "memory.stat": "anon 1048576\nfile 4096\nkernel 512\npgfault 77\npgmajfault 2\nzswpin 3\nsome_new_line 1\n",
    "memory.events": "low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 0\n",
    "pids.current": "2\n",
    "pids.max": "100\n",
    "io.stat": "254:0 rbytes=4096 wbytes=512 rios=3 wios=1 dbytes=0 dios=0\n8:16\n",
    "hugetlb.2MB.current": "2097152\n",
    "hugetlb.2MB.max": "max\n",
    "hugetlb.2MB.events": "max 4\n",
}


def test_a_v2_host_sees_the_guests_own_numbers() -> None:
    found = metrics.v2_metrics(FILES)
    assert (found.cpu.usage_usec, found.cpu.user_usec, found.cpu.system_usec) == (3000, 2000, 1000)
    assert (found.cpu.nr_periods, found.cpu.nr_throttled, found.cpu.throttled_usec) == (7, 3, 40)
    assert (found.memory.usage, found.memory.usage_limit, found.memory.max_usage) == (5242880, 33554432, 6291456)
    assert (found.memory.anon, found.memory.file, found.memory.pgfault) == (1048576, 4096, 77)
    assert (found.memory_events.oom_kill, found.memory_events.max) == (1, 9)
    assert (found.pids.current, found.pids.limit) == (2, 100)
    assert (found.io.usage[0].major, found.io.usage[0].rbytes, found.io.usage[0].wios) == (254, 4096, 1)
    assert (found.cpu.psi.some.avg10, found.cpu.psi.some.total) == (1.5, 99)
    assert (found.hugetlb[0].pagesize, found.hugetlb[0].current, found.hugetlb[0].failcnt) == ("2MB", 2097152, 4)


def test_a_v1_host_sees_them_in_its_own_terms() -> None:
    found = metrics.v1_metrics(FILES, 2)
    assert (found.cpu.usage.total, found.cpu.usage.user, found.cpu.usage.kernel) == (3_000_000, 2_000_000, 1_000_000)
    assert list(found.cpu.usage.per_cpu) == [1_500_000] * 2
    assert (found.cpu.throttling.throttled_periods, found.cpu.throttling.throttled_time) == (3, 40_000)
    assert (found.memory.usage.usage, found.memory.usage.limit) == (5242880, 33554432)
    assert (found.memory.usage.max, found.memory.usage.failcnt) == (6291456, 9)
    assert (found.memory.rss, found.memory.total_rss, found.memory.cache) == (1048576, 1048576, 4096)
    assert found.memory.hierarchical_memory_limit == 33554432
    assert found.memory.swap.limit == 33554432
    assert (found.pids.current, found.pids.limit) == (2, 100)
    assert found.memory_oom_control.oom_kill == 1
    assert [(each.op, each.value) for each in found.blkio.io_service_bytes_recursive[:2]] == [
        ("Read", 4096),
        ("Write", 512),
    ]


def test_no_limit_is_told_as_each_mode_tells_it() -> None:
    unlimited = {"memory.max": "max\n", "memory.swap.max": "max\n", "pids.max": "max\n"}
    assert metrics.v2_metrics(unlimited).memory.usage_limit == (1 << 64) - 1
    one = metrics.v1_metrics(unlimited, 2)
    assert (
        one.memory.usage.limit == one.memory.swap.limit == one.memory.hierarchical_memory_limit == 9223372036854771712
    )
    assert one.pids.limit == 0


def test_a_guest_without_some_controllers_gives_zeros() -> None:
    assert metrics.v2_metrics({}).memory.usage == 0
    assert not metrics.v2_metrics({}).cpu.HasField("psi")
    assert metrics.v1_metrics({}, 2).memory.usage.usage == 0


@pytest.mark.parametrize(("is_v2", "name"), [(True, "io.containerd.cgroups.v2"), (False, "io.containerd.cgroups.v1")])
def test_the_message_is_that_of_the_hosts_mode(monkeypatch: pytest.MonkeyPatch, is_v2: bool, name: str) -> None:
    monkeypatch.setattr("pymicro.shim.cgroup.is_v2", lambda: is_v2)
    assert metrics.for_this_host(FILES, 2).DESCRIPTOR.full_name == f"{name}.Metrics"


@pytest.mark.parametrize(
    "nonsense",
    [
        {"cpu.stat": "usage_usec " + "9" * 30},
        {"memory.current": "9" * 5000},
        {"cpu.pressure": "some avg10=x"},
        {"cpu.stat": "x"},
        {"cpu.stat": "usage_usec -4"},
        {"io.stat": "\n\nx y z\n"},
    ],
)
def test_a_hostile_guest_gets_an_error_or_zeros_and_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, nonsense: dict[str, str]
) -> None:
    for is_v2 in (True, False):
        monkeypatch.setattr("pymicro.shim.cgroup.is_v2", lambda mode=is_v2: mode)
        try:
            metrics.for_this_host(nonsense, 2).SerializeToString()
        except GuestError as error:
            assert "make no sense" in str(error)
