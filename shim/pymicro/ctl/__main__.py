"""pymicroctl: is this host able, and which sandboxes run? Argument parsing only; each command is a module."""

import argparse
import os
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="pymicroctl", description="Look after pymicro on this host.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="say whether this host can run microVMs, and what to do where it cannot",
        description="Each line is ok, degraded (works, but not as it could) or missing (does not work), with what to"
        " do. Exit status: 0 all ok, 1 something degraded, 2 something missing.",
    )
    ps = commands.add_parser("ps", help="list the sandboxes", description="List the sandboxes of this host.")
    template = commands.add_parser(
        "template",
        help="make, list and remove the saved VMs that pods start from",
        description="build: make the template of a VM size ahead of its first pod. list: show all, with their state."
        " rm: remove some. prune: remove damaged, stale and half-made ones.",
    )
    template.add_argument("action", choices=("build", "list", "rm", "prune"))
    template.add_argument("names", nargs="*", metavar="TEMPLATE", help="for rm: which")
    template.add_argument("--vcpus", type=int, metavar="N", help="for build (default: vm.vcpus)")
    template.add_argument("--memory", type=int, metavar="MIB", help="for build (default: vm.memory_mib)")
    for command in (check, ps):
        command.add_argument("--json", action="store_true", help="print JSON")
    for command in (check, template):
        command.add_argument(
            "--config", metavar="FILE", help="settings file (default: $PYMICRO_CONFIG, /etc/pymicro/config.toml)"
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run pymicroctl; return the exit status."""
    arguments = parser().parse_args(argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 1
    return status


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "check":
        from pymicro.ctl.check import run

        return run(arguments.config, as_json=arguments.json)
    if arguments.command == "template":
        from pymicro.ctl.template import run as run_template

        return run_template(
            arguments.action,
            arguments.names,
            config=arguments.config,
            vcpus=arguments.vcpus,
            memory_mib=arguments.memory,
        )
    from pymicro.ctl.ps import run as run_ps

    return run_ps(as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
