"""What a running process has used: CPU time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

__all__ = ["Usage", "usage"]

MIB = 1 << 20


class Usage(NamedTuple):
    """CPU time in seconds, memory now and at its peak in MiB."""

    cpu_seconds: float
    rss_mb: float
    peak_rss_mb: float


def usage(pid: int) -> Usage:
    """The usage of a process, its children not counted.

    Raises:
        psutil.NoSuchProcess: the process has ended.
    """
    process = psutil.Process(pid)
    with process.oneshot():
        cpu, rss_mb = process.cpu_times(), process.memory_info().rss / MIB
    try:  # the peak, which psutil doesn't report on Linux
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        peak_mb = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1_024
    except (OSError, StopIteration):
        peak_mb = rss_mb
    return Usage(cpu.user + cpu.system, rss_mb, max(peak_mb, rss_mb))
