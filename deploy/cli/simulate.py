"""`headrace simulate`: a stream whose true click probabilities are known."""

from __future__ import annotations

import time
from pathlib import Path

import click

from deploy.cli.common import echo_json, format_option

__all__ = ["simulate"]


@click.command()
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), default=1_000.0, show_default=True, help="Impressions a second."
)
@click.option("--count", type=click.IntRange(min=1), help="Impressions to send.")
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), help="Seconds of stream, instead of --count.")
@click.option(
    "--max", "at_once", is_flag=True, help="Don't wait: the stream's time ends now, and it is sent as fast as it goes."
)
@click.option(
    "--ctr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Mean click probability, roughly.",
)
@click.option(
    "--delay",
    type=click.Choice(["exponential", "lognormal", "uniform"]),
    default="exponential",
    show_default=True,
    help="Distribution of click delays.",
)
@click.option(
    "--delay-ms", type=click.FloatRange(min=0, min_open=True), default=5_000.0, show_default=True, help="Mean click delay."
)
@click.option(
    "--shuffle-ms", type=click.IntRange(min=0), default=0, show_default=True, help="Events come up to this much late."
)
@click.option("--duplicates", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share of events sent twice.")
@click.option(
    "--malformed",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Broken records, as a share of impressions.",
)
@click.option(
    "--drift",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Quarter turns of the true weights in 100,000 impressions.",
)
@click.option(
    "--truth",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the true probabilities there (.parquet, else JSON lines).",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything drawn.")
@click.option(
    "--first-id",
    type=click.IntRange(min=0),
    help="Number of the first id; drawn from the clock when not given, so that runs don't collide.",
)
@click.option("--no-watermark", is_flag=True, help="Don't end with watermark records: the last impressions stay unlabelled.")
@format_option
def simulate(
    rate: float,
    count: int | None,
    duration: float | None,
    at_once: bool,
    ctr: float,
    delay: str,
    delay_ms: float,
    shuffle_ms: int,
    duplicates: float,
    malformed: float,
    drift: float,
    truth: Path | None,
    seed: int,
    first_id: int | None,
    no_watermark: bool,
    output: str,
) -> None:
    """Send simulated impressions and clicks, with what real streams do to a pipeline, then a watermark.

    \b
    Examples:
      headrace simulate --rate 500 --duration 60 --truth truth.parquet
      headrace simulate --max --count 1000000 --drift 0.5
      headrace simulate --rate 200 --count 20000 --shuffle-ms 3000 --duplicates 0.01 --malformed 0.001

    The features are those of `headrace data schema simulation`. Clicks later than join.window_ms after their impression
    don't count, so keep --delay-ms well below it.
    """
    from deploy.cli.feeding import progress_bar, stopping_on_interrupt
    from deploy.settings import load_settings
    from deploy.simulate import Simulator
    from deploy.simulation import Simulation, TruthFile

    if (count is None) == (duration is None):
        raise click.UsageError("expected --count or --duration, found both or neither. Give one of them.")
    total = count if count is not None else max(1, round((duration or 0) * rate))
    now_ms = time.time_ns() // 1_000_000
    simulation = Simulation(
        rate=rate,
        count=total,
        ctr=ctr,
        delay=delay,  # type: ignore[arg-type]  # click has checked it
        delay_ms=delay_ms,
        shuffle_ms=shuffle_ms,
        duplicates=duplicates,
        malformed=malformed,
        drift=drift,
        first_id=now_ms * 1_000 if first_id is None else first_id,
        # Sent at once, it must not lie in the future: the join refuses events far ahead of their arrival.
        start_ms=now_ms - round(total / rate * 1_000) if at_once else now_ms,
        seed=seed,
    )
    settings = load_settings()
    with progress_bar("simulate", total) as show:
        simulator = Simulator(
            simulation,
            settings,
            paced=not at_once,
            truth=TruthFile(truth) if truth else None,
            end_watermark=not no_watermark,
            on_progress=show,
        )
        with stopping_on_interrupt(simulator.stop):
            stats = simulator.run()
    told = {
        "impressions": stats.impressions,
        "clicks": stats.clicks,
        "duplicates": stats.duplicates,
        "malformed": stats.malformed,
        "events_per_s": round(stats.events_per_s, 1),
        "elapsed_s": round(stats.elapsed_s, 3),
        "watermark_ms": stats.watermark_ms if not no_watermark else None,
        "truth": str(truth) if truth else None,
    }
    if output == "json":
        echo_json(told)
        return
    for name in ("impressions", "clicks", "duplicates", "malformed"):
        click.echo(f"{name:12} {told[name]:,}")
    click.echo(f"rate         {stats.events_per_s:,.0f} events/s for {stats.elapsed_s:,.1f} s")
    click.echo(f"watermark    {'none sent' if no_watermark else stats.watermark_ms}")
    if truth:
        click.echo(f"truth        {truth}")
