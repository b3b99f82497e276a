"""`headrace watermarks`: the sender of watermarks for sparse streams."""

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
    help="Longest time from an event to its arrival in Kafka; join.lateness_ms and 5 s more when not given.",
)
@click.option("--every", "every_ms", type=DURATION, default="1s", show_default=True, help="Time between two rounds.")
@click.option("--limit", type=click.IntRange(min=1), help="End after this many rounds; never when not given.")
def watermarks(lateness_ms: int | None, every_ms: int, limit: int | None) -> None:
    """Send watermarks on a timer, so that labels come although no event does. Runs until SIGTERM or Ctrl-C.

    For sparse streams: while neither impressions nor clicks come, the join's watermark holds, and impressions wait for their
    labels. Each round sends now minus the lateness to every partition of both topics, never a time in the future. An event
    that takes longer than the lateness to arrive may then be late, as it may be behind any other event. One sender is
    enough, and two do no harm. Not for replays of old events: beside those, now is far ahead.

    \b
    Examples:
      headrace watermarks
      headrace watermarks --lateness 30s --every 5s
      headrace watermarks --limit 1                    from a cron job
    """
    from deploy.feeding.watermarks import send_watermarks
    from deploy.settings import load_settings
    from stream.topics.names import TopicNames

    settings = load_settings()
    lateness = settings.join.lateness_ms + 5_000 if lateness_ms is None else lateness_ms
    if every_ms < 1:
        raise click.BadParameter("expected 1ms or more, found 0", param_hint="--every")

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
