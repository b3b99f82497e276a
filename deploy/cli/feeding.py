"""What `replay` and `simulate` share: a progress bar, and stopping well on Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

__all__ = ["progress_bar", "stopping_on_interrupt"]


class _Counts(Protocol):
    impressions: int

    @property
    def events(self) -> int: ...

    @property
    def events_per_s(self) -> float: ...


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[_Counts], None] | None]:
    """Counts of impressions and events a second, on stderr; None where nobody looks at a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("impressions")),
        *(TextColumn("{task.fields[rate]}"), TimeElapsedColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, rate="")

        def show(stats: _Counts) -> None:
            progress.update(task, completed=stats.impressions, rate=f"{stats.events_per_s:,.0f} events/s")

        yield show


@contextmanager
def stopping_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C, or SIGTERM, ends the stream early, its last watermark included; the second one breaks off."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        for known, handler in before.items():
            signal.signal(known, handler)
        stop()

    before = {known: signal.signal(known, interrupted) for known in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
