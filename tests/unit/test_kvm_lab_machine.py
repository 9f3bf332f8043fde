"""What the KVM lab does without a machine: the modules that it loads, QEMU's words, what it tells of a panic."""

from pathlib import Path

import pytest

from tests.framework.debian import ToolError
from tests.framework.kvmlab import kernel, lab
from tests.framework.kvmlab.machine import Machine, Share, command_line

DEPENDENCIES = """\
kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/fs/netfs/netfs.ko:
kernel/net/9p/9pnet.ko:
kernel/drivers/virtio/virtio.ko:
"""


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    (tmp_path / "modules.dep").write_text(DEPENDENCIES)
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    return tmp_path


def test_a_module_is_loaded_after_those_that_it_needs(modules: Path) -> None:
    order = [Path(path).stem for path in kernel.loading_order(modules, ("9p", "virtio_pci", "virtio_ring"))]

    assert sorted(order) == ["9p", "9pnet", "netfs", "virtio", "virtio_pci", "virtio_ring"]
    assert order.index("virtio") < order.index("virtio_ring") < order.index("virtio_pci")
    assert max(order.index("9pnet"), order.index("netfs")) < order.index("9p")


def test_what_is_built_into_the_kernel_is_not_loaded(modules: Path) -> None:
    assert kernel.loading_order(modules, ("ext4",)) == []


def test_a_module_that_is_missing_is_named(modules: Path) -> None:
    with pytest.raises(ToolError, match="no module overlay"):
        kernel.loading_order(modules, ("9p", "overlay"))


def machine(outputs: dict[int, int]) -> list[str]:
    shares = (Share("host", Path("/"), read_only=True), Share("files", Path("/a,b")))
    return command_line(Machine(Path("/q"), Path("/k"), Path("/i"), Path("/c"), shares, 2, 1024, outputs))


def test_the_hosts_own_files_are_shared_read_only() -> None:
    words = machine({})

    (host,) = (word for word in words if word.startswith("local,id=host,"))
    assert "path=/," in host
    assert host.endswith(",readonly=on")


def test_a_comma_in_a_path_is_no_option() -> None:
    assert any("path=/a,,b," in word for word in machine({}))


def test_a_command_has_two_outputs_and_no_terminal() -> None:
    words = " ".join(machine({1: 7, 2: 9}))

    assert "socket,id=output1,fd=7" in words
    assert "socket,id=output2,fd=9" in words
    assert "stdio" not in words
    assert "stdio" in " ".join(machine({}))


def test_of_a_panic_the_cause_is_told_and_not_the_registers() -> None:
    lines = ["mount: no such device", "Kernel panic - not syncing: Attempted to kill init!", *["RAX: 0"] * 30]

    assert lab.last_said(lines) == lines[:2]
    assert lab.last_said(["a"] * 50) == ["a"] * 10
