"""`setup` makes a VM unlike its template: the calls into the guest's kernel, in their order, without a VM."""

import struct
from typing import Any

import pytest
from pymicro.agent import files, handlers, mounts, syscalls
from pymicro.agent.devices import Ports

ADD_ENTROPY, RESEED = 0x40085203, 0x5207  # linux/random.h
SEED = bytes(range(64))
PARAMS = {"entropy": SEED.hex(), "hostname": "pod", "machine_id": "0" * 32}


class Agent:
    ports = Ports()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `setup` does to the VM, instead of doing it."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(handlers, "ioctl", lambda _fd, number, argument=b"": made.append(("ioctl", number, argument)))
    monkeypatch.setattr(handlers, "sethostname", lambda name: made.append(("hostname", name)))
    monkeypatch.setattr(mounts, "bind_machine_id", lambda name: made.append(("machine-id", name)))

    def mount_share() -> bool:
        made.append(("share",))
        return True

    monkeypatch.setattr(mounts, "mount_share", mount_share)
    return made


def test_fresh_entropy_is_credited_and_the_generators_reseeded_before_all_else(calls: list[tuple[Any, ...]]) -> None:
    handlers.setup(Agent(), PARAMS)  # type: ignore[arg-type]  # as much of an agent as setup needs
    (_, first, pool), (_, second, _), *others = calls
    assert (first, second) == (ADD_ENTROPY, RESEED)
    bits, size = struct.unpack_from("ii", pool)
    assert (bits, size, pool[8:]) == (512, 64, SEED)
    assert [call[0] for call in others] == ["hostname", "machine-id", "share"]


def test_a_share_that_is_not_there_yet_is_looked_for_again(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter((False, False, True))
    monkeypatch.setattr(mounts, "mount_share", lambda: next(found))
    monkeypatch.setattr(Agent.ports, "look_again", lambda: calls.append(("scan",)))
    handlers.setup(Agent(), PARAMS)  # type: ignore[arg-type]  # as above
    assert calls.count(("scan",)) == 2


def test_release_unmounts_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(syscalls, "unmount", lambda path: made.append(("unmount", path)))
    monkeypatch.setattr(files, "write_text", lambda path, text: made.append((path, text)))
    handlers.release(Agent(), {"path": "/run/share/1-c/rootfs"})  # type: ignore[arg-type]  # as above
    assert made == [("unmount", "/run/share/1-c/rootfs"), ("/proc/sys/vm/drop_caches", "2")]


def test_release_of_what_the_guest_never_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_none(path: str) -> None:
        raise OSError(22, "Invalid argument", path)

    monkeypatch.setattr(syscalls, "unmount", is_none)
    monkeypatch.setattr(files, "write_text", lambda *_: None)
    handlers.release(Agent(), {"path": "/run/share/1-c/rootfs"})  # type: ignore[arg-type]  # as above
