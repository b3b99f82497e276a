"""`headrace simulate`: a stream whose true click probabilities are known."""

from __future__ import annotations

import time
from pathlib import Path

import click

from deploy.cli.common import echo_json, format_option

__all__ = ["simulate"]


class CtrStep(click.ParamType):
    """`SECONDS:CTR`, as two numbers."""

    name = "seconds:ctr"

    def convert(
        self, value: str | tuple[float, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        seconds, _, ctr = value.partition(":")
        try:
            step = float(seconds), float(ctr)
        except ValueError:
            step = -1.0, -1.0
        if not (step[0] > 0 and 0 < step[1] < 1):
            self.fail(f"expected SECONDS:CTR, as in 200:0.06, found {value!r}.", param, ctx)
        return step


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
    help="Mean click probability.",
)
@click.option(
    "--ctr-step",
    "ctr_steps",
    type=CtrStep(),
    multiple=True,
    metavar="SECONDS:CTR",
    help="Another mean click probability from that many seconds of the stream on. May be repeated.",
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
    "--new-items",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Items that appear in a second of the stream, most popular at first, then fading.",
)
@click.option(
    "--new-item-share",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Share of impressions that show these.",
)
@click.option(
    "--new-item-life",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds since it appeared at which such an item is shown, on average.",
)
@click.option(
    "--hour-ms",
    type=click.IntRange(min=1),
    default=3_600_000,
    show_default=True,
    help="Length of a value of the feature hour: 60000 makes a new hour begin each minute.",
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
    ctr_steps: tuple[tuple[float, float], ...],
    delay: str,
    delay_ms: float,
    shuffle_ms: int,
    duplicates: float,
    malformed: float,
    drift: float,
    new_items: float,
    new_item_share: float,
    new_item_life: float,
    hour_ms: int,
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
      headrace simulate --rate 300 --duration 600 --ctr 0.05 --delay lognormal --delay-ms 20000 --new-items 0.5 --hour-ms 60000
      headrace simulate --rate 300 --duration 600 --ctr 0.03 --ctr-step 200:0.06 --ctr-step 400:0.03

    The features are those of `headrace data schema simulation`. Clicks later than join.window_ms after their impression
    don't count, so keep --delay-ms well below it.
    """
    from deploy.cli.feeding import progress_bar, stopping_on_interrupt
    from deploy.feeding.simulate import Simulator
    from deploy.feeding.simulation import Simulation, TruthFile
    from deploy.settings import load_settings

    if (count is None) == (duration is None):
        raise click.UsageError("expected --count or --duration, found both or neither. Give one of them.")
    total = count if count is not None else max(1, round((duration or 0) * rate))
    now_ms = time.time_ns() // 1_000_000
    simulation = Simulation(
        rate=rate,
        count=total,
        ctr=ctr,
        ctr_steps=tuple(sorted(ctr_steps)),
        delay=delay,  # type: ignore[arg-type]  # click has checked it
        delay_ms=delay_ms,
        shuffle_ms=shuffle_ms,
        duplicates=duplicates,
        malformed=malformed,
        drift=drift,
        hour_ms=hour_ms,
        new_items=new_items,
        new_item_share=new_item_share,
        new_item_life_s=new_item_life,
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
