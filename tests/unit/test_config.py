"""Settings: what a file, an annotation or a container's limits come to, and what a mistake is told."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pymicro.shim import config, settings_file
from pymicro.shim.config import Settings, VmSize, load, parse, vm_size, with_annotations
from pymicro.shim.errors import HostMissing, InvalidRequest, InvalidSettings

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "configuration.md"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def big_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 8 CPUs and 16 GiB, and no settings file of its own."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(config, "host_memory_mib", lambda: 16384)
    monkeypatch.delenv(settings_file.ENVIRONMENT, raising=False)


def refused(text: str) -> str:
    with pytest.raises(InvalidSettings) as caught:
        parse(text.encode(), "/etc/x.toml")
    return str(caught.value)


def test_an_empty_file_gives_the_defaults() -> None:
    settings = parse(b"", "x")
    assert settings == Settings()
    assert (settings.vm.memory_mib, settings.vm.accel, settings.timeouts.hello) == (256, "auto", 60)


def test_a_file_changes_what_it_names_and_nothing_else() -> None:
    settings = parse(b"[vm]\nvcpus = 2\n[timeouts]\nhello = 5\n[log]\nlevel = 'debug'\n", "x")
    assert (settings.vm.vcpus, settings.vm.memory_mib) == (2, 256)
    assert (settings.timeouts.hello, settings.timeouts.vmm) == (5.0, 10.0)
    assert settings.log.level == "debug"


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(AttributeError):
        Settings().vm.vcpus = 3  # type: ignore[misc]  # that it is refused is what we test


def test_a_misspelt_key_names_file_and_nearest_key() -> None:
    assert refused("[vm]\nmemory = 512") == "/etc/x.toml: unknown key in [vm]: memory; did you mean memory_mib?"


def test_a_misspelt_section_names_the_nearest_section() -> None:
    assert "unknown section [timeout]; did you mean [timeouts]?" in refused("[timeout]\nvmm = 3")


def test_a_key_like_none_that_is_known_lists_all() -> None:
    assert "known: hypervisor, accel, vcpus, memory_mib, max_vcpus" in refused("[vm]\nzzzzzz = 1")


def test_a_section_that_is_a_value_is_refused() -> None:
    assert "[vm] is a section" in refused("vm = 3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[vm]\nmemory_mib = 64", "vm.memory_mib = 64 is wrong: allowed is a whole number of at least 96 (MiB)"),
        ("[vm]\nmemory_mib = '512'", "vm.memory_mib = '512' is wrong"),
        ("[vm]\nvcpus = 0", "vm.vcpus = 0 is wrong: allowed is a whole number of at least 1"),
        ("[vm]\nvcpus = true", "vm.vcpus = True is wrong"),
        ("[vm]\naccel = 'kmv'", 'vm.accel = \'kmv\' is wrong: allowed is "auto", "kvm" or "tcg"'),
        ("[vm]\nhypervisor = 'xen'", 'vm.hypervisor = \'xen\' is wrong: allowed is "qemu" or "cloud-hypervisor"'),
        ("[timeouts]\nhello = 0", "timeouts.hello = 0 is wrong"),
        ("[timeouts]\nhello = inf", "timeouts.hello = inf is wrong"),
        ("[timeouts]\nhello = nan", "timeouts.hello = nan is wrong"),
        ("[paths]\nkernel = 'vmlinux'", "paths.kernel = 'vmlinux' is wrong: allowed is an absolute path"),
        ("[templates]\nmost_mib = 0", "templates.most_mib = 0 is wrong: allowed is a whole number of at least 1 (MiB)"),
        ("[templates]\nwait = 'no'", "templates.wait = 'no' is wrong: allowed is true or false"),
        ("[log]\nlevel = 'loud'", "log.level = 'loud' is wrong"),
        (
            "[annotations]\nallow = 'io.pymicro.vcpus'",
            "annotations.allow = 'io.pymicro.vcpus' is wrong: allowed is a list",
        ),
        ("[annotations]\nallow = ['io.pymicro.vcpu']", "io.pymicro.vcpu; did you mean io.pymicro.vcpus?"),
        ("[vm", "/etc/x.toml is not valid TOML"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(text: str, expected: str) -> None:
    assert expected in refused(text)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(InvalidSettings, match="not valid TOML"):
        parse(b"\xff\xfe", "x")


# --- which file


def test_without_any_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_file, "DEFAULT", str(tmp_path / "absent.toml"))
    assert load() == Settings()


def test_the_argument_goes_before_the_environment_and_that_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, vcpus in (("argument", 2), ("environment", 3), ("default", 4)):
        (tmp_path / name).write_text(f"[vm]\nvcpus = {vcpus}\n")
    monkeypatch.setattr(settings_file, "DEFAULT", str(tmp_path / "default"))
    assert load().vm.vcpus == 4
    monkeypatch.setenv(settings_file.ENVIRONMENT, str(tmp_path / "environment"))
    assert load().vm.vcpus == 3
    assert load(str(tmp_path / "argument")).vm.vcpus == 2


def test_a_named_file_must_exist_and_the_message_says_who_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "no.toml")
    with pytest.raises(HostMissing, match=r"no\.toml, named by the runtime options' ConfigPath, does not exist"):
        load(missing)
    monkeypatch.setenv(settings_file.ENVIRONMENT, missing)
    with pytest.raises(HostMissing, match="named by the environment variable PYMICRO_CONFIG"):
        load()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostMissing, match=r"cannot read the settings file .*Is a directory"):
        load(str(tmp_path))


# --- annotations


def test_annotations_override_the_settings() -> None:
    annotations = {"io.pymicro.vcpus": "2", "io.pymicro.memory_mib": "512", "io.kubernetes.cri.sandbox-id": "x"}
    settings = with_annotations(Settings(), annotations)
    assert (settings.vm.vcpus, settings.vm.memory_mib) == (2, 512)


def test_without_annotations_of_ours_the_settings_stay() -> None:
    settings = Settings()
    assert with_annotations(settings, {"a": "b"}) is settings


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("io.pymicro.memory", "512", "unknown annotation io.pymicro.memory; did you mean io.pymicro.memory_mib?"),
        ("io.pymicro.accel", "tcg", "not allowed on this host: annotations.allow"),
        (
            "io.pymicro.memory_mib",
            "64",
            "io.pymicro.memory_mib = '64' is wrong: allowed is a whole number of at least 96",
        ),
        ("io.pymicro.vcpus", "two", "io.pymicro.vcpus = 'two' is wrong: allowed is a whole number of at least 1"),
        ("io.pymicro.vcpus", "9", "over this host's limit of 8 (vm.max_vcpus)"),
        ("io.pymicro.memory_mib", "99999", "over this host's memory of 16384 MiB"),
    ],
)
def test_an_annotation_that_makes_no_sense_is_refused(name: str, value: str, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_annotations(Settings(), {name: value})
    assert expected in str(caught.value)


def test_the_owner_of_the_host_decides_which_annotations_count() -> None:
    settings = parse(b"[annotations]\nallow = ['io.pymicro.accel']\n[vm]\nmax_vcpus = 4", "x")
    assert with_annotations(settings, {"io.pymicro.accel": "tcg"}).vm.accel == "tcg"
    with pytest.raises(InvalidRequest, match="not allowed"):
        with_annotations(settings, {"io.pymicro.vcpus": "2"})


# --- the VM's size


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, VmSize(1, 256)),
        ({"memory": None, "cpu": {}}, VmSize(1, 256)),
        ({"memory": {"limit": 64 * MIB}}, VmSize(1, 256)),  # the settings are the least
        ({"memory": {"limit": 512 * MIB}}, VmSize(1, 640)),
        ({"memory": {"limit": 512 * MIB + 1}}, VmSize(1, 704)),  # 513 + 128, up to a multiple of 64
        ({"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100000}}, VmSize(1, 256)),
        ({"memory": {"limit": 1 << 62}}, VmSize(1, 16384)),  # more than the host has: no limit at all
        ({"cpu": {"quota": 150000, "period": 100000}}, VmSize(2, 256)),
        ({"cpu": {"quota": 50000}}, VmSize(1, 256)),
        ({"cpu": {"quota": 6400000, "period": 100000}}, VmSize(8, 256)),  # the host has 8
    ],
)
def test_the_size_follows_the_containers_limits(resources: dict[str, Any], expected: VmSize) -> None:
    assert vm_size(Settings(), resources) == expected


def test_the_pods_sums_count_as_the_containers_own_limits() -> None:
    annotations = {
        "io.kubernetes.cri.sandbox-memory": str(1024 * MIB),
        "io.kubernetes.cri.sandbox-cpu-quota": "250000",
        "io.kubernetes.cri.sandbox-cpu-period": "100000",
    }
    assert vm_size(Settings(), {"memory": {"limit": 16 * MIB}}, annotations) == VmSize(3, 1152)


def test_a_pod_without_limits_gets_the_settings() -> None:
    annotations = {"io.kubernetes.cri.sandbox-memory": "0", "io.kubernetes.cri.sandbox-cpu-quota": "0"}
    assert vm_size(Settings(), {}, annotations) == VmSize(1, 256)


def test_max_vcpus_bounds_what_limits_ask_for() -> None:
    settings = parse(b"[vm]\nmax_vcpus = 2", "x")
    assert vm_size(settings, {"cpu": {"quota": 800000, "period": 100000}}).vcpus == 2


# --- promises about the module


def test_every_key_is_documented() -> None:
    text = DOCUMENTATION.read_text()
    for section in msgspec.structs.fields(Settings):
        assert f"## `[{section.name}]`" in text
        for field in msgspec.structs.fields(section.type):
            assert f"`{section.name}.{field.name}`" in text, f"{section.name}.{field.name} is not documented"


def test_every_annotation_is_documented() -> None:
    text = DOCUMENTATION.read_text()
    assert [name for name in config.ANNOTATIONS if f"`{name}`" not in text] == []


def test_the_documented_example_is_the_defaults() -> None:
    example = DOCUMENTATION.read_text().split("```toml\n")[1].split("```")[0]
    assert parse(example.encode(), "docs/configuration.md") == Settings()
    for section in msgspec.structs.fields(Settings):
        assert all(f"\n{field.name} = " in example for field in msgspec.structs.fields(section.type))


def test_reading_settings_imports_little() -> None:
    """It runs while the VM's start waits for it."""
    code = "import sys; from pymicro.shim.config import load; load('/dev/null'); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"asyncio", "json", "difflib", "dataclasses", "google.protobuf"} & set(run.stdout.split())


# --- settings in the runtime options


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "settings"
    path.write_text("[vm]\nvcpus = 2\nmemory_mib = 512\n[log]\nlevel = 'debug'\n")
    return str(path)


def test_the_options_body_changes_what_the_file_says(file: str) -> None:
    settings = load(file, b"[vm]\nmemory_mib = 1024\n[timeouts]\nhello = 3\n")
    assert (settings.vm.vcpus, settings.vm.memory_mib) == (2, 1024)
    assert (settings.timeouts.hello, settings.log.level) == (3.0, "debug")


def test_the_options_own_keys_are_no_settings(file: str) -> None:
    """CRI sends its whole section as the body where that names no file."""
    assert load(file, b'TypeUrl = "io.pymicro.v1.options"\nConfigPath = ""\n') == load(file)


def test_a_mistake_in_the_options_body_is_told_where_it_is(file: str) -> None:
    with pytest.raises(InvalidSettings, match="ConfigBody: unknown key in \\[vm\\]: memory;"):
        load(file, b"[vm]\nmemory = 1\n")
    with pytest.raises(InvalidSettings, match="the runtime options' ConfigBody is not valid TOML"):
        load(file, b"\xff")
