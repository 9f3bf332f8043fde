"""Running crun: its arguments, and its errors in the words that containerd's clients know from runc."""

import posix
from itertools import count

from pymicro.agent import files
from pymicro.agent.errors import RuntimeFailed
from pymicro.wire.frames import FrameError, decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.agent.reaper import Reaper

PROGRAM = "/usr/bin/crun"
STATE_DIRECTORY = "/run/crun"


class Crun:
    """Runs crun for one container; `directory` is where its log goes."""

    def __init__(self, reaper: "Reaper", directory: str) -> None:
        self._reaper = reaper
        self._directory = directory
        self._calls = count()

    def run(self, *arguments: str, stdio: "tuple[int, int, int] | None" = None) -> None:
        """Run one crun command to its end, by default with /dev/null for its stdio.

        Raises RuntimeFailed with the error that crun logged.
        """
        log = f"{self._directory}/crun-{next(self._calls)}.log"
        options = ["--root", STATE_DIRECTORY, "--cgroup-manager=cgroupfs", "--log", f"file:{log}", "--log-format=json"]
        null = posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)
        try:
            status = self._reaper.run([PROGRAM, *options, *arguments], stdio or (null, null, null))
        finally:
            posix.close(null)
        message = last_error(log)
        if status:
            raise RuntimeFailed(message or f"crun {arguments[0]} failed with status {status} and logged nothing")


def last_error(log: str) -> str:
    """Return the last message in a log file of crun's and remove the file; "" if there is none."""
    try:
        lines = files.read_text(log).splitlines()
        posix.unlink(log)
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            message = decode(line.encode()).get("msg")
        except FrameError:
            message = line
        if message:
            return str(message)
    return ""


def in_runc_words(message: str, program: str) -> str:
    """Return crun's error about `program`, the first word of a command, as runc puts it: clients look for its words.

    dockerd answers 127 to "executable file not found" and "no such file or directory" and 126 to "permission denied".
    """
    lowered = message.lower()
    if "executable file" in lowered and "not found" in lowered and "/" not in program:
        reason = "executable file not found in $PATH"
    elif "executable" not in lowered and "exec " not in lowered and f"`{program}`" not in lowered:
        return message
    elif "no such file or directory" in lowered or "not found" in lowered:
        reason = "no such file or directory"
    elif "permission denied" in lowered or "not executable" in lowered or "not a regular file" in lowered:
        reason = "permission denied"
    elif "exec format error" in lowered:
        reason = "exec format error"
    else:
        return message
    return f'unable to start container process: exec: "{program}": {reason}'
