"""containerd's command line, as its versions write it."""

import os
from pathlib import Path

import pytest
from pymicro.shim.arguments import Arguments

START = [
    "-namespace",
    "k8s.io",
    "-address",
    "/run/containerd/containerd.sock",
    "-publish-binary",
    "/usr/bin/containerd",
    "-id",
    "c1",
    "start",
]


def test_start() -> None:
    arguments = Arguments(START)
    assert (arguments.action, arguments.namespace, arguments.id) == ("start", "k8s.io", "c1")
    assert arguments.address == "/run/containerd/containerd.sock"
    assert not arguments.debug
    assert repr(arguments) == "<Arguments start k8s.io/c1>"


def test_start_with_debug_before_the_action() -> None:
    arguments = Arguments([*START[:-1], "-debug", "start"])
    assert (arguments.action, arguments.debug) == ("start", True)


def test_delete_names_its_bundle() -> None:
    arguments = Arguments([*START[:-1], "-bundle", "/run/containerd/io.containerd.runtime.v2.task/k8s.io/c1", "delete"])
    assert arguments.action == "delete"
    assert arguments.bundle == "/run/containerd/io.containerd.runtime.v2.task/k8s.io/c1"


def test_without_a_bundle_it_is_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Arguments(START).bundle == str(tmp_path) == os.getcwd()


@pytest.mark.parametrize(
    "argv",
    [
        ["--namespace", "n", "--id", "c1", "start"],
        ["-namespace=n", "-id=c1", "start"],
        ["--namespace=n", "--id=c1", "start"],
    ],
    ids=["two dashes", "equals sign", "both"],
)
def test_spellings_of_go(argv: list[str]) -> None:
    arguments = Arguments(argv)
    assert (arguments.namespace, arguments.id, arguments.action) == ("n", "c1", "start")


def test_flags_of_a_newer_containerd_are_skipped_with_their_value() -> None:
    arguments = Arguments(["-sandbox-id", "start", "-new=delete", *START])
    assert (arguments.action, arguments.id) == ("start", "c1")


def test_values_may_look_like_flags_and_be_empty() -> None:
    arguments = Arguments(["-id", "-debug", "-namespace=", "-address", "", "start"])
    assert (arguments.id, arguments.namespace, arguments.address, arguments.action) == ("-debug", "", "", "start")
    assert not arguments.debug


@pytest.mark.parametrize("value", ["true", "1", "t", "TRUE"])
def test_switches_with_a_value(value: str) -> None:
    assert Arguments([f"-debug={value}", "start"]).debug


@pytest.mark.parametrize("value", ["false", "0", "F"])
def test_switches_that_are_off(value: str) -> None:
    assert not Arguments([f"-debug={value}", "start"]).debug


def test_flag_that_lacks_its_value() -> None:
    with pytest.raises(ValueError, match="-id lacks its value"):
        Arguments(["-namespace", "n", "-id"])


def test_information() -> None:
    assert Arguments(["-v"]).version
    assert Arguments(["-info"]).info
    assert Arguments(["--help"]).help
    assert Arguments(["-h"]).help
    assert not Arguments([]).action
