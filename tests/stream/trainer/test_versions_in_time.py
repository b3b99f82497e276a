"""Versions that come although `snapshots.min_examples` says that there is no hurry."""

from __future__ import annotations

import asyncio

from stream.records.delta import Point
from stream.trainer import log_retention
from stream.trainer.chain import Base, Published
from stream.trainer.log_retention import Limits
from tests.stream.trainer.test_snapshots import Bench, Trained, until


async def test_a_version_comes_before_kafka_deletes_deltas_after_the_newest_one(tmp_path, monkeypatch):
    """By what settings say, none would come after the first for a billion examples."""
    monkeypatch.setattr(log_retention, "AGAIN_S", 0.0)
    at, trained = Bench(tmp_path, interval_ms=100, delta_interval_ms=10, min_examples=10**9), Trained()
    trained.learn(100)
    await at.publisher.publish(trained.training.capture_version())
    running = asyncio.ensure_future(at.publisher.run(trained.training, trained.between_batches))
    trained.learn(10)
    await until(lambda: at.log.points)
    await asyncio.sleep(0.3)
    assert len(at.registry.announced) == 1, "the log keeps deltas for ever"
    at.publisher.retention.limits = Limits(size=1)  # it keeps next to nothing
    await until(lambda: len(at.registry.announced) == 2)
    await asyncio.sleep(0.3)
    assert len(at.registry.announced) == 2, "nothing has come since"
    trained.learn(10)
    await until(lambda: len(at.registry.announced) == 3)
    at.publisher.close()
    await running
    assert [each.examples_seen for each in at.registry.announced] == [100, 110, 120]


async def test_a_chain_that_begins_with_a_version_does_not_wait_for_many_examples(tmp_path):
    base = Base(Published(Point("deepfm/3/0", 5), 40), {}, in_place=False)
    at, trained = Bench(tmp_path, interval_ms=100, min_examples=10**9, base=base, newest=3), Trained()
    at.publisher._parent = 3
    running = asyncio.ensure_future(at.publisher.run(trained.training, trained.between_batches))
    trained.learn(10)
    await until(lambda: at.registry.announced)
    at.publisher.close()
    await running
