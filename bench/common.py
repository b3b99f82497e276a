"""Shared by the benchmarks: interleaved rounds, a description of the machine, and the JSON object at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["interleaved", "machine", "report", "warn_if_busy"]

_BUSY = 0.1
"""A benchmark warns if other programs use a larger share of the machine. Threads that wait for one another lose even more."""


def machine() -> str:
    """Processor and number of cores, which each result names."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def interleaved(work: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Items a second of each piece of work, measured `rounds` times in turn, so that disturbances hit all pieces alike.

    work  by name, a function that does some work and returns the number of items that it processed
    """
    rates: dict[str, list[float]] = {name: [] for name in work}
    console = Console(stderr=True)
    warn_if_busy()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("rounds", total=rounds * len(work))
        for _ in range(rounds):
            for name, do in work.items():
                progress.update(task, description=name)
                began = time.perf_counter()
                items = do()
                rates[name].append(items / (time.perf_counter() - began))
                progress.advance(task)
    for name, values in rates.items():
        print(f"{name:32s} median {statistics.median(values):10,.0f}/s   best {max(values):10,.0f}/s", file=sys.stderr)
    return rates


def warn_if_busy() -> None:
    """Warn if other programs use the machine. Call this before the benchmark starts any work."""
    busy = 1 - _idle_share(seconds=1.0)
    if busy > _BUSY:
        warning = f"[yellow]Other programs use {busy:.0%} of the machine: figures will be low and ratios imprecise."
        Console(stderr=True).print(warning)


def _idle_share(seconds: float) -> float:
    """The share of the machine that is idle, measured over `seconds`; 1 where there is no /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 1.0

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)  # ticks idle or waiting for disks, and all ticks

    idle, total = ticks()
    time.sleep(seconds)
    idle_after, total_after = ticks()
    return (idle_after - idle) / max(1, total_after - total)


def report(**figures: object) -> None:
    """Print the result as one JSON object, the last line of stdout."""
    print(json.dumps({**figures, "machine": machine()}))
