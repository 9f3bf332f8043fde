"""Mutated requests on the port of a shim that runs a pod: errors only, nothing held, and the pod goes on."""

import random
import socket
from contextlib import suppress
from itertools import islice

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from pymicro.protos import task_pb2, types_pb2
from pymicro.ttrpc import frame as frames
from pymicro.ttrpc.messages_pb2 import Request

from tests.framework.fuzz import mutated
from tests.framework.pod import Pod
from tests.framework.resources import open_files, pss, threads
from tests.framework.sandbox import SHIM, Sandbox
from tests.framework.taskservice import TaskService
from tests.framework.waiting import until

SEED = 20251125
SHARE, ALL = 200_000, 10_000_000
"""Bytes in the usual run and in the slow one."""
PER_CONNECTION = 20
MEMORY = 4.0
"""MB by which the shim may grow: caches of what it has not done before."""
SPEC = AnyMessage(
    type_url="types.containerd.io/opencontainers/runtime-spec/1/Process", value=b'{"args":["a"],"cwd":"/"}'
)

pytestmark = pytest.mark.usefixtures("only_our_runtime")


def requests(name: str) -> dict[str, Message]:
    """Return a request of every method but Shutdown, about `name`. None of them would harm it."""
    mount = types_pb2.Mount(type="overlay", source="overlay", options=["lowerdir=/nowhere"])
    return {
        "Create": task_pb2.CreateTaskRequest(id="other", bundle="/nowhere", rootfs=[mount], stdout="/nowhere/out"),
        "Start": task_pb2.StartRequest(id=name, exec_id="nobody"),
        "Delete": task_pb2.DeleteRequest(id=name, exec_id="nobody"),
        "Exec": task_pb2.ExecProcessRequest(id="nobody", exec_id="e1", stdin="/nowhere/in", spec=SPEC),
        "Kill": task_pb2.KillRequest(id=name, exec_id="nobody", signal=64),
        "Pause": task_pb2.PauseRequest(id="nobody"),
        "Resume": task_pb2.ResumeRequest(id=name),
        "Update": task_pb2.UpdateTaskRequest(id=name, resources=SPEC),
        "CloseIO": task_pb2.CloseIORequest(id=name, stdin=True),
        "ResizePty": task_pb2.ResizePtyRequest(id=name, width=80, height=24),
        "State": task_pb2.StateRequest(id=name),
        "Pids": task_pb2.PidsRequest(id=name),
        "Wait": task_pb2.WaitRequest(id=name),
        "Stats": task_pb2.StatsRequest(id=name),
        "Connect": task_pb2.ConnectRequest(id=name),
        "Checkpoint": task_pb2.CheckpointTaskRequest(id=name, path="/nowhere"),
    }


def envelopes(task: TaskService) -> list[bytes]:
    """Return the payloads of ttrpc requests: envelope and request in one, so that faults come in both."""
    return [
        Request(service=task.name, method=method, payload=request.SerializeToString()).SerializeToString()
        for method, request in requests(task.container_id).items()
    ]


@pytest.mark.parametrize("total", [SHARE, pytest.param(ALL, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_the_port_of_a_shim(pod: Pod, total: int, capsys: pytest.CaptureFixture[str]) -> None:
    shim = Sandbox(pod.containerd, pod.id).find(SHIM)
    assert shim
    task = TaskService.of(pod.first)
    logged = pod.containerd.log.stat().st_size
    answers = send(task, 20_000, SEED - 1)  # what is imported and cached at first use
    files, memory, count = open_files(shim), pss(shim), threads(shim)

    answers = send(task, total, SEED)

    until(lambda: open_files(shim) == files)
    with capsys.disabled():
        print(f"\n{total} bytes: {answers} answers; the shim's PSS in MB: before {memory:.1f}, after {pss(shim):.1f}")
    assert answers > total / 2_000
    assert pss(shim) < memory + MEMORY
    assert threads(shim) <= count
    assert "Traceback" not in pod.containerd.log.read_text(errors="replace")[logged:]
    assert pod.first.exec("echo", "well").stdout == "well\n"


def send(task: TaskService, total: int, seed: int) -> int:
    """Send mutated requests, some on each of many connections, and return how many bytes long the answers were."""
    source = random.Random(seed)
    messages = mutated(envelopes(task), total, seed)
    received = 0
    while batch := list(islice(messages, PER_CONNECTION)):
        stream = b"".join(
            broken(frames.encode(2 * number + 1, frames.REQUEST, 0, payload), source)
            for number, payload in enumerate(batch)
        )
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(task.address.removeprefix("unix://"))
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(stream)
                connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(65536):
                    received += len(data)
    return received


def broken(frame: bytes, source: random.Random) -> bytes:
    """Return the frame, now and then with a fault in its header: length, stream, type or flags."""
    if source.randrange(16):
        return frame
    place = source.randrange(10)
    return frame[:place] + source.randbytes(1) + frame[place + 1 :]
