"""The kernel command line of every guest, whatever VMM it runs in."""

# reboot=t panic=-1: a dead PID 1 or kernel resets the machine at once, and a VM that resets is ended.
_MACHINE = "root=/dev/vda rootfstype=erofs ro console=ttyS0 reboot=t panic=-1 quiet"
_INIT = "init=/usr/bin/python3 -- -I -S /usr/lib/pymicro/init.pyc"


def arguments(*more: str) -> str:
    """Return the command line, with what a VMM's own machine needs in it."""
    return " ".join((_MACHINE, *more, _INIT))
