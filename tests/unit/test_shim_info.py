"""`-v` and `-info`: what containerd and people are told, and that it is true of what the shim does with a spec."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from pymicro.protos import runtimeoptions_pb2, types_pb2
from pymicro.shim import guestspec
from pymicro.shim.errors import Unsupported
from pymicro.shim.features import FEATURES


def shim(flag: str, stdin: bytes = b"", settings: str = "/dev/null") -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-m", "pymicro.shim", flag]
    return subprocess.run(words, input=stdin, capture_output=True, env={"PYMICRO_CONFIG": settings}, check=False)


def info(stdin: bytes = b"", settings: str = "/dev/null") -> types_pb2.RuntimeInfo:
    result = shim("-info", stdin, settings)
    assert (result.returncode, result.stderr) == (0, b"")
    return types_pb2.RuntimeInfo.FromString(result.stdout)


def packed(options: runtimeoptions_pb2.Options) -> AnyMessage:
    return AnyMessage(type_url="runtimeoptions.v1.Options", value=options.SerializeToString())


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Settings whose kernel and image lie beside their manifests."""
    for name, said in (("vmlinux", {"release": "6.12.117-pymicro"}), ("image.erofs", {"crun": "1.21-1"})):
        (tmp_path / name).write_text("")
        manifest = {"file": name, "sha256": "0", **said}
        (tmp_path / f"{name}.json").write_text(json.dumps(manifest))
    file = tmp_path / "settings"
    file.write_text(f'[paths]\nkernel = "{tmp_path}/vmlinux"\nimage = "{tmp_path}/image.erofs"\n')
    return file


GUEST = {"io.pymicro.guest.kernel": "6.12.117-pymicro", "io.pymicro.guest.crun": "1.21-1"}


def test_version_is_for_people() -> None:
    assert re.search(rb"Version: \d+\.\d+", shim("-v").stdout)


def test_info_is_for_containerd() -> None:
    said = info()
    assert said.name == "io.containerd.pymicro.v1"
    assert re.match(r"\d+\.\d+", said.version.version)
    assert said.features.type_url == "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    assert json.loads(said.features.value) == FEATURES
    assert not said.HasField("options")


def test_options_come_back_as_they_went() -> None:
    sent = packed(runtimeoptions_pb2.Options(type_url="io.pymicro.v1.options", config_body=b"x"))
    assert info(sent.SerializeToString()).options == sent


def test_options_that_make_no_sense() -> None:
    result = shim("-info", b"\x0a\xff")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.startswith(b"pymicro: the stdin of -info (2 bytes) is no Any of runtime options")


def test_the_guest_of_the_settings_is_named(settings: Path) -> None:
    assert dict(info(settings=str(settings)).annotations) == GUEST


def test_the_guest_of_the_options_settings_is_named(settings: Path) -> None:
    sent = packed(runtimeoptions_pb2.Options(config_path=str(settings)))
    assert dict(info(sent.SerializeToString()).annotations) == GUEST


@pytest.mark.parametrize("content", ["", "[vm", '[paths]\nkernel = "/no/such"'])
def test_settings_that_make_no_sense_spoil_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings").write_text(content)
    assert info(settings=str(tmp_path / "settings")).name == "io.containerd.pymicro.v1"


def test_a_host_without_settings_gets_an_answer(tmp_path: Path) -> None:
    assert json.loads(info(settings=str(tmp_path / "absent")).features.value) == FEATURES


# --- the features are what becomes of a spec

KINDS = ("pid", "ipc", "uts", "mount", "network")


def translated(**changes: Any) -> guestspec.GuestPlan:  # JSON of a spec
    linux = {"namespaces": [{"type": kind} for kind in KINDS], **changes.pop("linux", {})}
    spec = {"ociVersion": "1.1.0", "root": {"path": "r"}, "process": {"args": ["sh"]}, "linux": linux, **changes}
    return guestspec.build(spec, "c1")


@pytest.mark.parametrize("version", [FEATURES["ociVersionMin"], FEATURES["ociVersionMax"]])
def test_versions_of_the_spec(version: str) -> None:
    translated(ociVersion=version)


@pytest.mark.parametrize("kind", FEATURES["linux"]["namespaces"])
def test_namespaces_reach_the_guest(kind: str) -> None:
    namespaces = [{"type": each} for each in {*KINDS, kind}]
    plan = translated(linux={"namespaces": namespaces})
    assert kind in {namespace["type"] for namespace in plan.spec["linux"]["namespaces"]}


@pytest.mark.parametrize("option", FEATURES["mountOptions"])
def test_mount_options_reach_the_guest(option: str) -> None:
    mount = {"destination": "/x", "type": "bind", "source": "/host", "options": ["rbind", option]}
    assert option in translated(mounts=[mount]).spec["mounts"][0]["options"]


@pytest.mark.parametrize("option", ["shared", "rshared", "slave", "rslave"])
def test_mount_options_that_are_not_claimed_do_not(option: str) -> None:
    assert option not in FEATURES["mountOptions"]
    mount = {"destination": "/x", "type": "bind", "source": "/host", "options": ["rbind", option]}
    assert option not in translated(mounts=[mount]).spec["mounts"][0]["options"]


@pytest.mark.parametrize("kind", FEATURES["hooks"])
def test_hooks_are_run_somewhere(kind: str) -> None:
    plan = translated(hooks={kind: [{"path": "/bin/true"}]})
    assert "hooks" in plan.spec or plan.hooks != guestspec.HostHooks()


def test_what_is_not_claimed_is_refused_or_left_out() -> None:
    linux = FEATURES["linux"]
    for name in ("apparmor", "selinux", "intelRdt", "netDevices"):
        assert linux[name] == {"enabled": False}
    assert linux["mountExtensions"]["idmap"]["enabled"] is False
    assert "SCMP_ACT_NOTIFY" not in linux["seccomp"]["actions"]
    with pytest.raises(Unsupported):
        translated(linux={"netDevices": {"eth0": {}}})
    with pytest.raises(Unsupported):
        translated(linux={"seccomp": {"listenerPath": "/x"}})
    process = {"args": ["sh"], "apparmorProfile": "x", "selinuxLabel": "y"}
    plan = translated(process=process, linux={"intelRdt": {}, "mountLabel": "z"})
    assert plan.spec["process"] == {"args": ["sh"]}
    assert not {"intelRdt", "mountLabel"} & plan.spec["linux"].keys()


def test_every_capability_is_named_once() -> None:
    capabilities = FEATURES["linux"]["capabilities"]
    assert len(capabilities) == len(set(capabilities)) == 41, "CAP_LAST_CAP of the guest's kernel is 40"
