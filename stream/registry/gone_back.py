"""Waits for a trainer that was sent back."""

from __future__ import annotations

import asyncio

from state.rewinds import Rewind
from stream.registry.follower import RegistryFollower
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["gone_back_in_time"]


async def gone_back_in_time(kafka: KafkaSettings, names: TopicNames, operation: str, timeout_ms: int) -> Rewind | None:
    """Wait until the trainer has gone back as an operation asked for.

    Returns:
        The rewind; None when the trainer hasn't gone back in time.

    Raises:
        NoAnswer: Kafka can't be reached.
    """
    news = asyncio.Event()
    follower = RegistryFollower(kafka, names, on_change=lambda state: news.set())
    await follower.start()
    try:
        async with asyncio.timeout(timeout_ms / 1_000):
            while True:
                rewind = follower.state.rewinds.of(operation)
                if rewind is not None and rewind.up_to is not None:
                    return rewind
                news.clear()
                await news.wait()
    except TimeoutError:
        return None
    finally:
        await follower.close()
