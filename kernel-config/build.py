#!/usr/bin/python3
"""Build the guest kernel from the fragments beside this file, unless the cache has it; print where it is.

Standard library only: it runs before anything is installed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import kernel_cache
import kernel_fragments
import kernel_image
import kernel_process
import kernel_source

HERE = Path(__file__).resolve().parent
RECIPE = 1
"""Part of the key: raise it when a change of this program changes the kernel that it makes."""

TOOLS = {"make": "make", "gcc": "gcc", "ld": "binutils", "flex": "flex", "bison": "bison", "bc": "bc", "perl": "perl",
         "tar": "tar", "xz": "xz-utils", "strip": "binutils"}  # fmt: skip
"""The programs of a build and Debian's packages of them; libelf's header is looked for beside them."""
USUAL_STEPS = 2250
"""Lines that make prints in a full build: the measure of progress, nothing depends on it."""
PROGRESS_INTERVAL = 10.0
NEEDED_SPACE = 3 << 30


class BuildError(Exception):
    """The kernel cannot be built; the message says why and what to do."""


def say(message: str) -> None:
    print(f"kernel: {message}", file=sys.stderr, flush=True)


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def require_tools() -> None:
    """Raise BuildError naming the Debian packages of the programs that are not there."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if not Path("/usr/include/libelf.h").exists():
        missing.add("libelf-dev")
    if missing:
        raise BuildError(f"tools are missing: apt-get install {' '.join(sorted(missing))}")


def make_environment() -> dict[str, str]:
    """Return an environment in which neither a calling make nor the user's settings change the kernel."""
    return {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "LC_ALL": "C",
        "KBUILD_BUILD_USER": "pymicro",
        "KBUILD_BUILD_HOST": "pymicro",
        "KBUILD_BUILD_VERSION": "1",
    }


class Maker:
    """Runs make on a source tree with its products in another directory, logging to a file."""

    def __init__(self, tree: Path, scratch: Path, jobs: int) -> None:
        self.tree = tree
        self.out = scratch / "out"
        self.log = scratch / "make.log"
        self.out.mkdir()
        self.environment = make_environment()
        # `uname -v` tells the age of the source: two builds of it are the same to the byte.
        built = time.gmtime((tree / "Makefile").stat().st_mtime)
        self.environment["KBUILD_BUILD_TIMESTAMP"] = time.strftime("%a %b %e %H:%M:%S UTC %Y", built)
        self.command = ["make", f"--directory={tree}", f"O={self.out}", "ARCH=x86_64", f"--jobs={jobs}"]

    def run(self, target: str, *, progress: bool = False, **environment: str) -> None:
        """Make one target. Raises BuildError with the compiler's messages."""
        # The preexec_fn is safe: this program has one thread. Its own group lets us end all of make's children.
        process = subprocess.Popen(
            [*self.command, target], env=self.environment | environment, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=kernel_process.die_with_parent,  # noqa: PLW1509 - see above
        )  # fmt: skip
        try:
            self._follow(process, progress)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        if process.returncode != 0:
            lines = [line for line in self.log.read_text().splitlines() if not line.startswith(("  ", "make"))]
            raise BuildError("\n  ".join([f"make {target} failed, its last words:", *lines[-20:]]))

    def _follow(self, process: "subprocess.Popen[str]", progress: bool) -> None:
        assert process.stdout is not None
        steps, spoke = 0, time.monotonic()
        with self.log.open("a") as log:
            for line in process.stdout:
                log.write(line)
                steps += line.startswith("  ")
                if progress and time.monotonic() - spoke >= PROGRESS_INTERVAL:
                    spoke = time.monotonic()
                    say(f"compiling, about {min(99, steps * 100 // USUAL_STEPS)} % ({steps} steps)")
        process.wait()

    def configure(self, options: dict[str, kernel_fragments.Option]) -> None:
        """Make .config: what the options ask for, what that needs, and nothing else. Raises BuildError."""
        wishes = self.out / "wishes"
        wishes.write_text(kernel_fragments.as_config(options))
        symbols = kernel_fragments.known_symbols(self.tree)
        self.run("allnoconfig", KCONFIG_ALLCONFIG=str(wishes))
        final = kernel_fragments.parse_dot_config((self.out / ".config").read_text())
        problems = kernel_fragments.check(options, final, symbols)
        if problems:
            raise BuildError("\n  ".join([f"{len(problems)} options are not as the fragments ask:", *problems]))


@dataclass(frozen=True)
class Job:
    """All that makes a kernel what it is; its key in the cache stands for that."""

    source: Path
    options: dict[str, kernel_fragments.Option]
    facts: dict[str, object]
    """What the manifest tells of the inputs: source, compiler, linker."""

    @property
    def key(self) -> str:
        return kernel_cache.key_of(
            {"recipe": RECIPE, "options": kernel_fragments.as_config(self.options), **self.facts}
        )


def collect(maker: Maker, files: Path, job: Job) -> None:
    """Put vmlinux, config, System.map and manifest.json into the directory `files`. Raises BuildError."""
    files.mkdir()
    vmlinux = files / "vmlinux"
    strip = ["strip", "--strip-all", "--remove-section=.comment"]
    subprocess.run([*strip, "-o", vmlinux, maker.out / "vmlinux"], check=True)
    vmlinux.chmod(0o644)
    if not kernel_image.boots_by_pvh(vmlinux):
        raise BuildError("the kernel has no PVH entry note after stripping: a VMM could not start it")
    shutil.copyfile(maker.out / ".config", files / "config")
    shutil.copyfile(maker.out / "System.map", files / "System.map")
    manifest = {
        "file": vmlinux.name,
        "sha256": kernel_cache.sha256_of(vmlinux),
        "size": vmlinux.stat().st_size,
        "release": (maker.out / "include/config/kernel.release").read_text().strip(),
        "key": job.key,
        **job.facts,
    }
    (files / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def build(root: Path, job: Job, jobs: int) -> Path:
    """Return the directory of the kernel in the cache `root`, made now. Raises BuildError and SourceError."""
    with kernel_cache.only_builder(root):
        if (ready := kernel_cache.find(root, job.key)) is not None:
            return ready
        if shutil.disk_usage(root).free < NEEDED_SPACE:
            raise BuildError(
                f"{root} has less than {NEEDED_SPACE >> 30} GiB free, which a build takes for its duration"
            )
        started = time.monotonic()
        with kernel_cache.scratch(root) as scratch:
            say(f"unpacking {job.source.name}")
            maker = Maker(kernel_source.unpack(job.source, scratch), scratch, jobs)
            say("configuring")
            maker.configure(job.options)
            say(f"compiling with {jobs} jobs: some minutes")
            maker.run("vmlinux", progress=True)
            collect(maker, scratch / "files", job)
            place = kernel_cache.publish(scratch / "files", root, job.key)
    say(f"built in {time.monotonic() - started:.0f} s, {(place / 'vmlinux').stat().st_size / 1e6:.1f} MB")
    return place


def check_only(root: Path, job: Job) -> None:
    """Configure without compiling. Raises BuildError and SourceError."""
    with kernel_cache.only_builder(root), kernel_cache.scratch(root) as scratch:
        Maker(kernel_source.unpack(job.source, scratch), scratch, jobs=1).configure(job.options)
    say(f"all {len(job.options)} options are as asked")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print-path", action="store_true", help="print the directory of the kernel (built if needed)")
    parser.add_argument("--check", action="store_true", help="only check that the source gives every option asked for")
    parser.add_argument(
        "--fragment", type=Path, action="append", default=[], help="one more fragment, for a lab kernel"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="parallel compilers (default: %(default)s)"
    )
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    options = kernel_fragments.read([*sorted(HERE.glob("*.config")), *arguments.fragment])
    source = kernel_source.locate(os.environ)
    require_tools()
    facts: dict[str, object] = {
        "source": kernel_source.identity(source),
        "compiler": first_line("gcc", "--version"),
        "linker": first_line("ld", "--version"),
    }
    job = Job(source, options, facts)
    root = kernel_cache.cache_root(os.environ)
    if arguments.check:
        check_only(root, job)
        return
    place = kernel_cache.find(root, job.key) or build(root, job, arguments.jobs)
    if arguments.print_path:
        print(place)


def main() -> int:
    """Return the exit code: 0, 1 for an error (reported), 130 and 143 for a signal."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(parse_arguments())
    except KeyboardInterrupt:
        return 130
    except (BuildError, kernel_source.SourceError, kernel_fragments.FragmentError, OSError) as error:
        say(f"error: {error}")
        return 1
    except subprocess.CalledProcessError as error:
        say(f"error: {error} {error.stderr or ''}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
