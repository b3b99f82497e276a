"""Fixtures that every room's tests use: one real Apache Kafka for the run, settings and topics of one's own for each test."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings, Settings
from state.settings import SnapshotSettings
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.admin import create_topics

# Where a red run must mean a change for the worse, the same examples are tried every time; by hand, new ones. No test asserts
# how long an example takes: a busy machine would fail it.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("by hand", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "by hand")

# Java's second compiler costs more than it gains in a broker that lives for a minute: a start takes 5 s of CPU with the first
# compiler alone, and 9 s with both.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalKafka]:
    """A local Kafka with one broker, started when the first test asks; it ends with pytest, in whatever way that ends."""
    chosen = LocalKafkaSettings(dir=tmp_path_factory.mktemp("kafka"), start_timeout_ms=120_000)
    with LocalKafka(chosen) as running:
        yield running


@pytest.fixture
def settings(kafka: LocalKafka, request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings for this test alone: its own topic prefix and folders, two partitions, the test run's Kafka."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", request.node.name)[:60]
    prefix = f"{name}-{uuid.uuid4().hex[:8]}-"
    return Settings(
        kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers),
        topics=TopicSettings(prefix=prefix, partitions=2, request_partitions=2),
        snapshots=SnapshotSettings(url=str(tmp_path / "snapshots")),
        state_dir=tmp_path / "state",
    )


@pytest.fixture
def topics(settings: Settings) -> Settings:
    """`settings`, with the nine topics made."""
    create_topics(settings.kafka, settings.topics)
    return settings
