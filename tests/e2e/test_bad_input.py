"""Bad input gets a message that names the cause and the remedy, in ctr's output and in the log, and leaves nothing."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.framework.ctr import PYMICRO, Completed, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.settings import write_settings
from tests.framework.waiting import seconds

SOON = 3.0
"""Seconds in which an error must come that needs no VM; mostly the time to start Python on a busy machine."""

STATUS_WORDS = (
    "invalid argument|context deadline exceeded|not found|failed precondition|not implemented|unavailable|unknown"
)
"""What containerd before 2 appends to an error, by its status."""

RECORDER = """#!/bin/sh
touch {started}
exec qemu-system-x86_64 "$@"
"""


@dataclass(frozen=True)
class Attempts:
    """Runs containers with settings of their own, by `ctr --runtime-config-path`, and takes note of any VM."""

    ctr: Ctr
    directory: Path

    @property
    def vm_was_started(self) -> bool:
        return (self.directory / "started").exists()

    def run(
        self,
        *command: str,
        settings: Mapping[str, dict[str, object]] | None = None,
        text: str = "",
        options: tuple[str, ...] = (),
    ) -> Completed:
        """Run a container with `settings` over the defaults, or with the settings file `text`."""
        file = self.directory / "settings.toml"
        recorder = self.directory / "qemu"
        recorder.write_text(RECORDER.format(started=self.directory / "started"))
        recorder.chmod(0o755)
        tables = dict(settings or {})
        tables["paths"] = {"qemu": str(recorder), **tables.get("paths", {})}
        tables["vm"] = {"start": "boot", **tables.get("vm", {})}  # a template of each test's would be of no more use
        if text:
            file.write_text(text)
        else:
            write_settings(file, **tables)
        return self.ctr.run(*(command or ("true",)), options=["--runtime-config-path", str(file), *options])

    def refused(
        self,
        *command: str,
        settings: Mapping[str, dict[str, object]] | None = None,
        text: str = "",
        options: tuple[str, ...] = (),
    ) -> str:
        """Run a container that cannot be; return what ctr says, which the log must say too."""
        done = self.run(*command, settings=settings, text=text, options=options)
        assert (done.returncode, done.stdout) == (1, "")
        _, _, message = done.stderr.partition("failed to create shim task: ")
        assert message.strip(), done.stderr
        cause = re.sub(rf": ({STATUS_WORDS})\n$", "", message).strip()
        logged = self.ctr.containerd.log.read_text(errors="replace")[self._log_start :]
        assert cause in logged.replace("\\", ""), f"not in the log: {cause}"
        return message

    @property
    def _log_start(self) -> int:
        return int((self.directory / "log_start").read_text())


@pytest.fixture
def attempts(ctr: Ctr, tmp_path: Path, leftovers: Leftovers) -> Iterator[Attempts]:
    """Yield a runner of containers that fail; nothing of them may be left."""
    if ctr.runtime != PYMICRO:
        pytest.skip("these are pymicro's messages")
    (tmp_path / "log_start").write_text(str(len(ctr.containerd.log.read_text(errors="replace"))))
    yield Attempts(ctr, tmp_path)
    leftovers.check()


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.every_containerd
def test_a_misspelt_key_is_an_error_that_names_the_nearest(attempts: Attempts) -> None:
    begun = time.monotonic()
    message = attempts.refused(settings={"vm": {"memory_mb": 512}})

    assert "settings.toml" in message
    assert "memory_mb; did you mean memory_mib?" in message
    assert time.monotonic() - begun < seconds(SOON)
    assert not attempts.vm_was_started


@pytest.mark.every_containerd
def test_the_settings_that_the_runtime_options_name_are_used(attempts: Attempts) -> None:
    done = attempts.run("grep", "MemTotal", "/proc/meminfo", settings={"vm": {"memory_mib": 448}})

    assert done.returncode == 0
    assert 400 << 10 < int(done.stdout.split()[1]) < 448 << 10
    assert attempts.vm_was_started


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[vm\n", ["settings.toml", "not valid TOML"]),
        ("[vms]\nmemory_mib = 512\n", ["unknown section [vms]", "did you mean [vm]?"]),
        ("[vm]\nmemory_mib = 64\n", ["vm.memory_mib = 64", "at least 96"]),
        ('[vm]\nmemory_mib = "512"\n', ["vm.memory_mib = '512'", "a whole number"]),
        ('[vm]\naccel = "xen"\n', ["vm.accel = 'xen'", '"kvm"']),
        ("[timeouts]\nhello = 0\n", ["timeouts.hello = 0", "above 0"]),
        ('[annotations]\nallow = ["io.pymicro.memory"]\n', ["did you mean io.pymicro.memory_mib?"]),
    ],
)
def test_settings_that_make_no_sense(attempts: Attempts, text: str, words: list[str]) -> None:
    message = attempts.refused(text=text)

    assert all(word in message for word in words), message


def test_settings_that_do_not_exist(ctr: Ctr, leftovers: Leftovers) -> None:
    done = ctr.run("true", options=["--runtime-config-path", "/no/such/settings.toml"])

    assert done.returncode == 1
    assert "/no/such/settings.toml" in done.stderr
    assert "does not exist" in done.stderr
    leftovers.check()


def test_kvm_where_there_is_none(attempts: Attempts) -> None:
    if {"vmx", "svm"} & set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("this host may have KVM")

    begun = time.monotonic()
    message = attempts.refused(settings={"vm": {"accel": "kvm"}})

    assert time.monotonic() - begun < seconds(SOON)
    assert 'vm.accel = "kvm", but KVM is not usable: the CPU has neither vmx nor svm' in message
    assert 'or set vm.accel = "auto" to emulate' in message
    assert not attempts.vm_was_started


# -- files and programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "target"), [("kernel", "make kernel"), ("image", "make rootfs")])
def test_a_missing_guest_file(attempts: Attempts, key: str, target: str) -> None:
    begun = time.monotonic()
    message = attempts.refused(settings={"paths": {key: "/no/such/file"}})

    assert f"the guest {key} /no/such/file (paths.{key}) is missing" in message
    assert target in message
    assert time.monotonic() - begun < seconds(SOON)
    assert not attempts.vm_was_started


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("qemu", "apt install qemu-system-x86"),
        ("virtiofsd", "paths.virtiofsd"),
        ("vhost_device_vsock", "paths.vhost_device_vsock"),
    ],
)
def test_a_missing_program(attempts: Attempts, key: str, remedy: str) -> None:
    if key == "vhost_device_vsock" and Path("/dev/vhost-vsock").exists():
        pytest.skip("this host needs none")

    message = attempts.refused(settings={"paths": {key: "/no/such/program"}})

    assert "no program /no/such/program" in message
    assert remedy in message
    assert not attempts.vm_was_started


def cut_to(share: float) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        os.truncate(path, int(path.stat().st_size * share))

    return cut


def lose_the_first_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(4096))


@pytest.mark.parametrize("damage", [cut_to(0), cut_to(0.5), lose_the_first_page], ids=["empty", "half", "no-header"])
@pytest.mark.parametrize("key", ["kernel", "image"])
def test_a_damaged_guest_file(
    attempts: Attempts, artefacts: dict[str, str], tmp_path: Path, key: str, damage: Callable[[Path], None]
) -> None:
    original = Path(artefacts[key])
    if not original.with_name("manifest.json").exists():
        pytest.skip("it was given without a manifest")
    damaged = Path(shutil.copy(original, tmp_path))
    shutil.copy(original.with_name("manifest.json"), tmp_path)
    damage(damaged)

    message = attempts.refused(settings={"paths": {key: str(damaged)}, "timeouts": {"hello": 15}})

    assert f"{damaged} is corrupt" in message
    assert "build it anew" in message


def test_a_kernel_that_is_none(attempts: Attempts, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_text("I am no kernel\n" * 1000)

    message = attempts.refused(settings={"paths": {"kernel": str(tmp_path / "vmlinux")}})

    assert "qemu" in message
    assert "vmlinux" in message


def test_a_vsock_program_that_is_none(attempts: Attempts) -> None:
    if Path("/dev/vhost-vsock").exists():
        pytest.skip("this host needs none")

    message = attempts.refused(settings={"paths": {"vhost_device_vsock": "/bin/false"}})

    assert "vhost-device-vsock ended with status 1" in message


def test_a_share_program_that_fails(attempts: Attempts, tmp_path: Path) -> None:
    broken = tmp_path / "virtiofsd"
    broken.write_text("#!/bin/sh\necho something is wrong with my sandbox >&2\nexit 3\n")
    broken.chmod(0o755)

    message = attempts.refused(settings={"paths": {"virtiofsd": str(broken)}})

    assert "virtiofsd ended with status 3" in message
    assert "something is wrong with my sandbox" in message


# -- a guest that does not come up -------------------------------------------------------------------------------------


def test_a_guest_that_says_no_hello(attempts: Attempts) -> None:
    begun = time.monotonic()
    message = attempts.refused(settings={"timeouts": {"hello": 0.2}})

    assert "the guest said no hello in 0.2 s (timeouts.hello)" in message
    assert "the console's last lines: " in message
    assert time.monotonic() - begun < seconds(SOON + 2)


def test_a_guest_that_panics(attempts: Attempts, tmp_path: Path) -> None:
    """An image that holds nothing that could be started: the kernel says so on its console."""
    empty = tmp_path / "image.erofs"
    (tmp_path / "nothing").mkdir()
    if shutil.which("mkfs.erofs") is None:
        pytest.skip("there is no mkfs.erofs")
    make_erofs(empty, tmp_path / "nothing")

    message = attempts.refused(settings={"paths": {"image": str(empty)}})

    assert "Kernel panic" in message


def make_erofs(image: Path, directory: Path) -> None:
    subprocess.run(["mkfs.erofs", "--quiet", image, directory], check=True, capture_output=True)


# -- what a container asks for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("io.pymicro.memory=512", ["unknown annotation io.pymicro.memory", "did you mean io.pymicro.memory_mib?"]),
        ("io.pymicro.nonsense=1", ["unknown annotation io.pymicro.nonsense", "did you mean io.pymicro."]),
        ("io.pymicro.memory_mib=much", ["io.pymicro.memory_mib = 'much'", "a whole number"]),
        ("io.pymicro.memory_mib=32", ["io.pymicro.memory_mib = '32'", "at least 96"]),
        ("io.pymicro.memory_mib=99999999", ["over this host's memory"]),
        ("io.pymicro.vcpus=4096", ["over this host's limit", "vm.max_vcpus"]),
        ("io.pymicro.accel=tcg", ["not allowed on this host", "annotations.allow"]),
    ],
)
def test_an_annotation_that_makes_no_sense(attempts: Attempts, annotation: str, words: list[str]) -> None:
    begun = time.monotonic()
    message = attempts.refused(options=("--annotation", annotation))

    assert all(word in message for word in words), message
    assert time.monotonic() - begun < seconds(SOON)
    assert not attempts.vm_was_started


@pytest.mark.every_containerd
def test_the_hosts_network(attempts: Attempts) -> None:
    message = attempts.refused(options=("--net-host",))

    assert "--net-host" in message
    assert "use a CNI network" in message
    assert not attempts.vm_was_started


def test_a_bind_mount_of_what_is_not_there(attempts: Attempts) -> None:
    message = attempts.refused(options=("--mount", "type=bind,src=/no/such/source,dst=/x,options=rbind:ro"))

    assert "/no/such/source" in message
    assert "No such file or directory" in message


def test_a_mount_of_a_kind_that_a_vm_cannot_have(attempts: Attempts) -> None:
    message = attempts.refused(options=("--mount", "type=ext4,src=/dev/sda1,dst=/x,options=ro"))

    assert "'ext4'" in message
    assert "bind mount" in message
    assert not attempts.vm_was_started


@pytest.mark.every_containerd
@pytest.mark.parametrize(
    ("program", "words"),
    [("/no/such/program", "no such file or directory"), ("no-such-program", "executable file not found in $PATH")],
)
def test_a_program_that_the_image_does_not_have(attempts: Attempts, program: str, words: str) -> None:
    message = attempts.refused(program)

    assert f'exec: "{program}": {words}' in message
    assert len(message.splitlines()) == 1


def test_a_program_that_cannot_be_executed(attempts: Attempts) -> None:
    assert "permission denied" in attempts.refused("/etc/passwd").lower()


def test_a_user_that_the_image_does_not_have(ctr: Ctr, leftovers: Leftovers) -> None:
    done = ctr.run("true", options=["--user", "nobody-knows"])

    assert done.returncode == 1
    assert "nobody-knows" in done.stderr or "no users found" in done.stderr
    leftovers.check()


@pytest.mark.parametrize("scheme", ["binary", "gopher"])
def test_output_that_nobody_can_write(attempts: Attempts, scheme: str) -> None:
    message = attempts.refused(options=("--log-uri", f"{scheme}:///no/such/logger"))

    assert scheme in message


def test_after_all_that_a_container_runs(attempts: Attempts) -> None:
    done = attempts.run("echo", "well")

    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


def test_an_error_is_one_line_of_the_log(attempts: Attempts) -> None:
    attempts.refused(settings={"paths": {"kernel": "/no/such/file"}})

    lines = attempts.ctr.containerd.log_tail(30).splitlines()
    errors = [line for line in lines if "/no/such/file" in line and "failed to delete task" not in line]  # containerd's
    assert errors
    assert all("level=error runtime=pymicro msg=" in line for line in errors)
