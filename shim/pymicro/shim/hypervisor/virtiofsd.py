"""virtiofsd: shares one host directory with a VM over vhost-user. The Rust program (Debian 13) or QEMU 7.2's C one
(Debian 12).

The listening socket is bound here and passed on, so a VMM that connects can never come too early.
"""

import socket
from pathlib import Path

from pymicro.shim.host import Virtiofsd
from pymicro.shim.spawn import Child, Place, spawn


def command(program: Virtiofsd, directory: Path, listener_fd: int) -> list[str]:
    """Return the command line that shares `directory` with whoever connects to the listening socket `listener_fd`.

    Mounts made below the directory later are announced to the guest as file systems of their own, so that inode
    numbers of different layers do not collide.
    """
    if program.flavour == "rust":
        return [
            *program.command,
            f"--fd={listener_fd}",
            f"--shared-dir={directory}",
            "--sandbox=namespace",
            "--announce-submounts",
            "--cache=auto",
            "--xattr",
            "--log-level=warn",
        ]
    options = f"source={directory},sandbox=namespace,announce_submounts,cache=auto,xattr,log_level=warn"
    return [*program.command, f"--fd={listener_fd}", "-f", "-o", options]


def start(program: Virtiofsd, directory: Path, socket_path: Path, place: Place) -> Child:
    """Start virtiofsd for `directory`, listening at `socket_path`."""
    socket_path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(socket_path))
        listener.listen(1)
        return spawn("virtiofsd", command(program, directory, listener.fileno()), place, (listener.fileno(),))
