"""`headrace model …`: what the model is like inside, and how challengers do. The latter is in `model_tracks.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import echo_json, format_option, track_option
from deploy.cli.model_tracks import compare, promote, shadow
from deploy.cli.snapshot_common import resolve, settings_for
from deploy.cli.times import clock

if TYPE_CHECKING:
    from state.table_report import FieldReport, TableReport

__all__ = ["model"]


@click.group()
def model() -> None:
    """Look into the model, and compare it with challengers.

    A challenger is a trainer on a track of its own, `headrace run trainer --track NAME`, with other settings.

    \b
    Examples:
      headrace model stats                                     the table of the newest version: rows, memory, by field
      headrace model stats champion                            of the version that is served
      headrace model shadow wide --share 5%                    let the challenger `wide` score a share of the requests
      headrace model compare                                   how it does beside the track that serves
      headrace model promote wide --reason "0.6 % less loss"   let it serve
    """


for _command in (compare, promote, shadow):
    model.add_command(_command)


@model.command()
@click.argument("version", required=False)
@track_option
@format_option
def stats(version: str | None, output: str) -> None:
    """Show the table of VERSION, a number or an alias; of the newest version in the store when not given.

    For each field: its rows, how often a value got one (admitted), impressions of values that got none (refused), rows that
    were evicted, and the event time at which its least recently used row was last used. Counts are since the model began. The
    settings `table` decide who gets a row and which rows go. Only where they evict rows are there times; the trainer's state of
    all rows is read for them then.

    \b
    Examples:
      headrace model stats
      headrace model stats 41 --format json
      headrace model stats champion
    """
    from state.errors import SnapshotNotFound
    from state.store import SnapshotStore
    from state.table_report import table_report

    settings = settings_for(*([] if version is None else [version]))
    store = SnapshotStore(settings.snapshots)
    if version is None:
        there = store.versions()
        if not there:
            raise SnapshotNotFound(
                f"{store.url}: expected a version, found none. A trainer writes one: `headrace run trainer`. Is snapshots.url "
                "right? `headrace config show` prints it."
            )
        number = there[-1]
    else:
        (number,) = resolve(settings, version)
    reader = store.read(number)
    with _progress(reader.row_count) as advance:
        report = table_report(reader, advance)
    if output == "json":
        echo_json({**asdict(report), "total": asdict(report.total())})
    else:
        _print(report)


def _print(report: TableReport) -> None:
    from deploy.cli.tables import print_table

    names = ("rows", "share", "admitted", "refused", "evicted")

    def cells(each: FieldReport) -> list[str]:
        numbers = (each.admitted, each.refused, each.evicted)
        shown = ["-" if number is None else f"{number:,}" for number in numbers]
        return [each.field, f"{each.rows:,}", f"{each.rows / max(report.rows, 1):.1%}", *shown, clock(each.oldest_ms)]

    print_table(("field", *names, "oldest use (UTC)"), [cells(each) for each in (*report.fields, report.total())], right=names)
    memory = "memory not known" if report.size is None else f"{report.size / 1e6:,.1f} MB in the trainer"
    click.echo(f"version {report.version} of {clock(report.created_at_ms)}: {report.rows:,} rows, {memory}")
    if report.unknown:
        click.echo(f"of {report.unknown:,} rows nobody knows the field: they are from before fields were counted")


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[int], None]]:
    """A function that shows rows read on stderr, where it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns: tuple[Any, ...] = (TextColumn("rows read"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("rows", total=rows)
        yield lambda more: progress.advance(task, more)
