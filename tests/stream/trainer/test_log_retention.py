"""A version is due at half of what `deltas` keeps, by age or by size, counted from the newest version."""

from __future__ import annotations

import math

import pytest

from deploy.settings import Settings
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames
from stream.trainer.log_retention import AGAIN_S, Limits, LogRetention, Mark


def test_half_of_the_age_or_of_the_size_is_the_time() -> None:
    at = LogRetention(Limits(age_s=3_600, size=1_000), Mark(0, 100.0))
    assert not at.is_due(1e9), "nothing came after the version, so nothing can be missing"
    at.sent(499)
    assert not at.is_due(100.0 + 1_799)
    assert at.is_due(100.0 + 1_800)
    at.sent(1)
    assert at.is_due(100.0)


def test_what_came_while_a_version_was_written_counts_for_the_next_one() -> None:
    at = LogRetention(Limits(size=1_000))
    at.sent(600)
    mark = at.tried(10.0)
    at.sent(500)
    assert not at.is_due(10.0 + AGAIN_S - 1), "one is under way"
    assert at.is_due(10.0 + AGAIN_S), "it failed, so the older one is still the newest"
    at.announced(mark)
    assert at.is_due(10.0 + AGAIN_S)
    at.announced(at.tried(100.0))
    assert not at.is_due(1e9)


def test_a_trainer_that_starts_counts_what_came_before_it() -> None:
    assert LogRetention(Limits(size=1_000), before=500).is_due(0.0)
    assert LogRetention(Limits(age_s=60), Mark(0, -30.0), before=1).is_due(0.0)
    assert not LogRetention(before=10**15).is_due(1e12), "without a limit there is no hurry"


@pytest.mark.kafka
async def test_the_topic_says_how_long(topics: Settings) -> None:
    names, at = TopicNames.of(topics.topics), LogRetention()
    await at.look(topics.kafka, names.deltas)
    expected = Limits(topics.topics.deltas_retention_ms / 1_000, topics.topics.deltas_retention_bytes)
    assert at.limits == expected
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1", request_timeout_ms=1_000)
    await at.look(nowhere, names.deltas)
    assert at.limits == expected
    await at.look(topics.kafka, names.snapshots)
    assert math.isinf(at.limits.size)
