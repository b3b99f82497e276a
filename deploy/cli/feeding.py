"""What `replay` and `simulate` share: types of options, a progress bar, an early stop on Ctrl-C, lines of their summaries."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deploy.feeding.stats import StreamStats

__all__ = ["ABOVE_0", "SHARE", "echo_rate", "echo_watermark", "no_watermark_option", "progress_bar", "stopping_on_interrupt"]

ABOVE_0 = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(0, 1)

no_watermark_option = click.option(
    "--no-watermark", is_flag=True, help="Don't send watermark records at the end: the last impressions stay unlabelled."
)


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[StreamStats], None] | None]:
    """A function that shows impressions and events a second on stderr; None where stderr is not a terminal."""
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

        def show(stats: StreamStats) -> None:
            progress.update(task, completed=stats.impressions, rate=f"{stats.events_per_s:,.0f} events/s")

        yield show


@contextmanager
def stopping_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """On the first Ctrl-C or SIGTERM, call `stop`, which ends the stream after a watermark; the second one ends the command."""
    if threading.current_thread() is not threading.main_thread():  # handlers can only be set there
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


def echo_rate(stats: StreamStats) -> None:
    """Print how fast the stream was sent."""
    click.echo(f"rate         {stats.events_per_s:,.0f} events/s for {stats.elapsed_s:,.1f} s")


def echo_watermark(stats: StreamStats) -> None:
    """Print the watermark that was sent at the end."""
    click.echo(f"watermark    {'none sent' if stats.watermark_ms < 0 else stats.watermark_ms}")
