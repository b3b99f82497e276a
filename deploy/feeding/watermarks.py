"""Sending watermarks on a timer, for sparse streams.

The join's watermark follows the events. While no event comes, the watermark stands still, and impressions wait for their
labels. A watermark record moves the watermark on without an event.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time

from deploy.errors import FeedError
from deploy.feeding.feed import Feed
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["send_watermarks"]

log = logging.getLogger(__name__)


async def send_watermarks(
    kafka: KafkaSettings, names: TopicNames, *, lateness_ms: int, every_ms: int, rounds: int | None = None
) -> int:
    """Every `every_ms`, send a watermark of now minus `lateness_ms` to every partition of impressions and clicks.

    A watermark is never later than this machine's clock. When the brokers can't be reached, the next round tries again.

    Args:
        rounds: end after so many; never when None.

    Returns:
        How many rounds the brokers acknowledged.

    Raises:
        FeedError: no broker answers or a topic is missing, before the first round has succeeded.
    """
    if lateness_ms < 0:
        raise ValueError(f"lateness_ms: expected 0 or more, found {lateness_ms}: a watermark in the future makes events late")
    feed: Feed | None = None
    sent = 0
    began = time.monotonic()
    try:
        for number in itertools.count(1):
            try:
                if feed is None:
                    feed = await Feed(kafka).__aenter__()
                await feed.watermark((names.impressions, names.clicks), time.time_ns() // 1_000_000 - lateness_ms)
                await feed.flush()
                sent += 1
            except FeedError as error:
                if not sent:
                    raise
                log.warning("no watermark this time, trying again in %d ms: %s", every_ms, error)
                broken, feed = feed, None
                if broken is not None:
                    await broken.__aexit__(None, None, None)
            if number == rounds:
                break
            # Rounds are counted from the start, so that they don't drift. A round that was missed is left out.
            passed_ms = (time.monotonic() - began) * 1_000
            await asyncio.sleep((every_ms - passed_ms % every_ms) / 1_000)
    finally:
        if feed is not None:
            await feed.__aexit__(None, None, None)
    return sent
