"""The sender of watermarks for sparse streams: it says on a timer that nothing older comes, so that labels don't stand still.

The join's watermark follows events. Where no event comes, no watermark moves, and impressions wait for their labels for as
long as that lasts. A watermark record moves it without an event.
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
    """Every `every_ms`, send now less `lateness_ms` to every partition of impressions and clicks, for ever or some rounds.

    Never beyond this machine's clock. Brokers that are away for a while are tried again with the next round.

    Returns:
        Rounds that the brokers acknowledged.

    Raises:
        FeedError: no broker answers, or a topic is missing, in the first round.
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
            # By the clock of the start, so that rounds don't drift; what was missed meanwhile is not made up for.
            passed_ms = (time.monotonic() - began) * 1_000
            await asyncio.sleep((every_ms - passed_ms % every_ms) / 1_000)
    finally:
        if feed is not None:
            await feed.__aexit__(None, None, None)
    return sent
