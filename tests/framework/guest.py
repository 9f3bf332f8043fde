"""A microVM with the real kernel and image but without the shim: tests speak the wire protocol to its agent directly.

The host's side is synchronous and small on purpose, so that a failure is the agent's and not the test's.
"""

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pymicro.wire import frames, messages

from tests.framework.tools import tool

REPOSITORY = Path(__file__).resolve().parents[2]
BUSYBOX = Path("/bin/busybox")
CID = 1234
BOOT_TIMEOUT = 60.0
CALL_TIMEOUT = 30.0
MEMORY_MIB = 256
MACHINE = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,accel=tcg,memory-backend=mem,pcie=on,acpi=on"
KERNEL_ARGUMENTS = (
    "root=/dev/vda rootfstype=erofs ro console=ttyS0 reboot=t panic=-1 quiet "
    "tsc_early_khz=2600000 lpj=5000000 no_timer_check"
)
Message = dict[str, Any]


class AgentError(Exception):
    """The agent's error reply."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


def artefact(builder: str, variable: str) -> Path:
    """Return the file that an environment variable names, or else what a builder of this repository makes."""
    chosen = os.environ.get(variable)
    if chosen:
        return Path(chosen)
    command = ["/usr/bin/python3", str(REPOSITORY / builder), "--print-path"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    directory = Path(output.splitlines()[-1])
    return directory / str(json.loads((directory / "manifest.json").read_text())["file"])


class Connection:
    """One connection from the guest, after its hello."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._lock = threading.Lock()
        self.hello = self.receive()

    def receive(self) -> Message:
        """Return the next frame's message. Raises EOFError."""
        return frames.decode(self.exactly(frames.payload_size(self.exactly(frames.PREFIX_SIZE))))

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError(f"the guest closed the connection after {len(data)} of {size} bytes")
            data += part
        return data

    def send(self, message: Message) -> None:
        with self._lock:
            self.socket.sendall(frames.encode(message))


class Monitor:
    """QEMU's QMP, as far as it takes to attach devices."""

    def __init__(self, path: Path) -> None:
        self._socket = connect(path)
        self._lines = self._socket.makefile("rw")
        self._lines.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        self._lines.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._lines.flush()
        while True:
            reply = json.loads(self._lines.readline())
            if "error" in reply:
                raise RuntimeError(f"{name}: {reply['error']}")
            if "return" in reply:
                return reply["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + BOOT_TIMEOUT
    sock = socket.socket(socket.AF_UNIX)
    while True:
        try:
            sock.connect(str(path))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        else:
            return sock


class Guest:
    """A running VM. `call` sends a request, `event` waits for an event, `run` starts a whole container."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.share = directory / "share"
        self.share.mkdir(parents=True)
        self.console = directory / "console.log"
        self.machine_id = os.urandom(16).hex()
        """What `setup` tells the guest to be its own."""
        self._stack = ExitStack()
        self._streams: dict[str, Connection] = {}
        self._events: list[Message] = []
        self._replies: dict[int, Message] = {}
        self._changed = threading.Condition()
        self._control: Connection | None = None
        self._ended = False
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
        self.close_streams()
        if self._control:
            self._control.socket.close()
        if error and self.console.exists():
            print(self.console.read_text(errors="replace")[-4000:], file=sys.stderr)

    # Booting

    def boot(self, attach: bool = True) -> None:
        """Start QEMU and its helpers; without `attach` the devices come with a later call of `attach`."""
        kernel = artefact("kernel-config/build.py", "PYMICRO_TEST_KERNEL")
        image = artefact("rootfs-builder/build.py", "PYMICRO_TEST_IMAGE")
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(self.directory / f"vsock_{CID}"))
        listener.listen()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        vm_sockets = f"guest-cid={CID},socket=vhost.sock,uds-path=vsock"
        self._spawn([tool("vhost-device-vsock") / "vhost-device-vsock", "--vm", vm_sockets])
        self._spawn(
            [
                tool("virtiofsd") / "virtiofsd",
                "--socket-path=fs.sock",
                f"--shared-dir={self.share}",
                "--sandbox=chroot",
                "--announce-submounts",
                "--xattr",
            ]
        )
        port = "pcie-root-port,id=rp{0},chassis={1},slot={1},bus=pcie.0,power_controller_present=off"
        ports = [port.format(i, i + 1) for i in range(4)]
        init = "init=/usr/bin/python3 -- -I -S -E -B /usr/lib/pymicro/init.pyc"
        self.qemu = self._spawn(
            ["qemu-system-x86_64", "-M", MACHINE, "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB), "-nodefaults"]
            + ["-no-user-config", "-display", "none", "-no-reboot", "-global", "virtio-mmio.force-legacy=false"]
            + ["-serial", f"file:{self.console}", "-qmp", "unix:qmp,server=on,wait=off"]
            + ["-object", f"memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on"]
            + [
                "-drive",
                f"if=none,id=root,file={image},format=raw,readonly=on",
                "-device",
                "virtio-blk-device,drive=root",
            ]
            + [word for port in ports for word in ("-device", port)]
            + ["-kernel", str(kernel), "-append", f"{KERNEL_ARGUMENTS} {init}"]
            + (["-S"] if attach else [])
        )
        self.monitor = Monitor(self.directory / "qmp")
        self._stack.callback(self.monitor.close)
        if attach:
            self.attach()
            self.monitor.command("cont")

    def attach(self) -> None:
        """Plug in the vsock and the share, as the shim does."""
        self._plug("vhost.sock", "vsock", "vhost-user-vsock-pci", bus="rp0")
        self._plug("fs.sock", "fs", "vhost-user-fs-pci", bus="rp1", tag=messages.SHARE_TAG)

    def wait_for_console(self, text: str) -> None:
        """Wait until the guest has written the text to its console. Raises TimeoutError."""
        deadline = time.monotonic() + BOOT_TIMEOUT
        while not self.console.exists() or text not in self.console.read_text(errors="replace"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the console does not say {text!r}:\n{self.console.read_text()[-2000:]}")
            time.sleep(0.01)

    def _plug(self, path: str, name: str, driver: str, **options: str) -> None:
        address = {"addr": {"type": "unix", "data": {"path": path}}, "server": False}
        self.monitor.command("chardev-add", id=name, backend={"type": "socket", "data": address})
        self.monitor.command("device_add", driver=driver, id=f"{name}0", chardev=name, **options)

    def _spawn(self, argv: Sequence[str | Path]) -> "subprocess.Popen[bytes]":
        log = self._stack.enter_context((self.directory / f"{Path(argv[0]).name}.log").open("wb"))
        process = subprocess.Popen(argv, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._stack.callback(end, process)
        return process

    def setup(self) -> Message:
        """Wait for the agent's hello, answer it with `setup` and return it."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._control, BOOT_TIMEOUT):
                raise TimeoutError(f"no hello; the console says:\n{self.console.read_text()[-2000:]}")
        assert self._control
        parameters = {"entropy": os.urandom(64).hex(), "hostname": "guest", "machine_id": self.machine_id}
        self.call("setup", **parameters)
        return self._control.hello

    # The protocol

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        try:
            connection = Connection(sock)
        except (OSError, EOFError):  # the guest gave it up; it dials again
            sock.close()
            return
        with self._changed:
            if connection.hello["hello"] == "control":
                self._control = connection
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            else:
                self._streams[connection.hello["token"]] = connection
            self._changed.notify_all()

    def _serve(self, connection: Connection) -> None:
        while True:
            try:
                message = connection.receive()
            except (OSError, EOFError):
                message = {}
            with self._changed:
                if "event" in message:
                    self._events.append(message)
                elif message:
                    self._replies[message["id"]] = message
                else:
                    self._ended = True
                self._changed.notify_all()
            if not message:
                return

    def hang_up(self) -> None:
        """Close the control connection."""
        assert self._control
        self._control.socket.shutdown(socket.SHUT_RDWR)

    def send(self, method: str, **params: Any) -> int:
        """Send a request and return its id."""
        assert self._control
        with self._changed:
            self._last_id += 1
            number = self._last_id
        self._control.send({"id": number, "now_ns": time.time_ns(), "method": method, "params": params})
        return number

    def reply(self, number: int, timeout: float = CALL_TIMEOUT) -> Message:
        """Return the result of the request with that id. Raises AgentError, TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._replies or self._ended, timeout) or self._ended:
                raise TimeoutError(
                    f"no reply to request {number}; the console says:\n{self.console.read_text()[-2000:]}"
                )
            message = self._replies.pop(number)
        if "error" in message:
            raise AgentError(message["error"]["kind"], message["error"]["message"])
        result: Message = message["result"]
        return result

    def call(self, method: str, **params: Any) -> Message:
        return self.reply(self.send(method, **params))

    def event(
        self, kind: str, container: str, exec_id: str | None = None, timeout: float = CALL_TIMEOUT, **fields: Any
    ) -> Message:
        """Return the first event like this, now or later. Raises TimeoutError."""
        wanted = {"event": kind, "container": container, "exec": exec_id, **fields}

        def found() -> Message | None:
            return next((event for event in self._events if wanted.items() <= event.items()), None)

        with self._changed:
            event = self._changed.wait_for(found, timeout)
            if not event:
                raise TimeoutError(f"no event {wanted} among {self._events}")
            return event

    def events_of(self, container: str) -> list[Message]:
        with self._changed:
            return [event for event in self._events if event["container"] == container]

    def stream(self, token: str, timeout: float = CALL_TIMEOUT) -> Connection:
        """Return the stream connection with that token. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: token in self._streams, timeout):
                raise TimeoutError(f"no stream {token}")
            return self._streams[token]

    def close_streams(self, container: str = "") -> None:
        """Close the stream connections of a container, of all by default."""
        with self._changed:
            for token in [token for token in self._streams if token.startswith(container)]:
                self._streams.pop(token).socket.close()

    # Containers

    def add_rootfs(self, container: str) -> Path:
        """Make a busybox root file system for a container in the share."""
        root = self.share / container / "rootfs"
        for name in ("bin", "proc", "sys", "dev", "tmp", "etc", "root"):
            (root / name).mkdir(parents=True)
        (root / "tmp").chmod(0o1777)
        shutil.copy(BUSYBOX, root / "bin/busybox")
        applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
        for applet in set(applets) - {"busybox"}:
            (root / "bin" / applet).symlink_to("busybox")
        (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
        return root

    def container(
        self, container: str, *arguments: str, terminal: bool = False, stdin: bool = False, **spec: Any
    ) -> "Process":
        """Create, not yet start, a container; `spec` overrides keys of the OCI spec."""
        if not (self.share / container).exists():
            self.add_rootfs(container)
        with self._changed:  # an earlier container of this name is not this one
            self._events = [event for event in self._events if event["container"] != container]
        process = Process(self, container, None, terminal, stdin)
        full = {**oci_spec(container, arguments, terminal), **spec}
        result = self.call("create", container=container, spec=full, terminal=terminal, streams=process.tokens)
        process.pid = result["pid"]
        return process

    def run(self, container: str, *arguments: str, **options: Any) -> "Process":
        """Create and start a container."""
        process = self.container(container, *arguments, **options)
        self.call("start", container=container)
        return process

    def execute(
        self, container: str, exec_id: str, *arguments: str, terminal: bool = False, stdin: bool = False, **spec: Any
    ) -> "Process":
        """Start a further process in a container; `spec` overrides keys of the OCI process."""
        process = Process(self, container, exec_id, terminal, stdin)
        full = {**oci_process(arguments, terminal), **spec}
        names = {"container": container, "exec": exec_id}
        result = self.call("exec", **names, process=full, terminal=terminal, streams=process.tokens)
        process.pid = result["pid"]
        return process

    def remove(self, container: str) -> None:
        self.call("delete", container=container)
        self.close_streams(f"{container}|")
        shutil.rmtree(self.share / container)


class Process:
    """A container's process as the shim sees it: tokens, streams, exit."""

    def __init__(self, guest: Guest, container: str, exec_id: str | None, terminal: bool, stdin: bool) -> None:
        self.guest = guest
        self.container = container
        self.exec_id = exec_id
        self.pid = 0
        name = f"{container}|{exec_id}|{time.monotonic_ns()}"
        self.tokens = {
            "stdin": f"{name}-stdin" if stdin else None,
            "stdout": f"{name}-stdout",
            "stderr": None if terminal else f"{name}-stderr",
        }
        self._written = 0
        self._stdin: Connection | None = None

    @property
    def _names(self) -> Message:
        return {"container": self.container, "exec": self.exec_id}

    def read(self, stream: str = "stdout", timeout: float = CALL_TIMEOUT) -> bytes:
        """Return all that the process writes to the stream until its end, and close the connection."""
        return read_to_end(self.guest, self, stream, timeout)

    def connection(self, stream: str) -> Connection:
        token = self.tokens[stream]
        assert token
        return self.guest.stream(token)

    def write(self, data: bytes) -> None:
        self._stdin = self._stdin or self.connection("stdin")
        self._stdin.socket.sendall(data)
        self._written += len(data)

    def close_stdin(self) -> None:
        self.guest.call("close_stdin", **self._names, bytes=self._written)

    def signal(self, number: int, everyone: bool = False) -> None:
        self.guest.call("signal", **self._names, signal=number, all=everyone)

    def exit_event(self, timeout: float = CALL_TIMEOUT) -> Message:
        return self.guest.event("exit", self.container, self.exec_id, timeout)

    def wait(self, timeout: float = CALL_TIMEOUT) -> int:
        return int(self.exit_event(timeout)["status"])


def read_to_end(guest: Guest, process: Process, stream: str, timeout: float) -> bytes:
    connection = process.connection(stream)
    parts: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def pump() -> None:
        with suppress(OSError):  # closed below
            while data := connection.socket.recv(1 << 16):
                parts.put(data)

    threading.Thread(target=pump, daemon=True).start()
    total = guest.event("eof", process.container, process.exec_id, timeout, stream=stream)["bytes"]
    data = bytearray()
    while len(data) < total:
        data += parts.get(timeout=timeout)
    connection.socket.close()
    assert len(data) == total
    return bytes(data)


def oci_process(arguments: tuple[str, ...], terminal: bool) -> Message:
    capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"]
    return {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": list(arguments),
        "env": ["PATH=/usr/bin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        "noNewPrivileges": True,
    }


def oci_spec(container: str, arguments: tuple[str, ...], terminal: bool) -> Message:
    """Return a spec like containerd's default one, its paths as the guest sees them."""
    options = ["nosuid", "noexec", "nodev"]
    return {
        "ociVersion": "1.0.2",
        "process": oci_process(arguments, terminal),
        "root": {"path": f"{messages.GUEST_SHARE}/{container}/rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": options},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {
                "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*options, "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*options, "ro"]},
        ],
        "linux": {
            "cgroupsPath": f"/pymicro/{container}",
            "namespaces": [{"type": name} for name in ("pid", "ipc", "uts", "mount", "cgroup")],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }  # fmt: skip


def end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


@contextmanager
def booted_guest(directory: Path) -> Iterator[Guest]:
    """Yield a VM whose agent has said hello and is set up."""
    with Guest(directory) as guest:
        guest.boot()
        guest.setup()
        yield guest
