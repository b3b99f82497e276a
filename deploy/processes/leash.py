"""Ending with the process that started this one, in whatever way that ends: its end of standard input is a leash."""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["hold_leash"]


def hold_leash() -> None:
    """From now on the end of standard input is a SIGTERM: it ends a process that starts, and drains a worker that runs."""

    def wait() -> None:
        # Not through sys.stdin: a thread that waits in it keeps the interpreter from ending.
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="leash", daemon=True).start()
