"""`make up`, `make down` and `make run`: a private containerd for trying things out.

python3 -m tests.framework.dev up|down|run [--containerd VERSION] [--directory DIR] [--runtime NAME]
"""

import argparse
import fcntl
import platform
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.framework.busybox import NAME as IMAGE
from tests.framework.cache import locked
from tests.framework.containerd import USUAL, VERSIONS, Containerd, ContainerdError, claimed_directory
from tests.framework.debian import ToolError

PYMICRO = "io.containerd.pymicro.v1"
REPOSITORY = Path(__file__).resolve().parents[2]

RUN_TIMEOUT = 120


def up(containerd: Containerd) -> None:
    """Start the daemon unless the wanted version runs already, and write the file to source."""
    environment = containerd.home / "env"
    running = environment.exists() and f"containerd {containerd.lane}\n" in environment.read_text()
    if not (running and containerd.responds()):
        containerd.stop()
        try:
            containerd.start()
        except BaseException:
            containerd.stop()
            raise
        lines = [f"# containerd {containerd.lane}"]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in containerd.client_environment.items()]
        lines += [f'export PATH={shlex.quote(str(containerd.bin))}:"$PATH"']
        environment.write_text("\n".join(lines) + "\n")
    print(f"containerd {containerd.lane} is up; its log: {containerd.directory}/containerd.log")
    print(f"  . {containerd.directory}/env")
    print(f"  ctr run --rm --runtime {PYMICRO} {IMAGE} hello uname -r")


def down(containerd: Containerd) -> None:
    """Stop the daemon, and those that a killed `make run` or test left; the locks tell which are still in use."""
    containerd.stop()
    for lock in sorted((REPOSITORY / "build").glob("*/*.lock")):
        with lock.open("w") as handle, suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Containerd(USUAL, lock.with_suffix("")).stop()


def run(containerd: Containerd, runtime: str) -> int:
    """Run one container, and print which kernels the host and the container have. Return the exit code."""
    script = 'uname -r; echo "hello from process $$ of a container, as user $(id -un), on $(nproc) CPU(s)"'
    try:
        containerd.start()
        done = containerd.ctr(
            "run", "--rm", "--runtime", runtime, IMAGE, "hello", "sh", "-c", script, check=False, timeout=RUN_TIMEOUT
        )
        if done.returncode:
            print(
                f"ctr ended with exit code {done.returncode}:\n{done.stderr}\n{containerd.log_tail()}", file=sys.stderr
            )
            return 1
        guest, _, line = done.stdout.strip().partition("\n")
        print(f"host kernel:   {platform.release()}\nguest kernel:  {guest}\nthe container: {line}")
    except subprocess.TimeoutExpired as error:
        print(f"{error}\n{containerd.log_tail()}", file=sys.stderr)
        return 1
    else:
        return 0
    finally:
        containerd.stop()


def main() -> int:
    """Do what the command line says; errors become one message and exit code 1."""
    parser = argparse.ArgumentParser(prog="dev", description="a private containerd with the pymicro shim")
    parser.add_argument("verb", choices=("up", "down", "run"))
    parser.add_argument("--containerd", choices=VERSIONS, default=USUAL, help="the version (default: %(default)s)")
    parser.add_argument(
        "--directory", type=Path, default=REPOSITORY / "build/dev", help="its place (default: build/dev)"
    )
    parser.add_argument("--runtime", default=PYMICRO, help="the runtime that `run` uses (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        if options.verb == "run":
            with claimed_directory(REPOSITORY / "build/run") as directory:
                return run(Containerd(options.containerd, directory), options.runtime)
        options.directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(options.directory.parent / f".{options.directory.name}.lock"):
            containerd = Containerd(options.containerd, options.directory)
            if options.verb == "up":
                up(containerd)
            else:
                down(containerd)
    except (ToolError, ContainerdError, TimeoutError) as error:
        print(f"{options.verb}: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"{options.verb}: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
