"""From protobuf to our data and back: with `service` and `forward` the only place that knows containerd's messages."""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from pymicro.protos import process_pb2, runc_pb2, task_pb2
from pymicro.shim.container import Container
from pymicro.shim.errors import InvalidRequest, Unsupported
from pymicro.shim.process import Process
from pymicro.shim.requests import CreateContainer, Deleted, ExecProcess, Exit, Mount, ProcessInfo, StdioPaths


def timestamp(moment: datetime) -> Timestamp:
    """Return `moment` as protobuf."""
    converted = Timestamp()
    converted.FromDatetime(moment)
    return converted


def pack(message: Message) -> AnyMessage:
    """Return `message` in an Any as containerd's typeurl reads it: the bare name, without Python's host prefix."""
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def create_request(request: task_pb2.CreateTaskRequest) -> CreateContainer:
    """Return a Create request as data. Raises Unsupported for a container that goes on from a checkpoint."""
    if checkpoint := request.checkpoint or request.parent_checkpoint:
        raise Unsupported(f"{request.id!r} cannot go on from the checkpoint {checkpoint!r}: a microVM restores none")
    return CreateContainer(
        id=request.id,
        bundle=request.bundle,
        rootfs=tuple(Mount(m.type, m.source, m.target, tuple(m.options)) for m in request.rootfs),
        stdio=StdioPaths(request.stdin, request.stdout, request.stderr, request.terminal),
    )


def exec_request(request: task_pb2.ExecProcessRequest) -> ExecProcess:
    """Return an Exec request as data. Raises InvalidRequest."""
    return ExecProcess(
        exec_id=request.exec_id,
        stdio=StdioPaths(request.stdin, request.stdout, request.stderr, request.terminal),
        spec=json_value(request.spec, "the process"),
    )


def json_value(message: AnyMessage, what: str) -> dict[str, Any]:
    """Return the JSON object that containerd packs into an Any for types of the runtime spec. Raises InvalidRequest."""
    try:
        value = json.loads(message.value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} ({message.type_url or 'no type'}) is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} ({message.type_url or 'no type'}) is no JSON object")
    return value


def state_response(container: Container, process: Process) -> task_pb2.StateResponse:
    """Return what State answers."""
    response = task_pb2.StateResponse(
        id=process.exec_id or container.id,
        bundle=container.bundle,
        pid=process.pid or (0 if process.exec_id else container.anchor.pid),
        status=container.state(process).name,
        stdin=process.paths.stdin,
        stdout=process.paths.stdout,
        stderr=process.paths.stderr,
        terminal=process.paths.terminal,
        exec_id=process.exec_id,
    )
    if process.exit is not None:
        response.exit_status = process.exit.status
        response.exited_at.CopyFrom(timestamp(process.exit.at))
    return response


def wait_response(exit_: Exit) -> task_pb2.WaitResponse:
    """Return what Wait answers."""
    return task_pb2.WaitResponse(exit_status=exit_.status, exited_at=timestamp(exit_.at))


def delete_response(deleted: Deleted) -> task_pb2.DeleteResponse:
    """Return what Delete answers."""
    response = task_pb2.DeleteResponse(pid=deleted.pid)
    if deleted.exit is not None:
        response.exit_status = deleted.exit.status
        response.exited_at.CopyFrom(timestamp(deleted.exit.at))
    return response


def pids_response(processes: Iterable[ProcessInfo]) -> task_pb2.PidsResponse:
    """Return what Pids answers."""
    response = task_pb2.PidsResponse()
    for process in processes:
        info = process_pb2.ProcessInfo(pid=process.pid)
        if process.exec_id:
            info.info.CopyFrom(pack(runc_pb2.ProcessDetails(exec_id=process.exec_id)))
        response.processes.append(info)
    return response
