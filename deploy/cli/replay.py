"""`headrace replay`: a data set as a stream of impressions and clicks."""

from __future__ import annotations

from typing import Any

import click

from deploy.cli.common import echo_json, format_option
from deploy.cli.mapping import mapping_options, open_mapped

__all__ = ["replay"]


@click.command()
@click.argument("name")
@click.option("--speed", type=click.FloatRange(min=0, min_open=True), help="Multiple of event time: 1 is as it happened.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most this many events a second.")
@click.option(
    "--max", "at_once", is_flag=True, help="As fast as it goes (the default; can't be combined with --speed or --rate)."
)
@click.option("--limit", type=click.IntRange(min=1), help="Impressions to send; all when not given.")
@click.option("--loop", is_flag=True, help="Begin again at the end, later and with new ids, until Ctrl-C or --limit.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn.")
@click.option(
    "--scored",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of impressions for which scores are asked first; they then carry the score.",
)
@click.option("--candidates", type=click.IntRange(min=1), default=10, show_default=True, help="Items in a score request.")
@click.option("--no-watermark", is_flag=True, help="Don't end with watermark records: the last impressions stay unlabelled.")
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

    \b
    Examples:
      headrace replay movielens-100k                      as fast as it goes
      headrace replay kuairand --speed 1000               a day in a minute and a half
      headrace replay kuairand --rate 5000 --scored 0.1   with score requests for a tenth
      headrace replay open-bandit --loop --rate 100       a stream that goes on
      headrace replay parquet --path log.parquet --column timestamp=ts --column clicked=label
      headrace replay csv --path log.csv --unit s --drop session

    A file is checked whole before anything is sent: a row that the pipeline would not take ends the command, with the file,
    the column and the row.

    The topics must exist (`headrace topics create`), and the workers' feature schema should be the data set's
    (`headrace data schema NAME`). A second replay into the same topics may be older than the first one's last watermark: it
    is refused where all of it would be late. Use another topics.prefix, or `headrace kafka reset`.
    """
    from deploy.cli.feeding import progress_bar, stopping_on_interrupt
    from deploy.datasets import FileDataSet
    from deploy.feeding.replay import Replayer
    from deploy.settings import load_settings

    if at_once and (speed is not None or rate is not None):
        raise click.UsageError("--max: expected neither --speed nor --rate beside it. Leave one out.")
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
    told = {
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
        echo_json(told)
        return
    click.echo(f"impressions  {stats.impressions:,}")
    click.echo(f"clicks       {stats.clicks:,}")
    if stats.clicks_beyond_window:
        after = f"more than join.window_ms ({settings.join.window_ms} ms) after their impressions"
        click.echo(f"             {stats.clicks_beyond_window:,} of them {after}: they label nothing")
    click.echo(f"rate         {stats.events_per_s:,.0f} events/s for {stats.elapsed_s:,.1f} s")
    if stats.requests:
        p50 = f", p50 {told['answer_ms_p50']} ms" if latencies else ""
        click.echo(f"scored       {stats.answers:,} answers to {stats.requests:,} requests{p50}")
    click.echo(f"watermark    {'none sent' if no_watermark else stats.watermark_ms}")
