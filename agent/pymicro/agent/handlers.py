"""The methods of the wire protocol, one function each: check the parameters, find the container, let it act."""

import time
from _socket import sethostname
from _struct import pack
from fcntl import ioctl

from pymicro.agent import mounts
from pymicro.agent.container import Container
from pymicro.agent.errors import AlreadyExists, Invalid, NotFound, WrongState
from pymicro.agent.memory import Watcher
from pymicro.wire.messages import SHARE_TAG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pymicro.agent.control import Control
    from pymicro.agent.devices import Ports
    from pymicro.agent.process import Process
    from pymicro.agent.reaper import Reaper

    Params = dict[str, Any]
    Result = dict[str, Any]
    Answer = Result | tuple[Result, Callable[[], None]]  # and what to do when it has been sent
    Handler = Callable[["Agent", Params], Answer | Callable[[], Answer]]  # what is left to do in a thread, if callable

RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
SHARE_LIMIT = 10.0
"""Seconds until a share that the guest has not found is an error."""


class Agent:
    """What the handlers share."""

    def __init__(self, control: "Control", reaper: "Reaper", ports: "Ports") -> None:
        self.control = control
        self.reaper = reaper
        self.ports = ports
        self.memory = Watcher()
        self.containers: dict[str, Container] = {}

    def find(self, params: "Params") -> Container:
        """Return the container that the parameters name. Raises NotFound."""
        container = self.containers.get(params["container"])
        if container is None:
            raise NotFound(f"no container {params['container']}")
        return container


def setup(agent: Agent, params: "Params") -> "Result":
    """Make this VM unlike any other and mount the share: before anything of the pod runs."""
    add_entropy(bytes.fromhex(params["entropy"]))
    sethostname(params["hostname"])
    mounts.bind_machine_id(params["machine_id"])
    deadline = time.monotonic() + SHARE_LIMIT
    while not mounts.mount_share():
        if time.monotonic() > deadline:
            raise NotFound(f"no virtio-fs device with the tag {SHARE_TAG!r} appeared in {SHARE_LIMIT:g} s")
        agent.ports.look_again()
    return {}


def add_entropy(seed: bytes) -> None:
    """Credit the seed to the kernel's random pool and have its generators reseeded at once. Raises OSError."""
    with open("/dev/urandom", "wb", buffering=0) as device:
        # struct rand_pool_info: the credit in bits, the size in bytes, the bytes
        ioctl(device.fileno(), RNDADDENTROPY, pack("ii", len(seed) * 8, len(seed)) + seed)
        ioctl(device.fileno(), RNDRESEEDCRNG)


def create(agent: Agent, params: "Params") -> "Callable[[], Answer]":
    """Take a container in, so that every later request finds it; return what creates it."""
    name = checked_id(params["container"])
    if name in agent.containers:
        raise AlreadyExists(f"container {name} exists already")
    container = Container(agent.control, agent.reaper, agent.memory, name, params["spec"])
    container.init.gate.acquire()
    agent.containers[name] = container
    return lambda: create_taken(agent, container, params)


def create_taken(agent: Agent, container: Container, params: "Params") -> "Answer":
    """Create a container. Its exit, however early, is reported after the reply."""
    try:
        container.create(params["streams"], params["terminal"])
    except BaseException:
        del agent.containers[container.id]
        container.init.gate.release()
        raise
    return {"pid": container.init.pid}, container.init.gate.release


def start(agent: Agent, params: "Params") -> "Answer":
    """Start a created container. Its exit, however early, is reported after the reply."""
    container = agent.find(params)
    container.init.gate.acquire()
    try:
        container.start()
    except BaseException:
        container.init.gate.release()
        raise
    return {}, container.init.gate.release


def start_exec(agent: Agent, params: "Params") -> "Callable[[], Answer]":
    """Take a further process in, so that every later request finds it; return what starts it."""
    container = agent.find(params)
    if container.init.exited:
        raise WrongState("the container's init has exited")
    process = container.add_exec(checked_id(params["exec"]))
    process.gate.acquire()
    return lambda: start_taken(container, process, params)


def start_taken(container: Container, process: "Process", params: "Params") -> "Answer":
    """Start a further process. Its exit, however early, is reported after the reply."""
    try:
        container.start_exec(process, params["process"], params["streams"], params["terminal"])
    except BaseException:
        process.gate.release()
        raise
    return {"pid": process.pid}, process.gate.release


def signal(agent: Agent, params: "Params") -> "Result":
    container = agent.find(params)
    if params.get("all"):
        container.signal_all(params["signal"])
    else:
        container.find(params.get("exec")).send_signal(params["signal"])
    return {}


def close_stdin(agent: Agent, params: "Params") -> "Result":
    agent.find(params).find(params.get("exec")).finish_stdin(params["bytes"])
    return {}


def resize(agent: Agent, params: "Params") -> "Result":
    agent.find(params).find(params.get("exec")).resize(params["width"], params["height"])
    return {}


def pause(agent: Agent, params: "Params") -> "Result":
    agent.find(params).pause()
    return {}


def resume(agent: Agent, params: "Params") -> "Result":
    agent.find(params).resume()
    return {}


def update(agent: Agent, params: "Params") -> "Result":
    agent.find(params).update(params["resources"])
    return {}


def pids(agent: Agent, params: "Params") -> "Result":
    container = agent.find(params)
    running = {
        name: process.pid for name, process in list(container.execs.items()) if process.pid and not process.exited
    }
    return {"pids": container.pids(), "init": container.init.pid, "execs": running}


def stats(agent: Agent, params: "Params") -> "Result":
    return {"files": agent.find(params).stats()}


def delete(agent: Agent, params: "Params") -> "Result":
    """Remove an exec that has exited or is to be killed, or a container with all that still runs in it."""
    with agent.find(params).init.gate:  # a create that is given up on the host ends first
        pass
    container = agent.find(params)
    exec_id = params.get("exec")
    if exec_id is None:
        try:
            container.delete()
        finally:
            agent.containers.pop(container.id, None)
        return {}
    process = container.find(exec_id)
    if params.get("kill"):
        container.end_exec(process)
        return {}
    if not process.exited:
        raise WrongState(f"exec {exec_id} of container {container.id} is still running")
    container.forget_exec(process)
    return {}


def release(_: Agent, params: "Params") -> "Result":
    """Let the host unmount a root filesystem of the share."""
    mounts.release(params["path"])
    return {}


def checked_id(name: str) -> str:
    """Return an id that is safe as a file name. Raises Invalid."""
    if not name or "/" in name or name in {".", ".."}:
        raise Invalid(f"{name!r} is no usable id")
    return name


METHODS: "dict[str, Handler]" = {
    "setup": setup,
    "create": create,
    "start": start,
    "exec": start_exec,
    "signal": signal,
    "close_stdin": close_stdin,
    "resize": resize,
    "pause": pause,
    "resume": resume,
    "update": update,
    "pids": pids,
    "stats": stats,
    "delete": delete,
    "release": release,
}
INLINE = frozenset({"create", "exec", "signal", "close_stdin", "resize"})
"""Methods that never wait: run at once, in the order in which they came. The others get a thread each."""


def find(method: object) -> "Handler":
    """Return the function that answers a method. Raises Invalid."""
    handler = METHODS.get(method) if isinstance(method, str) else None
    if handler is None:
        raise Invalid(f"no method {method!r}")
    return handler
