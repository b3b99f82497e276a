"""`headrace bootstrap`: a model from history."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import (
    ask_kafka,
    echo_json,
    format_option,
    model_option,
    track_option,
    who,
    with_model,
    with_track,
)
from deploy.cli.feeding import stopping_on_interrupt
from deploy.cli.mapping import mapped_columns, mapping_options
from deploy.cli.times import TIME, clock

if TYPE_CHECKING:
    from deploy.bootstrap.learning import Progress

__all__ = ["bootstrap"]


@click.command(context_settings={"show_default": True})
@click.argument("name")
@click.option("--until", type=TIME, help="Learn impressions before this time only, such as 2026-05-01T00:00Z.")
@click.option("--limit", type=click.IntRange(min=1), help="Impressions to learn; all when not given.")
@model_option
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of click delays that are drawn.")
@click.option("--new-model", is_flag=True, help="Publish a new model although the registry knows versions already.")
@click.option(
    "--checkpoints",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for checkpoints; state_dir/bootstrap when not given.",
    show_default=False,
)
@click.option(
    "--checkpoint-every", "every", type=click.FloatRange(min=0), default=60.0, help="Seconds between two checkpoints."
)
@track_option
@mapping_options
@format_option
def bootstrap(
    name: str,
    until: int | None,
    limit: int | None,
    model: str | None,
    seed: int,
    new_model: bool,
    checkpoints: Path | None,
    every: float,
    output: str,
    **mapping: Any,
) -> None:
    """Learn a model from history, and publish it as the first version.

    NAME is a data set of `headrace data list`, or the format of a file: jsonl, parquet, csv or tsv. Everything that `replay`
    takes can be learned.

    \b
    Examples:
      headrace bootstrap kuairand
      headrace bootstrap parquet --path log.parquet --column timestamp=ts --column clicked=label
      headrace bootstrap jsonl --path log.jsonl --until 2026-05-01T00:00Z
      headrace bootstrap kuairand --new-model        a new model beside the champion
      headrace bootstrap kuairand --model wide_deep  its trainer needs --model wide_deep or model.name, too

    The trainer's own code learns the impressions in event-time order, each with its final label: clicked within
    join.window_ms, or not. The version says up to which event time it has learned. A trainer that goes on from it skips all
    examples of the stream up to then, so that none counts twice. Let history end before clicks are missing in it: one window
    before the log was written, by --until.

    No trainer may run meanwhile, except while a new model is learned; it must be stopped before that is published.

    A run that was killed or interrupted goes on from its last checkpoint when the same command is given again, and ends with
    the same weights. Checkpoints are deleted once the version is published.
    """
    from deploy.bootstrap.learning import Checkpoints, Run
    from deploy.bootstrap.publishing import Publishing
    from deploy.bootstrap.source import Source, fingerprint
    from deploy.cli.failures import EXIT_INTERRUPTED, Failure
    from deploy.datasets import Limits
    from deploy.settings import load_settings

    settings = with_track(with_model(load_settings(), model))
    columns = mapped_columns(name, **{key: value for key, value in mapping.items() if key != "path"})
    source = Source(
        name=name,
        schema=settings.features,
        window_ms=settings.join.window_ms,
        seed=seed,
        path=mapping["path"],
        columns=columns,
        limits=Limits(settings.topics.max_message_bytes, settings.join.max_future_ms),
        until_ms=until,
        limit=limit,
    )
    identity = fingerprint(source, settings.model, settings.table)
    publishing = Publishing(settings, who=who(), new_model=new_model)
    saved = Checkpoints(checkpoints or settings.state_dir / "bootstrap", identity)
    before = ask_kafka(settings, publishing.require_ready(identity), "the registry of versions")
    if before is not None:
        saved.delete()
        document = {"dataset": name, "version": before.version, "promoted": before.promoted, "reason": before.reason}
        if output == "json":
            echo_json({**document, "published_before": True})
        else:
            click.echo(f"version      {before.version}, published before from the same history ({before.reason})")
        return
    run = Run(
        source,
        settings.model,
        saved,
        device=settings.trainer.device,
        row_precision=settings.snapshots.row_precision,
        window=settings.trainer.metrics_window,
        table=settings.table,
        threads=settings.trainer.threads,
        checkpoint_s=every,
    )
    first = run.training.examples_seen
    with _progress(f"bootstrap {name}") as show, stopping_on_interrupt(run.stop):
        finished = run.learn(show)
    took_s = run.learned_s
    if not finished:
        raise Failure(
            f"bootstrap {name}: stopped after {run.training.examples_seen:,} examples. Run the same command again to go on.",
            EXIT_INTERRUPTED,
        )
    captured = run.capture()
    history, report = run.history(identity), run.evaluation.freeze().report()
    published = ask_kafka(settings, publishing.publish(captured, report, history), "the registry of versions")
    captured.frozen.close()
    saved.delete()
    window = report["progressive", "window"]
    document = {
        "dataset": name,
        "version": published.version,
        "promoted": published.promoted,
        "reason": published.reason,
        "published_before": False,
        "examples": history.examples,
        "clicks": report["progressive", "total"].positives,
        "until_ms": history.until_ms,
        "resumed_at": run.resumed_at,
        "set_aside": run.set_aside.count,
        "set_aside_ids": run.set_aside.ids,
        "examples_per_s": round((history.examples - first) / max(took_s, 1e-9), 1),
        "elapsed_s": round(took_s, 3),
        "auc": window.auc,
        "ne": window.normalised_entropy,
        "calibration": window.calibration,
    }
    if output == "json":
        echo_json(document)
        return
    click.echo(f"version      {published.version}: {published.reason}")
    click.echo(f"examples     {history.examples:,}, {document['clicks']:,} of them clicked")
    if run.set_aside.count:
        click.echo(f"set aside    {run.set_aside.count:,} whose update was not finite: {', '.join(run.set_aside.ids)}")
    click.echo(f"cut-off      {clock(history.until_ms)}: the stream's examples up to then are skipped")
    resumed = f", after a checkpoint at row {run.resumed_at:,}" if run.resumed_at else ""
    click.echo(f"rate         {document['examples_per_s']:,.0f} examples/s for {took_s:,.1f} s{resumed}")
    click.echo(
        f"progressive  AUC {window.auc:.4f}, NE {window.normalised_entropy:.4f}, calibration {window.calibration:.3f}, "
        f"over the last {window.examples:,} examples"
    )


@contextmanager
def _progress(what: str) -> Iterator[Callable[[Progress], None] | None]:
    """A function that shows a bar with examples a second on stderr; None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("examples")),
        *(TextColumn("{task.fields[rate]}"), TimeElapsedColumn()),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, rate="")

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.examples, total=progress.total, rate=f"{progress.per_s:,.0f} examples/s")

        yield show
