"""The Cloud Hypervisor backend against a program that speaks its API and has no VM: what it is asked for, in which
order, and what each failure is told as.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pymicro.shim import host
from pymicro.shim.config import Paths, Settings, Vm
from pymicro.shim.errors import HostMissing, InvalidSettings, SandboxDied, ShimError, StepTimeout
from pymicro.shim.hypervisor import registry
from pymicro.shim.hypervisor.base import Boot, Origin, Share, Template, VmSpec
from pymicro.shim.hypervisor.cloud_hypervisor.backend import CloudHypervisor, SpawnedCloudHypervisor
from pymicro.shim.hypervisor.cloud_hypervisor.wake import version
from pymicro.shim.spawn import Place

from tests.framework.fakes import asynchronous, no_descriptor_leaks

VMM = r"""
import json, os, socket, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
listener = socket.socket(fileno=int(words["--api-socket"][3:]))
events = int(words["--event-monitor"][3:])
answers = json.loads(ANSWERS)
connection, _ = listener.accept()
stream = connection.makefile("rb")

FILES = {"memory-ranges": "the RAM", "config.json": '{"cpus": 1, "landlock_enable": true}', "state.json": "{}"}

def snapshot(directory):
    for name, text in FILES.items():
        with open(directory + "/" + name, "w") as file:
            file.write(text)

print("a kernel says hello", flush=True)
while line := stream.readline():
    size = 0
    while (header := stream.readline().strip()):
        if header.lower().startswith(b"content-length:"):
            size = int(header.split(b":")[1])
    body = json.loads(stream.read(size) or "null")
    name = line.split()[1].decode().rpartition("/")[2]
    seen = {}
    if name == "vm.restore":
        where = body["source_url"].removeprefix("file://")
        seen = {file: open(where + "/" + file).read() for file in os.listdir(where)}
    with open(LOG, "a") as log:
        print(json.dumps([name, body, seen]), file=log)
    answer = answers.get(name, [204, None])
    if answer == "die":
        sys.exit("this host is too small")
    if answer == "hang":
        time.sleep(60)
    if name == "vm.snapshot":
        snapshot(body["destination_url"].removeprefix("file://"))
    status, content = answer
    text = b"" if content is None else json.dumps(content).encode()
    length = b"" if status == 204 else b"Content-Length: %d\r\n" % len(text)
    connection.sendall(b"HTTP/1.1 %d X\r\nServer: API\r\n" % status + length + b"\r\n" + text)
    if name == REBOOTS_AFTER:
        os.write(events, b'{\n  "source": "vm",\n  "event": "rebooting",\n  "properties": null\n}\n\n')
"""

Answers = dict[str, Any]
"""What the program does with a request: [status, JSON], "die" or "hang". Without it all goes well."""
PING = [200, {"version": "53.0.0"}]


@dataclass
class Bench:
    """A place, a program to start there, and what that was asked for."""

    place: Place
    spec: VmSpec
    log: Path
    hypervisor: CloudHypervisor

    def spawn(self, origin: Origin | None = None, *, vsock: bool = True) -> SpawnedCloudHypervisor:
        return self.hypervisor.spawn(self.spec, origin or Boot(), self.place, vsock=vsock)

    @property
    def asked(self) -> list[list[Any]]:
        """Name, body, and the files seen of each request: JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.asked]

    def failure(self, origin: Origin | None = None) -> ShimError:
        """Return why the VM does not come up; afterwards nothing is left of it."""
        spawned = self.spawn(origin)
        try:
            with pytest.raises(ShimError) as caught:
                spawned.wake()
        finally:
            spawned.end()
        assert self.left() == []
        return caught.value

    def left(self) -> list[str]:
        return [str(path) for path in self.place.directory.rglob("*") if not path.is_dir()]

    def template(self, directory: Path) -> Template:
        """Return a template that was saved by this program's like."""
        directory.mkdir()
        template = Template(directory / "memory", directory / "state")
        template.memory.write_text("the RAM")
        config = {"cpus": 1, "landlock_enable": True, "landlock_rules": [{"path": "/elsewhere", "access": "rw"}]}
        template.state.write_text(json.dumps(config) + '\n{"devices": []}')
        return template


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


def bench_in(tmp_path: Path, answers: Answers | None = None, *, reboots_after: str = "", timeout: float = 5) -> Bench:
    program, log, directory = tmp_path / "cloud-hypervisor", tmp_path / "log", tmp_path / "run"
    log.touch()
    directory.mkdir()
    facts = f"LOG = {str(log)!r}\nANSWERS = {json.dumps({'vmm.ping': PING, **(answers or {})})!r}\n"
    program.write_text(f"#!{sys.executable} -IS\n{facts}REBOOTS_AFTER = {reboots_after!r}\n{VMM}")
    program.chmod(0o755)
    spec = VmSpec(str(program), Path("/k/vmlinux"), Path("/i/image.erofs"), 1, 256, "kvm")
    return Bench(Place(directory), spec, log, CloudHypervisor(landlock=True, timeout=timeout))


# --- what goes well


def test_vm_is_described_then_gets_its_vsock_then_boots(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    spawned = bench.spawn()
    spawned.wake()
    spawned.end()
    assert bench.names == ["vm.create", "vmm.ping", "vm.add-vsock", "vm.boot"]
    assert bench.left() == []


def test_vmm_may_make_files_in_one_directory_where_nothing_of_the_pod_lies(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    spawned = bench.spawn()
    spawned.wake()
    spawned.end()
    config, vsock = bench.asked[0][1], bench.asked[2][1]
    (rule,) = config["landlock_rules"]
    assert config["landlock_enable"] is True
    assert Path(vsock["socket"]).parent == Path(rule["path"])
    assert Path(rule["path"]).parent == bench.place.directory


def test_without_landlock_in_the_kernel_the_vmm_is_not_asked_for_it(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    bench.hypervisor = CloudHypervisor(landlock=False, timeout=5)
    spawned = bench.spawn()
    spawned.wake()
    spawned.end()
    assert bench.asked[0][1]["landlock_enable"] is False


def test_clone_goes_on_from_the_saved_files_confined_to_its_own(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    template = bench.template(tmp_path / "template")
    spawned = bench.spawn(template)
    spawned.wake()
    assert bench.names == ["vm.restore", "vmm.ping", "vm.add-vsock", "vm.resume"]
    assert not (bench.place.directory / "restore").exists(), "what it was restored from is not needed any more"
    spawned.end()
    files = bench.asked[0][2]
    assert files["memory-ranges"] == "the RAM"
    assert json.loads(files["state.json"]) == {"devices": []}
    config = json.loads(files["config.json"])
    assert config["cpus"] == 1
    assert [rule["path"] for rule in config["landlock_rules"]] == [str(bench.place.directory / "vmm")]
    assert template.memory.read_text() == "the RAM"


@asynchronous
async def test_saved_vm_is_a_template(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    template = bench.template(tmp_path / "template")
    template.state.unlink()
    spawned = bench.spawn(Boot(template.memory), vsock=False)
    spawned.wake()
    async with bench.hypervisor.take_over(spawned) as vm:
        await vm.console_says("hello")
        await vm.save(template.state)
    assert bench.names == ["vm.create", "vmm.ping", "vm.boot", "vm.pause", "vm.snapshot"]
    assert sorted(os.listdir(template.state.parent)) == ["memory", "state"]
    config, _, state = template.state.read_text().partition("\n")
    assert (json.loads(config)["cpus"], state) == (1, "{}")
    assert {rule["path"] for rule in bench.asked[0][1]["landlock_rules"]} == {str(template.memory.parent)}


@asynchronous
async def test_share_is_plugged_into_the_vm_that_runs(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, {"vm.add-fs": [200, {"id": "_fs1", "bdf": "0000:00:05.0"}]})
    spawned = bench.spawn()
    spawned.wake()
    async with bench.hypervisor.take_over(spawned) as vm:
        await vm.attach(Share("share", Path("/run/x/fs.sock")))
        assert list(vm.console()) == ["a kernel says hello"]
    name, body, _ = bench.asked[-1]
    assert (name, body["tag"], body["socket"]) == ("vm.add-fs", "share", "/run/x/fs.sock")
    assert bench.left() == []


def test_nobody_else_finds_the_api(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    spawned = bench.spawn(vsock=False)
    assert [path for path in bench.place.directory.rglob("*") if path.is_socket()] == []
    spawned.end()


# --- what goes wrong


def test_refusal_names_the_request_and_its_causes(tmp_path: Path) -> None:
    reasons = ["Error from API", "The VM could not boot", "No such file"]
    error = bench_in(tmp_path, {"vm.boot": [500, reasons]}).failure()
    assert isinstance(error, SandboxDied)
    assert str(error) == "Cloud Hypervisor refused vm.boot: Error from API: The VM could not boot: No such file"


@pytest.mark.parametrize("create", [[204, None], [400, ["Bad Request"]]], ids=["takes it", "refuses it"])
def test_vmm_that_is_too_old_says_so_whatever_it_does_with_the_request(tmp_path: Path, create: list[Any]) -> None:
    error = bench_in(tmp_path, {"vmm.ping": [200, {"version": "48.0.0"}], "vm.create": create}).failure()
    assert isinstance(error, HostMissing)
    assert "cloud-hypervisor (paths.cloud_hypervisor) is version 48.0.0; 52 or newer is needed" in str(error)


def test_vmm_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    error = bench_in(tmp_path, {"vm.create": "die"}).failure()
    assert isinstance(error, SandboxDied)
    assert "cloud-hypervisor ended with status 1; its last lines: this host is too small (at vm.create)" in str(error)


def test_vmm_that_hangs_is_a_timeout_that_names_the_setting(tmp_path: Path) -> None:
    error = bench_in(tmp_path, {"vm.create": "hang"}, timeout=0.5).failure()
    assert isinstance(error, StepTimeout)
    assert "did not answer vm.create in 0.5 s (timeouts.vmm)" in str(error)


def test_program_that_is_not_there(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    Path(bench.spec.binary).unlink()
    error = bench.failure()
    assert isinstance(error, HostMissing)
    assert f"cannot start cloud-hypervisor as '{bench.spec.binary}'" in str(error)


def test_damaged_state_is_an_error_of_that_start_alone(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    template = bench.template(tmp_path / "template")
    template.state.write_bytes(b"\xff not JSON")
    with pytest.raises(SandboxDied, match="does not begin with a VM's description"):
        bench.spawn(template)
    assert bench.left() == []


@asynchronous
async def test_guest_that_resets_is_the_end_of_the_vmm(tmp_path: Path) -> None:
    """The VMM would boot it anew. Its status is that of a guest that ended by itself."""
    bench = bench_in(tmp_path, reboots_after="vm.boot")
    spawned = bench.spawn()
    spawned.wake()
    async with bench.hypervisor.take_over(spawned) as vm:
        ended = await vm.wait()
        assert (ended.process, ended.status) == ("cloud-hypervisor", 0)
        with pytest.raises(SandboxDied, match="ended with status 0"):
            await vm.accept()


@asynchronous
async def test_killed_vmm_is_noticed_by_whoever_waits(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    spawned = bench.spawn()
    spawned.wake()
    async with bench.hypervisor.take_over(spawned) as vm:
        os.kill(vm.pid, signal.SIGKILL)
        with pytest.raises(SandboxDied, match=r"cloud-hypervisor ended with signal 9"):
            await vm.accept()
        with pytest.raises(SandboxDied, match=r"cloud-hypervisor ended with signal 9 \(at vm.add-fs\)"):
            await vm.attach(Share("share", Path("/run/x/fs.sock")))
    assert bench.left() == []


@asynchronous
async def test_vmm_that_hangs_later_is_a_timeout_too(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, {"vm.add-fs": "hang"}, timeout=2)
    spawned = bench.spawn()
    spawned.wake()
    async with bench.hypervisor.take_over(spawned) as vm:
        with pytest.raises(StepTimeout, match=r"did not answer vm.add-fs in 2 s \(timeouts.vmm\)"):
            await vm.attach(Share("share", Path("/run/x/fs.sock")))


# --- the host


@pytest.mark.parametrize(
    ("text", "expected"), [("v53.0.0", (53, 0, 0)), ("53.0-12-gabcdef", (53, 0)), ("", ()), ("nightly", ())]
)
def test_versions(text: str, expected: tuple[int, ...]) -> None:
    assert version(text) == expected


def chosen(accel: str = "auto", **paths: str) -> Settings:
    vm = Vm(hypervisor="cloud-hypervisor", accel=accel)  # type: ignore[arg-type]  # one of its values
    return Settings(vm=vm, paths=Paths(**paths))


@pytest.mark.parametrize("accel", ["auto", "kvm"])
def test_host_without_kvm_is_told_at_once(monkeypatch: pytest.MonkeyPatch, accel: str) -> None:
    monkeypatch.setattr(host, "why_not_kvm", lambda: "no flag")
    with pytest.raises(HostMissing, match=r'needs KVM: no flag; or set vm.hypervisor = "qemu"'):
        registry.accel(chosen(accel))
    monkeypatch.setattr(host, "why_not_kvm", lambda: None)
    assert registry.accel(chosen(accel)) == "kvm"


def test_it_emulates_nothing() -> None:
    with pytest.raises(InvalidSettings, match=r'vm.accel = "tcg" needs "qemu"'):
        registry.accel(chosen("tcg"))


def test_program_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostMissing, match=r"no program cloud-hypervisor \(paths.cloud_hypervisor\); install"):
        registry.binary(chosen())
    program = bench_in(tmp_path).spec.binary
    assert registry.binary(chosen()) == program
    assert registry.binary(chosen(cloud_hypervisor=program)) == program
    assert isinstance(registry.hypervisor(chosen()), CloudHypervisor)


def test_template_depends_on_the_size(tmp_path: Path) -> None:
    hypervisor = CloudHypervisor(landlock=True, timeout=5)
    small = VmSpec("/b", Path("/k"), Path("/i"), 1, 256, "kvm")
    large = VmSpec("/b", Path("/k"), Path("/i"), 1, 512, "kvm")
    assert hypervisor.identity(small) != hypervisor.identity(large)
    assert hypervisor.identity(small) == CloudHypervisor(landlock=False, timeout=1).identity(small)
