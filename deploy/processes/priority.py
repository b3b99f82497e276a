"""Giving way to other processes where workers share a machine's cores."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

__all__ = ["give_way"]

# Linux takes one write each 100 ms from all processes without CAP_SYS_ADMIN, and workers start together.
ATTEMPTS, RETRY_S = 10, 0.1


def give_way(niceness: int) -> None:
    """Lower this process's priority by `niceness` (0 to 19); where it leads a session, against other sessions, too.

    Linux's autogroups (sched(7), "The autogroup feature") share the cores out between sessions first, and niceness counts
    only within one: a worker with a session of its own is nice to nobody but itself until its group is, too. The group of a
    session that another process leads, a shell's, isn't this one's to change: all that runs there would give way, for good.
    """
    if not niceness:
        return
    os.nice(niceness)
    if os.getsid(0) != os.getpid():
        return
    with contextlib.suppress(OSError):  # no autogroups here, or an older kernel
        for _ in range(ATTEMPTS):
            try:
                Path("/proc/self/autogroup").write_text(str(niceness))
                return
            except BlockingIOError:
                time.sleep(RETRY_S)
