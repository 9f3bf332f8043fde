"""A shim's Task service, called as containerd calls it: for what `ctr` has no command for. runc's shims answer too."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]  # it ships no types
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from pymicro.protos import runc_pb2, task_pb2
from pymicro.ttrpc import Client, StatusError

from tests.framework.ctr import TIMEOUT, Container
from tests.framework.waiting import seconds

ResponseT = TypeVar("ResponseT", bound=Message)

_SPEC = "types.containerd.io/opencontainers/runtime-spec/1"
_PROCESS, _RESOURCES = f"{_SPEC}/Process", f"{_SPEC}/LinuxResources"


@dataclass(frozen=True, slots=True)
class TaskService:
    """The service, where it listens, and the container that is asked about. Each call has its own connection."""

    container_id: str
    address: str
    name: str
    protocol: str

    @classmethod
    def of(cls, container: Container) -> "TaskService":
        """Find it by what containerd wrote into the container's bundle."""
        containerd = container.ctr.containerd
        bundle = containerd.home / "state/io.containerd.runtime.v2.task" / containerd.namespace / container.id
        file = bundle / "bootstrap.json"  # containerd 2 writes this, earlier ones the other
        text = (file if file.exists() else bundle / "address").read_text()
        said = json.loads(text) if text.startswith("{") else {"address": text}
        name = f"containerd.task.v{said.get('version', 2)}.Task"
        return cls(container.id, said["address"], name, said.get("protocol", "ttrpc"))

    def call(self, method: str, request: Message, response: type[ResponseT], timeout: float = TIMEOUT) -> ResponseT:
        """Call a method. Raises StatusError, OSError."""
        if self.protocol == "grpc":
            return self._call_by_grpc(method, request, response, seconds(timeout))

        async def calling() -> ResponseT:
            async with await Client.connect(self.address) as client:
                return await client.call(self.name, method, request, response, timeout=seconds(timeout))

        return asyncio.run(calling())

    def _call_by_grpc(self, method: str, request: Message, response: type[ResponseT], limit: float) -> ResponseT:
        with grpc.insecure_channel(f"unix:{self.address.removeprefix('unix://')}") as channel:
            to_bytes, to_message = type(request).SerializeToString, response.FromString
            function = channel.unary_unary(f"/{self.name}/{method}", to_bytes, to_message)
            try:
                answer: ResponseT = function(request, timeout=limit)
            except grpc.RpcError as error:
                raise StatusError(error.code().value[0], error.details()) from error
            return answer

    def exec(self, exec_id: str, *command: str, stdout: str = "") -> None:
        """Add a process and start it; its output goes to the FIFO `stdout`, which the caller should open."""
        process = {"args": command, "cwd": "/", "env": ["PATH=/bin"]}
        spec = AnyMessage(type_url=_PROCESS, value=json.dumps(process).encode())
        request = task_pb2.ExecProcessRequest(id=self.container_id, exec_id=exec_id, stdout=stdout, spec=spec)
        self.call("Exec", request, Empty)
        start = task_pb2.StartRequest(id=self.container_id, exec_id=exec_id)
        self.call("Start", start, task_pb2.StartResponse)

    def delete(self, exec_id: str) -> None:
        """Forget a process that has ended or could not start."""
        request = task_pb2.DeleteRequest(id=self.container_id, exec_id=exec_id)
        self.call("Delete", request, task_pb2.DeleteResponse)

    def pids(self) -> dict[int, str]:
        """Return the container's processes: pids, and the exec ids of those that have one."""
        answer = self.call("Pids", task_pb2.PidsRequest(id=self.container_id), task_pb2.PidsResponse)
        return {process.pid: _exec_id(process.info) for process in answer.processes}

    def update(self, resources: dict[str, Any]) -> None:
        """Set limits: an OCI `linux.resources` object, so JSON of any kind."""
        packed = AnyMessage(type_url=_RESOURCES, value=json.dumps(resources).encode())
        self.call("Update", task_pb2.UpdateTaskRequest(id=self.container_id, resources=packed), Empty)

    def state(self, exec_id: str = "") -> task_pb2.StateResponse:
        """Return the state of the first process, or of an exec."""
        return self.call("State", task_pb2.StateRequest(id=self.container_id, exec_id=exec_id), task_pb2.StateResponse)

    def wait(self, exec_id: str = "") -> int:
        """Return the exit status of the first process, or of an exec, once it has ended."""
        request = task_pb2.WaitRequest(id=self.container_id, exec_id=exec_id)
        return self.call("Wait", request, task_pb2.WaitResponse).exit_status


def _exec_id(info: AnyMessage) -> str:
    assert info.type_url in {"", "containerd.runc.v1.ProcessDetails"}
    return runc_pb2.ProcessDetails.FromString(info.value).exec_id
