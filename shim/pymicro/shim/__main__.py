"""The shim's entry point: from containerd's command line to one function, importing only what that function needs."""

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pymicro.shim.arguments import Arguments


def main() -> int:
    """Run one action of the shim v2 command line; return the exit status. Errors go to stderr, which containerd
    shows.
    """
    begun_ns = time.monotonic_ns()
    import pymicro.shim.lean  # noqa: F401  # it acts when it is imported
    from pymicro.shim.arguments import Arguments

    try:
        _run(Arguments(sys.argv[1:]), begun_ns)
    except (OSError, ValueError, RuntimeError) as error:
        os.write(2, f"pymicro: {error}\n".encode())
        return 1
    return 0


def _run(arguments: "Arguments", begun_ns: int) -> None:
    if arguments.version or arguments.help:
        from pymicro.shim.info import print_version

        print_version()
    elif arguments.info:
        from pymicro.shim.info import print_info

        print_info()
    elif arguments.action == "start":
        from pymicro.shim.start import start

        start(arguments, begun_ns)
    elif arguments.action == "delete":
        from pymicro.shim.delete import age_of_program, delete

        delete(arguments, age_of_program())
    else:
        raise ValueError(
            f"unknown action {arguments.action!r}; a shim is started by containerd: start, delete, -info or -v"
        )


if __name__ == "__main__":
    sys.exit(main())
