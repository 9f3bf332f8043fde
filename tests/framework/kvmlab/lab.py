"""Running one command in the lab, or a shell: output as it comes, its exit code, and nothing left whatever happens."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.framework.containerd import claimed_directory
from tests.framework.kvmlab import kernel
from tests.framework.kvmlab.machine import Machine, Share, command_line
from tests.framework.settings import REPOSITORY
from tests.framework.tools import tool
from tests.framework.waiting import SLOWER_VARIABLE

HERE = Path(__file__).parent
FILES = REPOSITORY / "build/lab"
"""What a command writes here is on the host afterwards."""
CONSOLE = "console.log"
"""What the lab's kernel has said, in that directory."""

CPUS = 3
"""Two for what runs in the lab, and the first, which is left alone (machine.py says why)."""
THE_LAB = "PYMICRO_KVM_LAB"
"""The variable that is there in the lab alone."""
SLOWER = "10"
"""Than the host that emulates it: what tests must expect."""
MEMORY_MIB = 6144
TIMED_OUT = 124
"""timeout(1)'s exit code."""
END_TIMEOUT = 10

# make's own: its job server is not in the lab. And the lab's shims shall find their modules compiled.
LEFT_OUT = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHONDONTWRITEBYTECODE", "_", "PWD", "OLDPWD", "SHLVL")

OUT, ERR = 1, 2


class LabError(Exception):
    """The lab did not run the command; the message says how far it came."""


@dataclass(frozen=True, slots=True)
class Job:
    """A bash command line, None for a shell on our terminal; `limit`: seconds from boot to power-off.

    `kernel` is that of one of kernel.SUITES.
    """

    command: str | None
    limit: float
    kernel: str = kernel.SUITES[0]


def run(job: Job) -> int:
    """Boot the lab, do the job, and return its exit code; TIMED_OUT if that took too long.

    Raises LabError, ToolError.
    """
    fetched, qemu = kernel.kernel(job.kernel), emulator()
    FILES.mkdir(parents=True, exist_ok=True)
    with _empty_directory() as directory:
        control = _control(directory / "control", fetched, job)
        kernel.write_initramfs(directory / "initramfs", fetched, HERE / "first.sh")
        shares = (Share("host", Path("/"), read_only=True), Share("lab", control), Share("files", FILES))
        console = directory / "console"
        with _relayed(job) as outputs:
            kernel_file, initramfs = fetched / "vmlinuz", directory / "initramfs"
            machine = Machine(qemu, kernel_file, initramfs, console, shares, CPUS, MEMORY_MIB, outputs)
            timed_out = _emulate(machine, job)
        shutil.copy(console, FILES / CONSOLE)
        if timed_out:
            print(f"kvm-lab: not done after {job.limit:g} s (LIMIT), so it was ended", file=sys.stderr)
            return TIMED_OUT
        try:
            return int((control / "status").read_text())
        except (OSError, ValueError):
            said = "\n".join(last_said(console.read_text(errors="replace").splitlines()))
            raise LabError(
                f"the lab ended before the command; its console ({FILES / CONSOLE}) said last:\n{said}"
            ) from None


def emulator() -> Path:
    """Return Debian 13's QEMU, fetched first if need be.

    Debian 12's is slower, and its CPUs may run for ever what a kernel has patched: it notices a write to code that it
    has translated, not one that comes while it translates (mended in QEMU 8.1).

    Raises ToolError.
    """
    return tool("vmm-trixie") / "qemu-system-x86_64"


@contextmanager
def _empty_directory() -> Iterator[Path]:
    """Yield a directory for one run. What a killed run has left in it is removed by the next one."""
    with claimed_directory(REPOSITORY / "build/kvm-lab") as directory:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory)


def last_said(lines: list[str]) -> list[str]:
    """Return the end of the console; of a kernel's panic what came before it, not the registers."""
    panic = next((number for number, line in enumerate(lines) if "Kernel panic" in line), len(lines))
    return lines[max(0, panic - 10) : panic + 1]


def _control(directory: Path, fetched: Path, job: Job) -> Path:
    """Lay out what the lab's second script reads, and return the directory."""
    directory.mkdir()
    shutil.copy(HERE / "second.sh", directory)
    inherited = {key: value for key, value in os.environ.items() if key not in LEFT_OUT and key.isidentifier()}
    columns, rows = shutil.get_terminal_size()
    environment = {
        **inherited,
        "LAB_MODULES": str(fetched / "modules"),
        "LAB_CHECKOUT": str(REPOSITORY),
        THE_LAB: "1",
        SLOWER_VARIABLE: SLOWER,
        "LAB_SIZE": f"rows {rows} columns {columns}",
    }
    lines = [f"export {key}={shlex.quote(value)}\n" for key, value in environment.items()]
    (directory / "environment").write_text("".join(lines))
    if job.command is not None:
        (directory / "command").write_text(f"{job.command}\n")
    return directory


def _emulate(machine: Machine, job: Job) -> bool:
    """Run the machine until it ends; return whether it had to be ended. It dies with us, however we do."""
    argv = ["setpriv", "--pdeathsig", "KILL", *command_line(machine)]
    stdin = subprocess.DEVNULL if job.command is not None else None
    with subprocess.Popen(argv, stdin=stdin, pass_fds=tuple(machine.outputs.values())) as process:
        try:
            process.wait(job.limit)
        except subprocess.TimeoutExpired:
            return True
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_TIMEOUT)
                process.kill()
    return False


@contextmanager
def _relayed(job: Job) -> Iterator[Mapping[int, int]]:
    """Yield sockets for a command's outputs, by port; what comes there is written to ours until the block ends."""
    if job.command is None:
        yield {}
        return
    pairs = {target: socket.socketpair() for target in (OUT, ERR)}
    threads = [threading.Thread(target=_relay, args=(ours, target)) for target, (ours, _) in pairs.items()]
    for thread in threads:
        thread.start()
    try:
        yield {target: theirs.fileno() for target, (_, theirs) in pairs.items()}
    finally:
        for _, theirs in pairs.values():
            theirs.close()
        for thread in threads:
            thread.join()


def _relay(source: socket.socket, target: int) -> None:
    """Write to `target` what comes, until its end. A reader of ours that has gone does not hold up the lab."""
    with source:
        while data := source.recv(1 << 16):
            with suppress(OSError):
                os.write(target, data)
