"""`headrace watermarks`: sending watermarks for sparse streams."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import click

from deploy.cli.times import DURATION, duration

__all__ = ["watermarks"]


@click.command()
@click.option(
    "--lateness",
    "lateness_ms",
    type=DURATION,
    help="Longest time from an event to its arrival in Kafka; join.lateness_ms plus 5 s when not given.",
)
@click.option("--every", "every_ms", type=DURATION, default="1s", show_default=True, help="Time between two rounds.")
@click.option("--limit", type=click.IntRange(min=1), help="End after this many rounds; never when not given.")
def watermarks(lateness_ms: int | None, every_ms: int, limit: int | None) -> None:
    """Send watermarks on a timer, so that labels come even while no event comes. Runs until SIGTERM or Ctrl-C.

    It is for sparse streams: while neither impressions nor clicks come, the join's watermark stands still, and impressions
    wait for their labels. Each round sends a watermark to every partition of both topics: now minus the lateness, never a
    time in the future. An event that takes longer than the lateness to arrive may then be late, as it may be after any other
    event. One sender is enough; two do no harm. Don't run it during a replay of old events: now is far ahead of their times.

    \b
    Examples:
      headrace watermarks
      headrace watermarks --lateness 30s --every 5s
      headrace watermarks --limit 1                    one round, from a cron job
    """
    from deploy.feeding.watermarks import send_watermarks
    from deploy.settings import load_settings
    from stream.topics.names import TopicNames

    settings = load_settings()
    lateness = settings.join.lateness_ms + 5_000 if lateness_ms is None else lateness_ms
    if every_ms < 1:
        raise click.BadParameter("expected 1ms or more, found 0. Give a longer time.", param_hint="--every")

    async def run() -> int:
        sending = asyncio.ensure_future(
            send_watermarks(
                settings.kafka, TopicNames.of(settings.topics), lateness_ms=lateness, every_ms=every_ms, rounds=limit
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not in the main thread
                loop.add_signal_handler(number, sending.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            return await sending
        return 0

    click.echo(f"sending now minus {duration(lateness)} every {duration(every_ms)}; Ctrl-C ends it", err=True)
    asyncio.run(run())
