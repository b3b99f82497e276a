"""`headrace simulate`: a stream whose true click probabilities are known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import echo_json, format_option
from deploy.cli.feeding import ABOVE_0, SHARE, echo_rate, echo_watermark, no_watermark_option
from deploy.cli.times import duration

if TYPE_CHECKING:
    from deploy.feeding.simulation import CtrStep

__all__ = ["CTR_STEP", "simulate"]


class _CtrStep(click.ParamType):
    """`200:0.06` → a mean click probability of 0.06 from second 200 on."""

    name = "seconds:ctr"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> CtrStep:
        from deploy.feeding.simulation import CtrStep

        if isinstance(value, CtrStep):
            return value
        seconds, _, ctr = str(value).partition(":")
        try:
            step = CtrStep(float(seconds), float(ctr))
        except ValueError:
            step = CtrStep(-1.0, -1.0)
        if not (step.seconds > 0 and 0 < step.ctr < 1):
            self.fail(f"expected SECONDS:CTR, as in 200:0.06, found {value!r}.", param, ctx)
        return step


CTR_STEP = _CtrStep()


# Options that aren't arguments of `simulate` have the names and defaults of the fields of `Simulation`.
@click.command(context_settings={"show_default": True})
@click.option("--rate", type=ABOVE_0, default=1_000.0, help="Impressions a second.")
@click.option("--count", type=click.IntRange(min=1), help="Impressions to send.")
@click.option("--duration", type=ABOVE_0, help="Seconds of stream to send, instead of --count.")
@click.option("--max", "at_once", is_flag=True, help="Send as fast as possible a stream whose event time ends now.")
@click.option("--ctr", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.1, help="Mean click probability.")
@click.option(
    "--ctr-step",
    "ctr_steps",
    type=CTR_STEP,
    multiple=True,
    metavar="SECONDS:CTR",
    help="Another mean click probability from that second of the stream on. May be repeated.",
)
@click.option(
    "--delay",
    type=click.Choice(["exponential", "lognormal", "uniform"]),
    default="exponential",
    help="Distribution of click delays.",
)
@click.option("--delay-ms", type=ABOVE_0, default=5_000.0, help="Mean click delay, in ms.")
@click.option("--shuffle-ms", type=click.IntRange(min=0), default=0, help="Send each event up to this many ms late.")
@click.option("--duplicates", type=SHARE, default=0.0, help="Share of events to send twice.")
@click.option("--malformed", type=SHARE, default=0.0, help="Broken records to send in addition, as a share of impressions.")
@click.option(
    "--drift",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Quarter turns of the true weights in 100,000 impressions; after one, they are unrelated to the first ones.",
)
@click.option(
    "--new-items",
    type=click.FloatRange(min=0),
    default=0.0,
    help="New items in each second of the stream. They are most popular at first, and fade.",
)
@click.option("--new-item-share", type=SHARE, default=0.3, help="Share of impressions that show one of the new items.")
@click.option(
    "--new-item-life",
    "new_item_life_s",
    type=ABOVE_0,
    default=60.0,
    help="Mean age of a new item when it is shown, in seconds.",
)
@click.option(
    "--hour-ms",
    type=click.IntRange(min=1),
    default=3_600_000,
    help="How long the feature hour keeps one value, in ms. With 60000 its value changes every minute.",
)
@click.option(
    "--truth",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write the true probabilities to: Parquet if it ends with .parquet, else JSON lines.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of everything that is drawn.")
@click.option(
    "--first-id",
    type=click.IntRange(min=0),
    help="Number of the first impression's id. By default it follows from the clock, so that runs don't collide.",
)
@no_watermark_option
@format_option
def simulate(
    rate: float,
    count: int | None,
    duration: float | None,
    at_once: bool,
    ctr_steps: tuple[CtrStep, ...],
    truth: Path | None,
    first_id: int | None,
    no_watermark: bool,
    output: str,
    **fields: Any,
) -> None:
    """Send simulated impressions and clicks, then a watermark.

    The true click probabilities are known (--truth). Events can be late, come twice or be broken, and the click-through rate
    can drift, as in real streams.

    \b
    Examples:
      headrace simulate --rate 500 --duration 60 --truth truth.parquet
      headrace simulate --max --count 1000000 --drift 0.5
      headrace simulate --rate 200 --count 20000 --shuffle-ms 3000 --duplicates 0.01 --malformed 0.001
      headrace simulate --rate 300 --duration 600 --ctr 0.05 --delay lognormal --delay-ms 20000 --new-items 0.5 --hour-ms 60000
      headrace simulate --rate 300 --duration 600 --ctr 0.03 --ctr-step 200:0.06 --ctr-step 400:0.03

    The features are those of `headrace data schema simulation`. A click more than join.window_ms after its impression
    doesn't count, so keep --delay-ms well below join.window_ms.

    The watermark at the end lies join.window_ms + join.lateness_ms + 1 s beyond the stream, so that the last impressions get
    their labels. Begin another stream when that time has passed: up to then the join labels each impression as it arrives,
    without waiting for its click.
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
        ctr_steps=tuple(sorted(ctr_steps)),
        first_id=now_ms * 1_000 if first_id is None else first_id,
        # A stream that is sent at once must not lie in the future: the join rejects events far ahead of their arrival.
        start_ms=now_ms - round(total / rate * 1_000) if at_once else now_ms,
        **fields,
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
            on_overlap=_warn_of_overlap,
        )
        with stopping_on_interrupt(simulator.stop):
            stats = simulator.run()
    summary = {
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
        echo_json(summary)
        return
    for name in ("impressions", "clicks", "duplicates", "malformed"):
        click.echo(f"{name:12} {summary[name]:,}")
    echo_rate(stats)
    echo_watermark(stats)
    if truth:
        click.echo(f"truth        {truth}")


def _warn_of_overlap(beyond_ms: int) -> None:
    click.echo(
        f"Note: the streams in the topics end with a watermark {duration(beyond_ms)} after the beginning of this one. Until "
        "then the join labels each impression as it arrives, and its click comes as a correction. Begin after that time to see "
        "labels as in a live stream.",
        err=True,
    )
