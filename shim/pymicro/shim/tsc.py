"""The rate of the host's time-stamp counter: a guest under emulation reads it and has no timer to calibrate it by."""

import time
from collections.abc import Callable
from pathlib import Path

from pymicro.shim.errors import HostMissing

# rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_TSC_SAMPLE_SECONDS = 0.002


def tsc_khz(cpuinfo: str = "/proc/cpuinfo") -> int:
    """Return the rate of the host's time-stamp counter in kHz: a guest under TCG reads that counter, and must be told.

    Measured over 2 ms, to better than 1 in 10,000. What /proc/cpuinfo says is the present clock of a core, which with
    frequency scaling is another matter; it is taken only where memory cannot be made executable.
    """
    try:
        return _measure_tsc()
    except OSError:
        for line in Path(cpuinfo).read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("cpu MHz"):
                return round(float(line.partition(":")[2]) * 1000)
        raise HostMissing(
            "cannot find out the rate of the time-stamp counter, which TCG guests need; use KVM"
        ) from None


def _measure_tsc() -> int:
    import ctypes
    import mmap

    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_RDTSC)
        start = ctypes.c_char.from_buffer(page)
        rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(start))

        def sample(rdtsc: Callable[[], int] = rdtsc) -> tuple[int, int]:
            """Return a counter value and when it was read: of some readings between two of the clock the tightest."""
            best = (1 << 62, 0, 0)
            for _ in range(5):
                before, ticks, after = time.monotonic_ns(), rdtsc(), time.monotonic_ns()
                best = min(best, (after - before, ticks, (before + after) // 2))
            return best[1], best[2]

        first_ticks, first_time = sample()
        time.sleep(_TSC_SAMPLE_SECONDS)
        ticks, when = sample()
        del sample, rdtsc, start  # the page cannot be unmapped while anything points into it
    return (ticks - first_ticks) * 1_000_000 // (when - first_time)
