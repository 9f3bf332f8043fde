"""`make kvm-lab`: a command or a shell in an emulated host with KVM.

python3 -m tests.framework.kvmlab [--limit SECONDS] [--kernel bookworm|trixie] [COMMAND LINE]
"""

import argparse
import signal
import sys

from tests.framework.containerd import USUAL
from tests.framework.debian import ToolError
from tests.framework.kvmlab.kernel import SUITES
from tests.framework.kvmlab.lab import Job, LabError, run
from tests.framework.tools import tool

LIMIT = 1800


def main() -> int:
    """Run it and return its exit code; errors become one message and exit code 1."""
    parser = argparse.ArgumentParser(prog="kvm-lab", description="an emulated host with KVM, on this host's files")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds from boot to power-off (%(default)s)")
    parser.add_argument("--kernel", choices=SUITES, default=SUITES[0], help="which Debian's (%(default)s)")
    parser.add_argument("command", nargs="?", default="", help="what bash runs there (default: a shell)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    if not options.command.strip() and not sys.stdin.isatty():
        parser.error('a shell needs a terminal; name a command instead: make kvm-lab ARGS="uname -a"')
    try:
        tool(f"containerd-{USUAL}")  # the lab has no network
        return run(Job(options.command if options.command.strip() else None, options.limit, options.kernel))
    except (ToolError, LabError) as error:
        print(f"kvm-lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
