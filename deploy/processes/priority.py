"""Lowers a worker's priority where it shares a machine's cores with other processes."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

__all__ = ["give_way"]

# Linux accepts one such write each 100 ms, counting all processes without CAP_SYS_ADMIN, and workers start together.
ATTEMPTS, RETRY_S = 10, 0.1


def give_way(niceness: int) -> None:
    """Lower this process's priority by `niceness` (0 to 19), and that of its session if this process leads the session.

    Linux's autogroups (sched(7), "The autogroup feature") first share the cores out between sessions; niceness then counts
    within a session only. A worker alone in its session therefore gives way to others only when its group has the niceness,
    too. The group of a session that another process leads (a shell) is left alone: all programs there would give way for good.
    """
    if not niceness:
        return
    os.nice(niceness)
    if os.getsid(0) != os.getpid():
        return
    with contextlib.suppress(OSError):  # the kernel has no autogroups
        for _ in range(ATTEMPTS):
            try:
                Path("/proc/self/autogroup").write_text(str(niceness))
                return
            except BlockingIOError:
                time.sleep(RETRY_S)
