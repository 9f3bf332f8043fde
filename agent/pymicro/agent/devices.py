"""Finding devices that the host has plugged in, by having the kernel scan its PCI ports again.

The guest's kernel has no driver for PCIe hot plug: it would sleep for a tenth of a second for every device.
"""

import time

from pymicro.agent import files

PAUSE = 0.002
"""Seconds before a scan. Only a VM that is about to be saved, or has just gone on, is without its devices for long."""
PCI_RESCAN = "/sys/bus/pci/rescan"


def look_again() -> None:
    """Pause, then scan. What is found is bound to its driver when this returns. Raises OSError."""
    time.sleep(PAUSE)
    files.write_text(PCI_RESCAN, "1")
