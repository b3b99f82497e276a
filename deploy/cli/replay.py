"""`headrace replay`: a data set as a stream of impressions and clicks."""

from __future__ import annotations

from typing import Any

import click

from deploy.cli.common import echo_json, format_option
from deploy.cli.feeding import ABOVE_0, SHARE, echo_rate, echo_watermark, no_watermark_option
from deploy.cli.mapping import mapping_options, open_mapped

__all__ = ["replay"]


@click.command(context_settings={"show_default": True})
@click.argument("name")
@click.option("--speed", type=ABOVE_0, help="Multiple of event time: 1 is as fast as it happened.")
@click.option("--rate", type=ABOVE_0, help="At most this many events a second.")
@click.option(
    "--max", "at_once", is_flag=True, help="As fast as possible (the default; can't be combined with --speed or --rate)."
)
@click.option("--limit", type=click.IntRange(min=1), help="Impressions to send; all when not given.")
@click.option("--loop", is_flag=True, help="Start again at the end, with later times and new ids, until Ctrl-C or --limit.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of everything that is drawn.")
@click.option(
    "--scored",
    type=SHARE,
    default=0.0,
    help="Share of impressions for which a score is requested first; they then carry that score.",
)
@click.option("--candidates", type=click.IntRange(min=1), default=10, help="Items in a score request.")
@no_watermark_option
@mapping_options
@format_option
def replay(
    name: str,
    speed: float | None,
    rate: float | None,
    at_once: bool,
    limit: int | None,
    loop: bool,
    seed: int,
    scored: float,
    candidates: int,
    no_watermark: bool,
    output: str,
    **mapping: Any,
) -> None:
    """Send a data set's impressions and clicks in event-time order, then a watermark beyond the last window.

    NAME is a data set of `headrace data list`, or the format of a file: jsonl, parquet, csv or tsv.

    \b
    Examples:
      headrace replay movielens-100k                      as fast as possible
      headrace replay kuairand --speed 1000               a day in a minute and a half
      headrace replay kuairand --rate 5000 --scored 0.1   with score requests for one in ten
      headrace replay open-bandit --loop --rate 100       a stream that goes on
      headrace replay parquet --path log.parquet --column timestamp=ts --column clicked=label
      headrace replay csv --path log.csv --unit s --drop session

    A file is checked as a whole before anything is sent. A row that the pipeline would reject ends the command with an error
    that names the file, the column and the row.

    The topics must exist (`headrace topics create`), and the workers' feature schema should be the data set's
    (`headrace data schema NAME`).

    A second replay into the same topics may be older than the last watermark of the first one. The command rejects it if all
    of its events would be late. Use another topics.prefix, or `headrace kafka reset`.
    """
    from deploy.cli.feeding import progress_bar, stopping_on_interrupt
    from deploy.datasets import FileDataSet
    from deploy.feeding.replay import Replayer
    from deploy.settings import load_settings

    if at_once and (speed is not None or rate is not None):
        raise click.UsageError("--max: expected neither --speed nor --rate beside it, found one. Leave one of them out.")
    settings = load_settings()
    data_set = open_mapped(name, seed=seed, settings=settings, **mapping)
    if isinstance(data_set, FileDataSet):
        data_set.check(settings.features)
    size = data_set.size()
    total = limit if loop or size is None else min(size, limit or size)
    with progress_bar(f"replay {name}", total) as show:
        replayer = Replayer(
            data_set,
            settings,
            speed=speed,
            rate=rate,
            limit=limit,
            loop=loop,
            seed=seed,
            scored_fraction=scored,
            candidates=candidates,
            end_watermark=not no_watermark,
            on_progress=show,
        )
        with stopping_on_interrupt(replayer.stop):
            stats = replayer.run()
    latencies = sorted(stats.answer_ms)
    summary = {
        "dataset": name,
        "impressions": stats.impressions,
        "clicks": stats.clicks,
        "clicks_beyond_window": stats.clicks_beyond_window,
        "events_per_s": round(stats.events_per_s, 1),
        "elapsed_s": round(stats.elapsed_s, 3),
        "requests": stats.requests,
        "answers": stats.answers,
        "answer_ms_p50": round(latencies[len(latencies) // 2], 1) if latencies else None,
        "event_time_ms": stats.event_time_ms,
        "watermark_ms": stats.watermark_ms if not no_watermark else None,
    }
    if output == "json":
        echo_json(summary)
        return
    click.echo(f"impressions  {stats.impressions:,}")
    click.echo(f"clicks       {stats.clicks:,}")
    if stats.clicks_beyond_window:
        after = f"more than join.window_ms ({settings.join.window_ms} ms) after their impressions"
        click.echo(f"             {stats.clicks_beyond_window:,} of them {after}: they label nothing")
    echo_rate(stats)
    if stats.requests:
        p50 = f", p50 {summary['answer_ms_p50']} ms" if latencies else ""
        click.echo(f"scored       {stats.answers:,} answers to {stats.requests:,} requests{p50}")
    echo_watermark(stats)
