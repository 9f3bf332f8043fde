"""`shim.protocol = "grpc"`: with containerd 1.7 the shim speaks gRPC, with every other one ttrpc, and pods live."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.ctr import Container, Ctr
from tests.framework.leftovers import Leftovers
from tests.framework.sandbox import Sandbox, eventually
from tests.framework.waiting import seconds

pytestmark = pytest.mark.usefixtures("only_our_runtime")


@pytest.fixture
def asked_for(ctr: Ctr) -> Iterator[None]:
    """Have the settings ask for gRPC."""
    ctr.containerd.write_settings(shim={"protocol": "grpc"})
    yield
    ctr.containerd.write_settings()


def spoken(container: Container) -> str:
    """Return the protocol that the container's bundle names."""
    containerd = container.ctr.containerd
    bundle = containerd.home / "state/io.containerd.runtime.v2.task" / containerd.namespace / container.id
    address = (bundle / "address").read_text()
    return str(json.loads(address)["protocol"]) if address.startswith("{") else "ttrpc"


@pytest.mark.every_containerd
@pytest.mark.usefixtures("asked_for")
def test_what_works_with_this_containerd_is_spoken(ctr: Ctr, leftovers: Leftovers) -> None:
    container = ctr.start("sleep", "100000")

    only = ctr.containerd.version == "1.7"
    assert spoken(container) == ("grpc" if only else "ttrpc")
    said = f'shim.protocol = \\"grpc\\" is for containerd 1.7: containerd {ctr.containerd.version}'
    assert (said in ctr.containerd.log.read_text()) is not only
    time.sleep(seconds(1.5))
    assert container.status == "RUNNING", "a containerd that takes its client for closed frees the pod at once"
    assert container.exec("echo", "well").stdout == "well\n"
    container.kill()
    assert container.wait() == 137
    container.remove()
    leftovers.check()


def grpc_is_loaded(container: Container) -> bool:
    shim = Sandbox(container.ctr.containerd, container.id).find("shim")
    return "/grpc/_cython/" in Path(f"/proc/{shim}/maps").read_text()


@pytest.mark.every_containerd
def test_grpcs_library_is_loaded_by_who_speaks_it(ctr: Ctr) -> None:
    container = ctr.start("sleep", "100000")

    assert grpc_is_loaded(container) is (ctr.containerd.protocol == "grpc")


@pytest.mark.every_containerd
def test_a_pods_containers_share_the_shim_and_what_it_speaks(ctr: Ctr, leftovers: Leftovers) -> None:
    first = ctr.start("sleep", "100000")
    ctr.containerd.write_settings(shim={"protocol": "ttrpc"})
    try:
        second = ctr.start("sleep", "100000", options=["--annotation", f"io.containerd.runc.v2.group={first.id}"])
    finally:
        ctr.containerd.write_settings()

    assert spoken(first) == spoken(second) == ctr.containerd.protocol
    assert [each.exec("echo", "well").stdout for each in (first, second)] == ["well\n", "well\n"]
    for container in (second, first):
        container.remove()
    leftovers.check()


@pytest.mark.every_containerd
def test_a_shim_that_is_killed_is_noticed(ctr: Ctr, leftovers: Leftovers) -> None:
    container = ctr.start("sleep", "100000")

    Sandbox(ctr.containerd, container.id).kill("shim")

    eventually(lambda: container.status == "GONE", "containerd has noticed", 5)
    container.remove()
    leftovers.check()
