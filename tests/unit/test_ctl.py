"""pymicroctl: what it prints and which exit status it gives."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from pymicro.ctl import check, containerd, ps
from pymicro.ctl.__main__ import main
from pymicro.shim import host, settings_file, state, syscalls
from pymicro.shim.config import Paths, Settings, Vm
from pymicro.shim.errors import HostMissing

from tests.unit.template_harness import Bench, bench_in


def script(path: Path, text: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings_file.ENVIRONMENT, raising=False)
    monkeypatch.setattr(settings_file, "DEFAULT", str(tmp_path / "no-config.toml"))
    monkeypatch.setenv("CONTAINERD_ADDRESS", str(tmp_path / "no-containerd.sock"))


def names(findings: list[check.Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def stubbed(monkeypatch: pytest.MonkeyPatch, **states: check.State) -> None:
    checks = {name: (lambda _settings, n=name, s=st: check.Finding(n, s, f"about {n}")) for name, st in states.items()}
    monkeypatch.setattr(check, "CHECKS", checks)


# --- check: as a whole


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ({"a": "ok"}, 0),
        ({"a": "ok", "b": "degraded"}, 1),
        ({"a": "missing", "b": "degraded", "c": "ok"}, 2),
    ],
)
def test_the_exit_status_says_which_was_the_worst(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], states: dict[str, check.State], status: int
) -> None:
    stubbed(monkeypatch, **states)
    assert main(["check"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[st, name] for name, st in states.items()]
    assert lines[-1].endswith(f"about {list(states)[-1]}")


def test_json_carries_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stubbed(monkeypatch, kvm="degraded")
    assert main(["check", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["state"] == "degraded"
    assert answer["checks"][1] == {"name": "kvm", "state": "degraded", "detail": "about kvm"}


def test_what_a_look_raises_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_settings: Settings) -> check.Finding:
        raise HostMissing("no x; install x")

    monkeypatch.setattr(check, "CHECKS", {"x": fail})
    assert list(check.check())[1] == check.Finding("x", "missing", "no x; install x")


def test_wrong_settings_are_a_line_and_the_others_still_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stubbed(monkeypatch, a="ok")
    settings = tmp_path / "config.toml"
    settings.write_text("[vm]\nmemory = 3\n")
    assert main(["check", "--config", str(settings)]) == 2
    out = capsys.readouterr().out
    assert "missing   settings" in out
    assert "did you mean memory_mib?" in out
    assert "about a" in out


def test_the_real_host_gets_a_line_for_everything() -> None:
    findings = list(check.check())
    assert [finding.name for finding in findings] == ["settings", *check.CHECKS]
    assert all(finding.detail for finding in findings)


def test_a_reader_that_has_enough_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        command = [sys.executable, "-m", "pymicro.ctl", "check"]
        run = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, "")


def test_help_needs_no_host(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", "--help"])
    assert caught.value.code == 0
    assert "Exit status: 0 all ok" in " ".join(capsys.readouterr().out.split())


# --- check: the single lines


def test_acceleration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "why_not_kvm", lambda: None)
    assert check._acceleration(Settings()).state == "ok"
    assert check._acceleration(Settings(vm=Vm(accel="tcg"))).state == "degraded"
    monkeypatch.setattr(host, "why_not_kvm", lambda: "no flag")
    assert check._acceleration(Settings()) == check.Finding(
        "acceleration", "degraded", "VMs are emulated, and slow, because KVM is not usable: no flag"
    )
    assert check._acceleration(Settings(vm=Vm(accel="kvm"))).state == "missing"


@pytest.mark.parametrize(
    ("prints", "expected", "detail"),
    [
        ("echo 'QEMU emulator version 10.0.2 (Debian 1:10)'", "ok", "10.0.2, "),
        ("echo 'QEMU emulator version 7.2.22'", "ok", "7.2.22, "),
        ("echo 'QEMU emulator version 6.2.0'", "missing", "version 6.2.0; 7.2 or newer is needed"),
        ("exit 1", "missing", "does not tell its version"),
    ],
)
def test_qemus_version(tmp_path: Path, prints: str, expected: str, detail: str) -> None:
    finding = check._qemu(Settings(paths=Paths(qemu=script(tmp_path / "qemu", prints))))
    assert finding.state == expected
    assert detail in finding.detail


CLOUD_HYPERVISOR = Vm(hypervisor="cloud-hypervisor")


@pytest.mark.parametrize(
    ("prints", "abi", "expected", "detail"),
    [
        ("echo cloud-hypervisor v53.0.0", 3, "ok", "53.0.0, "),
        ("echo cloud-hypervisor v53.0.0", 2, "degraded", "version 2 of Landlock, 3 is needed"),
        ("echo cloud-hypervisor v48.0.0", 3, "missing", "version 48.0.0; 52 or newer is needed"),
        ("exit 1", 3, "missing", "does not tell its version"),
    ],
)
def test_cloud_hypervisors_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, abi: int, expected: str, detail: str
) -> None:
    monkeypatch.setattr(syscalls, "landlock_abi", lambda: abi)
    program = script(tmp_path / "cloud-hypervisor", prints)
    finding = check._vmm(Settings(vm=CLOUD_HYPERVISOR, paths=Paths(cloud_hypervisor=program)))
    assert (finding.name, finding.state) == ("Cloud Hypervisor", expected)
    assert detail in finding.detail


def test_cloud_hypervisor_is_looked_for_where_it_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(host, "why_not_kvm", lambda: "no flag")
    (tmp_path / "config.toml").write_text("[vm]\nhypervisor = 'cloud-hypervisor'\n")
    found = names(list(check.check(str(tmp_path / "config.toml"))))
    assert (found["Cloud Hypervisor"], found["acceleration"], found["vsock"]) == ("missing", "missing", "ok")
    assert "QEMU" not in found


def test_kernel_and_image(tmp_path: Path) -> None:
    settings = Settings(paths=Paths(kernel=str(tmp_path / "vmlinux"), image=str(tmp_path / "image.erofs")))
    missing = check._kernel(settings)
    assert missing.state == "missing"
    assert "make kernel" in missing.detail
    (tmp_path / "vmlinux").write_bytes(b"x")
    assert check._kernel(settings).state == "degraded"
    sha256 = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"
    (tmp_path / "manifest.json").write_text(json.dumps({"file": "vmlinux", "sha256": sha256}))
    assert check._kernel(settings).state == "ok"
    (tmp_path / "vmlinux").write_bytes(b"y")
    assert check._kernel(settings).state == "missing"
    assert "is corrupt" in check._kernel(settings).detail
    assert "make rootfs" in check._image(settings).detail


def test_containerd_that_nobody_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check._containerd(Settings()).state == "missing"
    script(tmp_path / "containerd")
    finding = check._containerd(Settings())
    assert finding.state == "degraded"
    assert "no-containerd.sock" in finding.detail


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A process that listens where containerd would, with a PATH of its own."""
    path = tmp_path / "containerd.sock"
    bind = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen()"
    code = f"{bind}; print(flush=True); input()"
    environment = {"PATH": str(tmp_path / "daemons-path")}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setenv("CONTAINERD_ADDRESS", f"unix://{path}")
        yield process
        process.kill()


def test_containerd_that_answers(daemon: subprocess.Popen[str]) -> None:
    finding = check._containerd(Settings())
    assert finding.state == "ok"
    assert f"pid {daemon.pid}" in finding.detail


def test_the_shim_is_looked_for_where_containerd_looks(
    daemon: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "ours" / containerd.SHIM)
    monkeypatch.setenv("PATH", str(tmp_path / "ours"))
    finding = check._shim(Settings())
    assert finding.state == "missing"
    assert f"PATH of containerd (pid {daemon.pid})" in finding.detail
    shim = script(tmp_path / "daemons-path" / containerd.SHIM)
    assert check._shim(Settings()) == check.Finding("shim", "ok", shim)


def test_without_a_containerd_the_shim_is_looked_for_on_our_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "make install" in check._shim(Settings()).detail
    assert check._shim(Settings()).state == "missing"


def test_a_socket_without_a_listener_is_no_containerd(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    assert containerd.running(str(tmp_path / "dead.sock")) is None


def test_a_missing_tun_and_too_little_memory_are_degraded(tmp_path: Path) -> None:
    assert check._tun(Settings(), "/no/tun").state == "degraded"
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:     204800 kB\n")
    assert check._memory(Settings(), str(meminfo)) == check.Finding(
        "memory", "degraded", "200 MiB available, one VM may take 320 MiB: free some"
    )
    meminfo.write_text("MemAvailable:    2048000 kB\n")
    assert "enough for 6 VMs" in check._memory(Settings(), str(meminfo)).detail


# --- ps


@pytest.fixture
def vmm() -> Iterator[int]:
    """A child process: a VMM is one of its shim."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def record(run: Path, key: str, **facts: Any) -> None:  # JSON of any kind
    """Write what a shim that is this very process would."""
    directory = run / key
    directory.mkdir(parents=True)
    own = {"shim_pid": os.getpid(), "shim_start_time": state.start_time(os.getpid()), "namespace": "default"}
    state.write(str(directory), {**own, "created_at": time.time() - 90, **facts})


def test_a_running_sandbox(tmp_path: Path, vmm: int) -> None:
    record(
        tmp_path, "0a", sandbox="s1", vmm_pid=vmm, memory_mib=256, vcpus=2, accel="tcg", containers=["s1", "c2", "c2"]
    )
    (row,) = ps.sandboxes(str(tmp_path))
    assert (row.sandbox, row.namespace, row.condition, row.vmm_pid) == ("s1", "default", "running", vmm)
    assert (row.memory_mib, row.vcpus, row.accel, row.containers) == (256, 2, "tcg", ("s1", "c2"))
    assert row.rss is not None
    assert row.rss > 0
    assert row.age_seconds == pytest.approx(90, abs=5)


def test_a_sandbox_without_a_vmm_yet_is_booting(tmp_path: Path) -> None:
    record(tmp_path, "0a", sandbox="s1")
    (row,) = ps.sandboxes(str(tmp_path))
    assert (row.condition, row.vmm_pid, row.rss) == ("booting", None, None)


def test_a_sandbox_whose_shim_is_gone_is_dead(tmp_path: Path, vmm: int) -> None:
    record(tmp_path, "0a", sandbox="s1", vmm_pid=vmm, shim_start_time=1)
    (row,) = ps.sandboxes(str(tmp_path))
    assert row.condition == "dead"


def test_a_pid_that_another_process_has_now_is_no_vmm(tmp_path: Path) -> None:
    record(tmp_path, "0a", sandbox="s1", vmm_pid=1)
    (row,) = ps.sandboxes(str(tmp_path))
    assert (row.condition, row.rss) == ("dead", None)


def test_directories_without_a_readable_state_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / state.STATE_FILE).write_text("{")
    record(tmp_path, "young", sandbox="young", created_at=time.time())
    record(tmp_path, "old", sandbox="old", created_at=1)
    assert [row.sandbox for row in ps.sandboxes(str(tmp_path))] == ["old", "young"]
    assert list(ps.sandboxes(str(tmp_path / "absent"))) == []


def test_ps_prints_a_table(
    tmp_path: Path, vmm: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(state, "DEFAULT_RUN", str(tmp_path))
    record(tmp_path, "0a", sandbox="s1", vmm_pid=vmm, memory_mib=256, vcpus=1, containers=["c1", "c2"])
    assert main(["ps"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "SANDBOX NAMESPACE STATE VMM PID CPUS MEMORY RSS PSS ACCEL AGE CONTAINERS"
    assert line.split()[:4] == ["s1", "default", "running", str(vmm)]
    assert line.split()[-2:] == ["1m30s", "c1,c2"]


def test_ps_without_sandboxes_prints_the_header_or_an_empty_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(state, "DEFAULT_RUN", str(tmp_path / "absent"))
    assert main(["ps"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (42.9, "42s"), (187, "3m07s"), (18720, "5h12m"), (183600, "2d03h")]
)
def test_ages_read_well(seconds: float | None, text: str) -> None:
    assert ps._age(seconds) == text


def test_pymicroctl_starts_without_the_heavy_libraries() -> None:
    code = "import sys; from pymicro.ctl.__main__ import parser; parser(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"asyncio", "psutil", "msgspec", "google.protobuf", "pyroute2"} & set(run.stdout.split())


# --- template


@pytest.fixture
def templates(tmp_path: Path) -> Bench:
    """A store that the default settings of these tests name, with one template in it."""
    bench = bench_in(tmp_path)
    Path(settings_file.DEFAULT).write_text(f'[templates]\ndirectory = "{bench.store.directory}"\nmost_mib = 64\n')
    asyncio.run(bench.template())
    return bench


def test_templates_are_listed_with_what_they_hold_and_their_state(
    templates: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = asyncio.run(templates.template(replace(templates.spec, vcpus=2))).memory.parent.name
    used = templates.store.names()
    (templates.where / "state").write_text("changed")
    assert main(["template", "list"]) == 0
    header, *lines, total = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "TEMPLATE CPUS MEMORY HELD AGE STATE"
    rows = {line.split()[0]: line.split(maxsplit=8) for line in lines}
    assert rows[sound] == [sound, "2", "4", "MiB", "1", "MiB", "0", "min", "ok"]
    assert rows[templates.name][-1] == "damaged: changed since it was made: state"
    assert total == "together 2 MiB, at most 64 MiB are kept (templates.most_mib)"
    assert templates.store.names() == used, "looking counts as use"


def test_a_changed_kernel_makes_a_template_stale_and_prune_removes_it(
    templates: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    name = templates.name
    assert main(["template", "prune"]) == 0
    assert capsys.readouterr().out == ""
    templates.spec.kernel.write_text("another kernel")
    main(["template", "list"])
    assert f"stale: the kernel has changed: {templates.spec.kernel}" in capsys.readouterr().out
    assert main(["template", "prune"]) == 0
    assert capsys.readouterr().out == f"{name}  stale: the kernel has changed: {templates.spec.kernel}\n"
    assert templates.left() == []


def test_half_made_templates_are_pruned(templates: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    half = templates.store.directory / f"{templates.name}.12345"
    half.mkdir()
    assert main(["template", "prune"]) == 0
    assert capsys.readouterr().out == f"{half.name}  half-made: its builder is gone\n"
    assert templates.left() == [templates.name]


def test_templates_are_removed_by_name(templates: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template", "rm", "0123456789abcdef"]) == 1
    assert "there is no template 0123456789abcdef" in capsys.readouterr().err
    assert main(["template", "rm", templates.name]) == 0
    assert templates.left() == []


def test_a_host_without_templates_has_an_empty_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path(settings_file.DEFAULT).write_text(f'[templates]\ndirectory = "{tmp_path}/absent"\n')
    assert main(["template", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["template", "prune"]) == 0
