"""What is said of a rebuild while it is under way, and of how near retention is to what one would need."""

from __future__ import annotations

import asyncio
import logging
import math
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import TopicPartition
from prometheus_client import CollectorRegistry

from stream.join import rebuild_progress as recovery
from stream.join.metrics import JoinMetrics
from stream.join.rebuild_progress import RebuildProgress, takeover_status
from stream.join.retention import NEAR, Margin, RetentionWatch
from stream.kafka.clients import aiokafka_options
from stream.topics.names import TopicNames

HOUR_MS = 3_600_000


def test_progress_is_logged_every_few_seconds_and_told_to_metrics(monkeypatch, caplog):
    clock, registry = [100.0], CollectorRegistry()
    monkeypatch.setattr(recovery, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    progress = RebuildProgress(3, JoinMetrics(registry).observe_rebuild)
    with caplog.at_level(logging.INFO, "stream.join.rebuild_progress"):
        progress.begin(4_000)
        for _ in range(12):
            clock[0] += 1.0
            progress.advance(250)
    assert [record.message for record in caplog.records] == [
        "rebuilding partition 3: 1,250 of 4,000 offsets read again (31%), 250 a second",
        "rebuilding partition 3: 2,500 of 4,000 offsets read again (62%), 250 a second",
    ]
    assert registry.get_sample_value("headrace_join_rebuild_offsets", {"partition": "3"}) == 4_000
    assert registry.get_sample_value("headrace_join_rebuild_read_offsets", {"partition": "3"}) == 3_000
    for _ in range(2):
        progress.pass_over(3)
    assert registry.get_sample_value("headrace_join_foreign_examples_total") == 6
    progress.begin(10)  # the state was damaged: begun anew
    assert (progress.done, progress.total) == (0, 10)


def test_a_partition_that_has_gone_takes_its_series_along():
    registry = CollectorRegistry()
    metrics = JoinMetrics(registry)
    for number in (3, 33):
        progress = RebuildProgress(number, metrics.observe_rebuild)
        progress.begin(10)
        for topic in ("impressions", "clicks"):
            metrics.observe_retention(topic, number, 5, 60.0)
    metrics.forget_partition(3)
    left = [sample.labels for family in registry.collect() for sample in family.samples if "partition" in sample.labels]
    assert {labels["partition"] for labels in left} == {"33"}
    assert sorted(labels["topic"] for labels in left if "topic" in labels) == ["clicks", "clicks", "impressions", "impressions"]


def test_readyz_says_how_far_it_is():
    progress = RebuildProgress(3)
    progress.begin(400)
    progress.advance(100)
    text = takeover_status([progress], 1, 4)
    assert text.startswith("partitions are being taken over: 1 of 4 done; partition 3: 100 of 400 offsets read again (25%), ")
    assert takeover_status([], 0, 0) == "partitions are being taken over: 0 of 0 done"


def margin(*, low: int = 50, start: int = 10, age_ms: int | None = HOUR_MS, retention_ms: int = 10 * HOUR_MS) -> Margin:
    now_ms = 1_700_000_000_000
    arrival_ms = None if age_ms is None else now_ms - age_ms
    return Margin.of(low=low, start=start, arrival_ms=arrival_ms, retention_ms=retention_ms, now_ms=now_ms)


def test_how_near_retention_is():
    assert (margin().offsets, margin().left_s, margin().problem) == (40, 9 * 3600, None)
    assert margin(age_ms=8 * HOUR_MS).problem is None
    assert NEAR == 0.2
    assert "reaches what a rebuild needs in 2.0 h (it is 10.0 h)" in str(margin(age_ms=8 * HOUR_MS + 1_000).problem)
    # Overdue: the segment is only not deleted yet.
    assert "any time now" in str(margin(age_ms=11 * HOUR_MS).problem)
    # Without end, or nothing behind low water.
    assert (margin(retention_ms=-1).left_s, margin(retention_ms=-1).problem) == (math.inf, None)
    assert (margin(age_ms=None).left_s, margin(age_ms=None).problem) == (math.inf, None)
    # A new log begins where low water is, and nothing is wrong.
    assert margin(low=0, start=0).problem is None
    assert "has deleted 3 offsets" in str(margin(low=7).problem)


@pytest.mark.kafka
def test_the_watch_reads_the_cluster_and_warns_once(topics, caplog):
    names = TopicNames.of(topics.topics)
    registry, low = CollectorRegistry(), {1: (2, 0, 0)}
    watch = RetentionWatch(topics.kafka, names, JoinMetrics(registry), lambda: dict(low))
    impressions = TopicPartition(names.impressions, 1)

    async def check() -> None:
        async with AIOKafkaProducer(**aiokafka_options(topics.kafka)) as producer:
            for index in range(5):
                await producer.send_and_wait(names.impressions, b"%d" % index, partition=1)
        found = await watch.look()
        assert found[impressions].offsets == 2
        # Just arrived: all of the retention is left. Of the others nothing has to be kept.
        retention_s = topics.topics.retention_ms / 1000
        assert retention_s - 60 < found[impressions].left_s <= retention_s
        assert found[TopicPartition(names.clicks, 1)].left_s == math.inf
        admin = AIOKafkaAdminClient(**aiokafka_options(topics.kafka))
        await admin.start()
        await admin.delete_records({impressions: RecordsToDelete(before_offset=4)})
        await admin.close()
        assert (await watch.look())[impressions].offsets == -2
        await watch.look()
        low.clear()
        assert await watch.look() == {}

    with caplog.at_level(logging.WARNING, "stream.join.retention"):
        asyncio.run(check())
    [warning] = [record for record in caplog.records if record.name == "stream.join.retention"]
    assert f"{names.impressions}, partition 1: retention has deleted 2 offsets that a rebuild needs" in warning.message
    labels = {"topic": names.impressions, "partition": "1"}
    assert registry.get_sample_value("headrace_join_low_water_offsets", labels) == -2
    assert registry.get_sample_value("headrace_join_retention_left_seconds", labels) > 0
