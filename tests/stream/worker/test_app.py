"""How the Faust app of a worker is built."""

from __future__ import annotations

import asyncio

from stream.settings import KafkaSettings
from stream.worker.app import MAX_POLL_INTERVAL_S, build_app


def test_a_long_rebuild_does_not_lose_its_place_in_the_group() -> None:
    """Nothing is fetched meanwhile, and after Faust's own 1,000 s without a fetch aiokafka leaves the group."""

    async def check() -> None:
        app = build_app("g", KafkaSettings(), next_offset=lambda tp: None, session_timeout_ms=6_000)
        consumer = app.consumer._thread._create_worker_consumer(app.transport)
        await consumer.stop()
        app.consumer._thread.thread_loop.close()
        assert consumer._max_poll_interval_ms == MAX_POLL_INTERVAL_S * 1_000

    asyncio.run(check())
