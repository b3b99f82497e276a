"""Scorers follow the log, as processes on the real Kafka: deltas, versions, rollback, a restart, a bad delta, no topic."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from stream.deltas.live_digests import compare_live
from stream.errors import TopicError
from stream.kafka.clients import kafka_python_options
from stream.kafka.cluster import describe_cluster
from stream.records.heartbeat import Heartbeat
from stream.registry.operations import Operations, RollbackRequest
from stream.topics.admin import create_topics
from tests.stream.scorer.plain_trainer import PlainTrainer
from tests.stream.scorer.test_worker import Scene, scene

__all__ = ["scene"]

pytestmark = pytest.mark.kafka


@pytest.fixture
def trainer(scene: Scene) -> Iterator[PlainTrainer]:
    with closing(PlainTrainer(scene.settings)) as made:
        yield made


def ask(scene: Scene, name: str) -> tuple[int | None, int, float]:
    """The version, the deltas since, and the score per mille of an answer."""
    scene.ask(name)
    answer = scene.answer_to(name)
    assert answer.error is None and {score.score for score in answer.scores} == {answer.scores[0].score}
    return answer.model_version, answer.delta, round(1_000 * answer.scores[0].score, 3)


def until_at(scene: Scene, trainer: PlainTrainer, scorers: int = 1) -> list[Heartbeat]:
    """Wait until all scorers report the trainer's weights."""
    wanted = (True, trainer.chain, trainer.sequence, f"{trainer.digest:016x}")
    beats: list[Heartbeat] = []

    def there() -> bool:
        beats[:] = scene.heartbeats()
        return [(beat.following, beat.chain, beat.sequence, beat.digest) for beat in beats] == [wanted] * scorers

    scene.until(there)
    return beats


def operations(scene: Scene) -> Operations:
    return Operations(scene.settings.kafka, scene.names, "test")


def test_from_a_start_to_a_rollback_a_restart_and_a_bad_delta(scene: Scene, trainer: PlainTrainer) -> None:
    trainer.version(1)
    trainer.delta(3)
    worker = scene.scorer(heartbeat_ms=200, heal_jitter_ms=100)
    (beat,) = until_at(scene, trainer)
    assert (beat.version, beat.delta, beat.problem) == (1, 3, "") and beat.weights_age_ms is not None
    assert ask(scene, "caught up") == (1, 3, 4.0)

    trainer.delta(2)
    trainer.version(2)
    trainer.delta(1)
    until_at(scene, trainer)
    scene.until(lambda: [(beat.version, beat.delta) for beat in scene.heartbeats()] == [(2, 1)])
    assert ask(scene, "named by the version since") == (2, 1, 7.0)

    # A rollback pins exactly that version, whatever flows; and back.
    done = asyncio.run(operations(scene).rollback(RollbackRequest("test", timeout_ms=15_000)))
    assert (done.version, len(done.confirmed), done.unconfirmed) == (1, 1, [])
    trainer.delta(2)
    assert ask(scene, "pinned") == (1, 0, 1.0)
    (beat,) = scene.heartbeats()
    assert (beat.following, beat.chain, beat.sequence) == (False, trainer.chain, 0)
    back = asyncio.run(operations(scene).undo(done, timeout_ms=15_000))
    assert (back.version, back.held, len(back.confirmed), back.unconfirmed) == (2, False, 1, [])
    until_at(scene, trainer)
    assert ask(scene, "resumed") == (2, 3, 9.0)

    # Another trainer goes on.
    trainer.restart()
    trainer.delta(2)
    until_at(scene, trainer)
    assert ask(scene, "a new chain, no version of it yet") == (2, 5, 11.0)

    # A delta whose digest is wrong: the last whole state answers, until a version has it.
    trainer.delta(1, digest=1)
    trainer.delta(2)
    scene.until(lambda: any(beat.problem.startswith("wrong_digest") for beat in scene.heartbeats()))
    assert ask(scene, "the last whole state") == (2, 5, 11.0)
    trainer.version(3)
    trainer.delta(1)
    until_at(scene, trainer)
    assert ask(scene, "healed")[2] == 15.0 and scene.heartbeats()[0].problem == ""

    found = asyncio.run(compare_live(scene.settings.kafka, scene.names, wait_ms=10_000))
    assert found.compared >= 1 and found.differences == [] and found.alone == []
    metrics = worker.metrics()
    assert metrics["headrace_scorer_replica_loads_total", ("start",)] == 1
    assert metrics["headrace_scorer_replica_loads_total", ("wrong_digest",)] == 1
    assert metrics["headrace_scorer_deltas_total", ("wrong_digest",)] == 2, "read once more"
    assert metrics["headrace_scorer_click_to_answer_seconds_count", ()] > 0
    worker.ask_to_stop()
    worker.wait_stopped()
    assert worker.returncode == 0


def test_two_scorers_serve_the_same_weights_and_a_check_says_so(scene: Scene, trainer: PlainTrainer) -> None:
    trainer.version(1)
    for name in ("a", "b"):
        scene.scorer(heartbeat_ms=200, instance_id=name, scrub_s=1)
    for _ in range(5):
        trainer.delta(3)
        until_at(scene, trainer, scorers=2)
    found = asyncio.run(compare_live(scene.settings.kafka, scene.names, wait_ms=10_000))
    assert sorted(found.beats) == ["a", "b"] and found.compared >= 8 and found.differences == [] and found.alone == []
    for worker in scene.workers:
        scene.until(lambda: worker.metrics().get(("headrace_scorer_scrubs_total", ("right",)), 0) > 0)  # noqa: B023
        assert ("headrace_scorer_scrubs_total", ("wrong",)) not in worker.metrics()


def test_without_the_topic_versions_are_served_whole_until_it_is_there(scene: Scene, trainer: PlainTrainer) -> None:
    trainer.delta(1)
    trainer.version(1)
    _delete(scene, scene.names.deltas)
    scene.scorer(heartbeat_ms=200)
    assert ask(scene, "whole") == (1, 0, 2.0)
    (beat,) = scene.heartbeats()
    assert not beat.following and "topics create" in beat.problem
    trainer.make()
    trainer.version(2)
    scene.until(lambda: [beat.version for beat in scene.heartbeats()] == [2])
    assert ask(scene, "the next one") == (2, 0, 3.0)
    create_topics(scene.settings.kafka, scene.settings.topics)
    trainer.restart()
    trainer.delta(1)
    trainer.version(3)
    trainer.delta(2)
    until_at(scene, trainer)
    assert ask(scene, "following") == (3, 2, 6.0)


def _delete(scene: Scene, topic: str) -> None:
    from kafka.admin import KafkaAdminClient

    options: Any = kafka_python_options(scene.settings.kafka)
    admin = KafkaAdminClient(**options)
    admin.delete_topics([topic])
    admin.close()

    def gone() -> bool:
        with suppress(TopicError):
            asyncio.run(describe_cluster(scene.settings.kafka, (topic,)))
            return False
        return True

    scene.until(gone)
