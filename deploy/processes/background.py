"""Background processes that can be found again from another process, and never mistaken for a stranger's.

A pid alone is reused by the system; a pid with the moment it started is not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

__all__ = ["Process", "mark", "stop_all"]

POLL_S = 0.02  # between two looks at a process that is asked to stop; a look costs some microseconds


class Process(msgspec.Struct, frozen=True):
    """A process by its pid and the moment it started, in the system's own words (compared, never read)."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs. One that has ended but was not waited for does not."""
        return _started(self.pid) == self.started

    def send(self, number: signal.Signals) -> bool:
        """Send a signal if this very process still runs; whether it was sent. Raises PermissionError: it is another user's."""
        if not self.alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


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
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _started_by_ps(pid)
    # The command's name, in brackets, may hold spaces and brackets; what follows it is state, ppid, … start time (22nd).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else f"{_boot()}:{fields[19]}"


def _boot() -> str:
    """Tells one run of the machine from another: start times count from its boot."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started_by_ps(pid: int) -> str | None:
    """For systems with no /proc, as macOS."""
    answer = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = answer.stdout.strip().partition(" ")
    return None if not started or state.startswith("Z") else started.strip()
