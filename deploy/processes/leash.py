"""A leash: this process ends when the process that started it ends, even by kill -9.

The parent holds the other end of standard input, and the system closes that end when the parent ends.
"""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["hold_leash"]


def hold_leash() -> None:
    """Send this process SIGTERM when standard input ends. SIGTERM drains a running worker, and ends a starting one."""

    def wait() -> None:
        # Not through sys.stdin: the interpreter can't end while a thread waits in it.
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="leash", daemon=True).start()
