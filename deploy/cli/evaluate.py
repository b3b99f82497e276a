"""`headrace evaluate`: the trainer's own code over a data set, without Kafka."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import echo_json, format_option
from deploy.cli.feeding import SHARE
from deploy.cli.mapping import mapping_options, open_mapped
from deploy.cli.times import DURATION, clock, duration

if TYPE_CHECKING:
    from deploy.evaluate.play import Serving
    from deploy.evaluate.runs import Evaluated, Plan, Progress
    from deploy.evaluate.source import Source
    from model.schema import FeatureSchema

__all__ = ["evaluate"]

FRESHNESS_MS = (18_000_000, 1_800_000, 60_000, 10_000, 1_000)
"""Times between versions: from those of Monolith (Liu et al., 2022, table 2), which end at 30 minutes, to that of deltas."""

FRESHNESS_BATCH_AGE_MS = 500
"""As `trainer.max_batch_age_ms`: a batch that waited for minutes to fill would hide what a version of a second is worth."""


@click.command(context_settings={"show_default": True})
@click.argument("name")
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="Model to learn (model.name). Repeated: one run for each."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of all runs, as in model.batch_rows=512. The value is TOML. May be repeated.",
)
@click.option(
    "--run",
    "runs",
    multiple=True,
    metavar="'NAME KEY=VALUE …'",
    help="Another run, which differs from the first in these settings. May be repeated.",
)
@click.option(
    "--field",
    "fields",
    multiple=True,
    metavar="TOML",
    help='A field for the model to read besides, or in the place of the one of that name: { name = "price" }.',
)
@click.option("--without", multiple=True, metavar="FIELD", help="Another run, without this field. May be repeated.")
@click.option(
    "--permute",
    multiple=True,
    metavar="FIELD",
    help="Score once more, with this field's values exchanged among neighbouring impressions. May be repeated.",
)
@click.option(
    "--history",
    is_flag=True,
    help="Show what the row history of each field says, as at impression time and as at label time. Needs model.row_history.",
)
@click.option(
    "--serve-every",
    type=DURATION,
    multiple=True,
    help="Time between versions, event time; each answers until the next. Repeated: one line for each. "
    "[default: each score knows all that was learned by then]",
)
@click.option(
    "--serve-delay",
    type=DURATION,
    default="0s",
    help="Time from learning, or from the capture of a version, until scores know of it.",
)
@click.option(
    "--freshness",
    is_flag=True,
    help="Show what fresh weights are worth: --serve-every 5h, 30m, 1m, 10s and 1s, with --batch-age 500ms.",
)
@click.option(
    "--batch-age",
    type=DURATION,
    help="How long a batch waits for more examples, event time. [default: until it is full, as in a busy stream]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Impressions to read; all when not given.")
@click.option(
    "--until", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Read only this first share of the impressions."
)
@click.option(
    "--from",
    "start",
    type=SHARE,
    help="Judge impressions from this share of all on. [default: the last 80 % of those that are read]",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Runs of each kind, with model.seed counted up.")
@click.option("--by", multiple=True, metavar="FIELD", help="Judge the top values of this field alone. May be repeated.")
@click.option("--top", type=click.IntRange(min=1), default=10, help="Number of top values.")
@click.option(
    "--simulate",
    "simulation",
    multiple=True,
    metavar="KEY=VALUE",
    help="For simulation: an option of `headrace simulate`, as in ctr=0.02. May be repeated.",
)
@click.option(
    "--keep-clicks",
    type=SHARE,
    default=1.0,
    help="Leave out clicked impressions so that this share of them is kept: a stream with fewer clicks.",
)
@click.option(
    "--late-clicks",
    type=SHARE,
    help="Draw the delays of clicks anew, so that this share comes after join.hold_ms.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw AUC and NE over event time and the calibration by decile into this file (png, svg or pdf).",
)
@mapping_options
@format_option
def evaluate(
    name: str,
    models: tuple[str, ...],
    overrides: tuple[str, ...],
    runs: tuple[str, ...],
    fields: tuple[str, ...],
    without: tuple[str, ...],
    permute: tuple[str, ...],
    history: bool,
    serve_every: tuple[int, ...],
    serve_delay: int,
    freshness: bool,
    batch_age: int | None,
    limit: int | None,
    until: float,
    start: float | None,
    seeds: int,
    by: tuple[str, ...],
    top: int,
    simulation: tuple[str, ...],
    keep_clicks: float,
    late_clicks: float | None,
    picture: Path | None,
    output: str,
    **mapping: Any,
) -> None:
    """Learn a data set in one pass by the trainer's own code, without Kafka, and judge each score as it would be served.

    NAME is a data set of `headrace data list`, the format of a file (jsonl, parquet, csv or tsv), or `simulation`.

    \b
    Examples:
      headrace evaluate movielens-100k
      headrace evaluate kuairand --set model.batch_rows=512 --set join.hold_ms=60000
      headrace evaluate kuairand --run 'small model.hidden=[64]' --run 'large model.hidden=[800,800]' --seeds 5
      headrace evaluate kuairand --without music_id --permute tab --by tab --by hour
      headrace evaluate kuairand --set model.row_history=true --history
      headrace evaluate kuairand --freshness --picture freshness.png
      headrace evaluate kuairand --until 0.5          choose by the first half …
      headrace evaluate kuairand --from 0.5           … and show by the second
      headrace evaluate csv --path log.csv --unit s --drop session --format json
      headrace evaluate simulation --simulate rate=300 --simulate ctr=0.02 --batch-age 500ms

    Each impression is scored at its own time, by a model that has learned the labels that the join would have sent by then
    (join.window_ms, join.hold_ms, join.lateness_ms, join.negative_rate). A late click is learned as a correction. "As served"
    are these scores; a progressive score is taken just before its label is learned.

    The first run is the base: others are compared with it, impression by impression. Intervals are of 95 %, from blocks of
    consecutive impressions, and from the seeds where there are several.

    The fields are those of the settings ([features]) or, where these name none, those of the data set, which stays in memory:
    8 bytes for each field of each impression.
    """
    from deploy.evaluate import picture as pictures
    from deploy.evaluate.report import document
    from deploy.evaluate.runs import Judging
    from deploy.evaluate.runs import evaluate as evaluate_all

    if start is not None and start >= until:
        raise click.UsageError(
            f"--from: expected a share below that of --until ({until:g}), found {start:g}. Change one of them."
        )
    if picture is not None:
        pictures.check(picture)
    if freshness:
        serve_every = serve_every or FRESHNESS_MS
        batch_age = FRESHNESS_BATCH_AGE_MS if batch_age is None else batch_age
    source = _source(name, simulation, limit, mapping, until=until, by=by, keep_clicks=keep_clicks, late_clicks=late_clicks)
    plans = _plans(source.schema, models, overrides, runs, fields, without)
    count = len(source.read(plans[0].settings))
    judging = Judging(
        start=round(count * (0.2 if start is None else start / until)),
        seeds=seeds,
        serving=_servings(serve_every, serve_delay),
        batch_age_ms=batch_age,
        permute=permute,
        history=history,
        by=by,
        top=top,
    )
    with _progress(len(plans) * seeds) as show:
        evaluated = evaluate_all(plans, source.read, judging, show)
    try:
        if picture is not None:
            pictures.draw(evaluated, picture)
    finally:  # the figures are not lost with the picture
        if output == "json":
            echo_json(document(evaluated))
        else:
            _print(evaluated)


def _plans(
    schema: FeatureSchema,
    models: tuple[str, ...],
    overrides: tuple[str, ...],
    runs: tuple[str, ...],
    fields: tuple[str, ...],
    without: tuple[str, ...],
) -> list[Plan]:
    from deploy.evaluate import plans as made

    shared = made.merged(*map(made.assignment, overrides))
    more = [made.field_spec(each) for each in fields]
    planned = [made.plan(each, made.merged(shared, {"model": {"name": each}}), schema, more) for each in models]
    planned = planned or [made.plan("base", shared, schema, more)]
    first = made.merged(shared, {"model": {"name": models[0]}}) if models else shared
    for each in runs:
        name, own = made.named_run(each)
        planned.append(made.plan(name, made.merged(first, own), schema, more))
    planned += [made.without(planned[0], field) for field in without]
    names = [each.name for each in planned]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise click.UsageError(f"runs: expected a name of its own for each, found {twice[0]!r} twice. Change --run or --model.")
    return planned


def _servings(every_ms: tuple[int, ...], late_ms: int) -> tuple[Serving, ...]:
    from deploy.evaluate.play import Serving

    return tuple(Serving(f"every {duration(each)}", each, late_ms) for each in every_ms) or (Serving(late_ms=late_ms),)


def _source(name: str, simulation: tuple[str, ...], limit: int | None, mapping: dict[str, Any], **how: Any) -> Source:
    from deploy.evaluate.plans import simulation_of
    from deploy.evaluate.source import Source
    from deploy.settings import load_settings

    if simulation and name != "simulation":
        raise click.UsageError(f"--simulate: expected the name simulation, found {name}. Leave the option out.")
    if name == "simulation":
        return Source(simulation_of(simulation, limit), **how)
    return Source(open_mapped(name, settings=load_settings(), **mapping), limit=limit, **how)


def _print(evaluated: Evaluated) -> None:
    from deploy.cli.tables import print_table, styled
    from deploy.evaluate.report import tables

    stream, measured = evaluated.stream, evaluated.measured
    first, last = (clock(int(stream.shown_ms[measured[at]])) for at in (0, -1))
    click.echo(f"{stream.name}: {len(measured):,} of {len(stream):,} impressions judged, from {first} to {last}")
    for title, header, rows in tables(evaluated):
        click.echo()
        click.echo(styled(title, bold=True))
        print_table(header, rows, right=header[1:])


@contextmanager
def _progress(passes: int) -> Iterator[Progress | None]:
    """A bar over all passes; None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=float(passes))
        finished = 0

        def show(about: str, done: int, labels: int) -> None:
            nonlocal finished
            bar.update(task, description=about, completed=finished + done / labels)
            if done == labels:
                finished += 1

        yield show
