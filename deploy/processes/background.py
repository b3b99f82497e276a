"""Background processes that another program can find again, without mistaking a stranger's process for one of them.

A pid alone doesn't name a process for long, since the system gives the pid of an ended process to a new one. A pid together
with the moment its process started does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

__all__ = ["Process", "mark", "stop_all"]

POLL_S = 0.02  # between two looks at a process that is asked to stop; a look costs some microseconds


class Process(msgspec.Struct, frozen=True):
    """A process by its pid and the moment it started. `started` is compared as text, never parsed."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs. A process that has ended but was not waited for (a zombie) does not."""
        # This is asked twice: when the clock is set between psutil's two readings, one answer is wrong.
        return any(_started(self.pid) == self.started for _ in range(2))

    def send(self, number: signal.Signals) -> bool:
        """Send a signal if this very process still runs, and return whether it was sent.

        Raises:
            PermissionError: it is another user's.
        """
        if not self.alive:
            return False
        try:
            psutil.Process(self.pid).send_signal(number)
        except psutil.AccessDenied as error:
            raise PermissionError(f"process {self.pid}: expected one of this user, found another user's") from error
        except psutil.NoSuchProcess:
            return False
        return True


def mark(pid: int) -> Process | None:
    """The process that has this pid now; None when there is none."""
    started = _started(pid)
    return None if started is None else Process(pid=pid, started=started)


def stop_all(processes: Sequence[Process], *, timeout_ms: int) -> list[int]:
    """Ask all to stop (SIGTERM), wait, then end the rest (SIGKILL).

    Returns:
        The pids that had to be killed.
    """
    for process in processes:
        process.send(signal.SIGTERM)
        process.send(signal.SIGCONT)  # a paused process can't act on SIGTERM
    _wait(processes, timeout_ms)
    killed = [process.pid for process in processes if process.send(signal.SIGKILL)]
    _wait(processes, timeout_ms)
    return killed


def _wait(processes: Sequence[Process], timeout_ms: int) -> None:
    deadline = time.monotonic() + timeout_ms / 1_000
    while time.monotonic() < deadline and any(process.alive for process in processes):
        time.sleep(POLL_S)


def _started(pid: int) -> str | None:
    """When the process with this pid started, as text: on Linux the boot and the time since; None when no such process runs."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        created = process.create_time()
    except psutil.NoSuchProcess:
        return None
    if not psutil.LINUX:
        return f"{created:.2f}"
    # Linux counts start times from the machine's boot. psutil adds the time of the boot, which moves when the clock is set.
    ticks = round((created - psutil.boot_time()) * os.sysconf("SC_CLK_TCK"))
    return f"{_boot()}:{ticks}"


def _boot() -> str:
    """Linux's id of this run of the machine, for which psutil has no call."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
