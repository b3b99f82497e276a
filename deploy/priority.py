"""Giving way to other processes where workers share a machine's cores."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["give_way"]


def give_way(niceness: int) -> None:
    """Lower this process's priority by `niceness` (0 to 19), also against processes of other sessions.

    Linux's autogroups (sched(7), "The autogroup feature") share the cores out between sessions first, and niceness counts
    only within one: a worker with a session of its own is nice to nobody but itself until its group is, too.
    """
    if not niceness:
        return
    os.nice(niceness)
    with contextlib.suppress(OSError):  # no autogroups here, or an older kernel
        Path("/proc/self/autogroup").write_text(str(niceness))
