"""What containerd of every version writes to `start`'s stdin: as protobuf's own library encodes it, and broken."""

from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from pymicro.protos import bootstrap_pb2, runc_pb2, runtimeoptions_pb2
from pymicro.shim import bootstrap, protowire
from pymicro.shim.bootstrap import Bootstrap

OWN = "runtimeoptions.v1.Options"


def options(type_url: str, message: Message | None = None) -> AnyMessage:
    return AnyMessage(type_url=type_url, value=message.SerializeToString() if message else b"")


def params(**changes: Any) -> bootstrap_pb2.BootstrapParams:  # of the fields' types
    known: dict[str, Any] = {
        "instance_id": "c1",
        "namespace": "ns",
        "containerd_version": "v2.3.1",
        "containerd_ttrpc_address": "unix:///run/containerd/containerd.sock.ttrpc",
        "containerd_grpc_address": "/run/containerd/containerd.sock",
        "containerd_binary": "/usr/bin/containerd",
    }
    return bootstrap_pb2.BootstrapParams(**{**known, **changes})


def parsed(message: Message | bytes) -> Bootstrap:
    stdin = message if isinstance(message, bytes) else message.SerializeToString()
    return bootstrap.parse(stdin, "c1", "ns")


def test_params_of_containerd_2_3() -> None:
    said = parsed(params(socket_dir="/run/s"))
    assert said.understood
    assert (said.version, said.socket_dir, said.debug) == ("2.3.1", "/run/s", False)
    assert said.ttrpc_address == "/run/containerd/containerd.sock.ttrpc"
    assert said.grpc_address == "/run/containerd/containerd.sock"
    assert repr(said).startswith("<Bootstrap of containerd 2.3.1 <RuntimeOptions")


@pytest.mark.parametrize(
    ("level", "debug"),
    [("TRACE", True), ("DEBUG", True), ("INFO", False), ("WARN", False), ("ERROR", False), ("PANIC", False)],
)
def test_log_level(level: str, debug: bool) -> None:
    assert parsed(params(log_level=f"LOG_LEVEL_{level}")).debug is debug


@pytest.mark.parametrize("level", [-7, -100])
def test_log_level_that_has_no_name(level: int) -> None:
    """The enum is open: who is told a number without a name is to take the nearest."""
    assert parsed(params(log_level=level)).debug


@pytest.mark.parametrize("changes", [{"instance_id": "c2"}, {"namespace": "other"}, {"instance_id": ""}])
def test_params_of_another_container_are_not_believed(changes: dict[str, object]) -> None:
    said = parsed(params(**changes, socket_dir="/tmp/evil"))
    assert not said.understood
    assert (said.socket_dir, said.ttrpc_address, said.version) == ("", "", "")


def test_options_that_look_like_params() -> None:
    """An Any's type and value have the numbers of BootstrapParams' id and namespace."""
    said = bootstrap.parse(options(OWN, runtimeoptions_pb2.Options(config_path="/x")).SerializeToString(), OWN, "ns")
    assert not said.understood
    assert said.options.config_path == "/x"


@pytest.mark.parametrize("type_url", [OWN, "cri.runtimeoptions.v1.Options", f"types.containerd.io/{OWN}"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in BootstrapParams"])
def test_runtime_options(type_url: str, wrapped: bool) -> None:
    sent = runtimeoptions_pb2.Options(
        type_url="io.pymicro.v1.options", config_path="/etc/pymicro/other.toml", config_body=b"[vm]\nvcpus = 2\n"
    )
    message: Message = options(type_url, sent)
    if wrapped:
        others = [
            bootstrap_pb2.Extension(value=options("containerd.io/nri.v1.PluginConfig")),
            bootstrap_pb2.Extension(),
        ]
        message = params(extensions=[*others, bootstrap_pb2.Extension(value=options(type_url, sent))])
    said = parsed(message)
    assert said.understood is wrapped
    assert (said.options.config_path, said.options.config_body) == ("/etc/pymicro/other.toml", b"[vm]\nvcpus = 2\n")


def test_runcs_options_are_tolerated_and_their_shim_cgroup_is_seen() -> None:
    sent = runc_pb2.Options(binary_name="crun", systemd_cgroup=True, shim_cgroup="/shims", io_uid=7)
    said = parsed(options("containerd.runc.v1.Options", sent))
    assert (said.options.shim_cgroup, said.options.config_path) == ("/shims", "")


@pytest.mark.parametrize(
    "stdin",
    [
        b"",
        options("containerd.runc.v1.CheckpointOptions", runc_pb2.CheckpointOptions(exit=True)).SerializeToString(),
        options("containerd.linux.runc.CreateOptions").SerializeToString(),
        options(OWN).SerializeToString(),
        options(OWN, runtimeoptions_pb2.Options(type_url="x")).SerializeToString(),
    ],
    ids=["nothing", "another message", "of containerd 1.2", "empty", "of others"],
)
def test_what_says_nothing_to_us(stdin: bytes) -> None:
    said = parsed(stdin)
    assert not said.understood
    assert set(map(bool, vars(said.options).values())) == {False}


@pytest.mark.parametrize(
    ("stdin", "why"),
    [
        (b"\xff", "byte 0: a number is cut off"),
        (b"\x0a\x05abc", "byte 0: field 1 has 5 bytes, 3 are left"),
        (b"\x0a\x01c\x12", "byte 4: a number is cut off"),
        (b"\x02\x00", "there is no field 0"),
        (b"\x0b", "field 1 is of the unknown kind 3"),
        (b"\x0d\x00", "field 1 is cut off"),
        (b"\x80" * 11, "a number is longer than 10 bytes"),
        (b'{"instance_id": "c1"}', "field 15 is of the unknown kind 3"),
        (options(OWN).SerializeToString() + b"\x12\x01\xff", "a number is cut off"),
        (b"\x0a\x02\xff\xfe", "can't decode"),
        (b"\x08\x05", "the number 5 stands where a string should"),
        (params().SerializeToString() + b"\x42\x02\x0a\x07", "field 1 has 7 bytes"),
        (params().SerializeToString() + b"\x1a\x01x", "1 bytes stand where a number should"),
    ],
)
def test_bytes_that_make_no_sense(stdin: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=rf"start's stdin \({len(stdin)} bytes\) is neither .*{why}"):
        parsed(stdin)


@given(st.binary(max_size=64))
def test_any_bytes_are_understood_or_refused(stdin: bytes) -> None:
    try:
        parsed(stdin)
    except ValueError as error:
        assert "start's stdin" in str(error)


def test_every_cut_of_params_is_understood_or_refused() -> None:
    whole = params(extensions=[bootstrap_pb2.Extension(value=options(OWN))], log_level=-4).SerializeToString()
    for size in range(len(whole)):
        try:
            parsed(whole[:size])
        except ValueError:
            continue


@given(st.text(max_size=200), st.sampled_from(["ttrpc", "grpc"]))
def test_result_is_what_protobuf_writes(address: str, protocol: str) -> None:
    message = bootstrap_pb2.BootstrapResult(version=3, address=address, protocol=protocol)
    assert bootstrap.result(address, protocol) == message.SerializeToString()


@given(st.integers(0, 2**64 - 1))
def test_numbers(value: int) -> None:
    assert list(protowire.fields(b"\x08" + protowire.varint(value))) == [(1, value)]


def test_unknown_fields_of_every_kind_are_passed_over() -> None:
    unknown = b"\x7d1234" + b"\x7912345678" + b"\x7a\x03abc" + b"\x78\x05"
    assert parsed(params().SerializeToString() + unknown).version == "2.3.1"
