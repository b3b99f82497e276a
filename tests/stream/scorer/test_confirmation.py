"""What a heartbeat says may be relied on: once a version is named, no answer of an earlier one follows."""

from __future__ import annotations

import asyncio
from contextlib import closing
from functools import partial
from typing import Any

import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition

from stream.kafka.clients import kafka_python_options
from stream.registry.writer import RegistryWriter
from tests.stream.scorer.factory import publish, request
from tests.stream.scorer.test_worker import Scene, scene

__all__ = ["scene"]

pytestmark = pytest.mark.kafka

VERSIONS = range(1, 4)
BURST = 200  # a dozen batches of some 50 ms each: a change of the champion takes some 100 ms to arrive
LARGE = request("%s", candidates=1_500)


def test_no_answer_of_an_earlier_version_follows_a_heartbeat(scene: Scene) -> None:
    """Versions become champion, one after another, each while large requests are being scored."""
    with asyncio.Runner() as runner, closing(_Promoter(scene, runner)) as promoter:
        runner.run(publish(scene.settings, *VERSIONS, promote=False))
        promoter.promote(1)
        scene.scorer(heartbeat_ms=5_000)
        asked = 0
        for version in VERSIONS[1:]:
            for name in (f"r{number}" for number in range(asked, asked + BURST)):
                scene.producer.send(scene.names.score_requests, key=name.encode(), value=LARGE % name.encode())
            scene.until(partial(_has_more, scene, asked))
            asked += BURST
            promoter.promote(version)
            # Told at once: the next heartbeat that nothing hurries is seconds away.
            scene.until(partial(_is_told, scene, version))
    scene.until(lambda: len({answer.request_id for answer in scene.answers}) == asked)

    answers = _read(scene, scene.names.scores, "model_version")
    assert len({version for _, version in answers}) > 2, "swapped while there was work"
    for at_ms, version in _read(scene, scene.names.scorers, "version"):
        late = [found for when_ms, found in answers if when_ms > at_ms and found < version]
        assert not late, f"version {version} was told at {at_ms}, then came {len(late)} answers of {set(late)}"


def _has_more(scene: Scene, answers: int) -> bool:
    return len(scene.answers) > answers


def _is_told(scene: Scene, version: int) -> bool:
    return version in {told for _, told in _read(scene, scene.names.scorers, "version")}


class _Promoter:
    """A registry writer that is kept: its first change takes much longer than the others."""

    def __init__(self, scene: Scene, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._writer = RegistryWriter(scene.settings.kafka, scene.names, who="test")

    def promote(self, version: int) -> None:
        self._runner.run(self._writer.promote(version, "test"))

    def close(self) -> None:
        self._runner.run(self._writer.close())


def _read(scene: Scene, topic: str, field: str) -> list[tuple[int, Any]]:
    """Every record there is: when it came, and a field of its value."""
    with closing(KafkaConsumer(**kafka_python_options(scene.settings.kafka), auto_offset_reset="earliest")) as consumer:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        found: list[tuple[int, Any]] = []
        while any(consumer.position(partition) < ends[partition] for partition in partitions):
            for records in consumer.poll(timeout_ms=50).values():
                found += [(record.timestamp, msgspec.json.decode(record.value)[field]) for record in records if record.value]
        return found
