"""The scorer as a process, on the real Kafka: asked, swapped, rolled back, killed, restarted, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from deploy.demo.play import worker_environment
from deploy.processes.workers import Worker, stop_workers
from deploy.settings import Settings
from headrace.scores import Answer, ScoreStream
from state.settings import SnapshotSettings
from stream.kafka.clients import aiokafka_options, kafka_python_options
from stream.records.heartbeat import Heartbeat
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.operations import Operations, RollbackRequest
from stream.registry.writer import RegistryWriter
from stream.topics.limits import max_message_bytes
from stream.topics.names import TopicNames
from tests.forked import ForkedWorker
from tests.stream.scorer.factory import publish, request

pytestmark = pytest.mark.kafka

# Starting takes some seconds of imports, and a member that was killed is missed after its session; more on a busy machine.
PATIENCE_S = 60.0


class Scene:
    """Topics, scorers, somebody who asks and reads the answers."""

    def __init__(self, settings: Settings, folder: Path, stack: ExitStack) -> None:
        self.settings, self.folder = settings, folder
        self.names = TopicNames.of(settings.topics)
        self.workers: list[Worker] = []
        stack.callback(lambda: stop_workers(self.workers))
        options = kafka_python_options(settings.kafka)
        self.stream = stack.enter_context(ScoreStream(self.names.scores, options, from_beginning=True))
        self.producer = stack.enter_context(closing(KafkaProducer(**options)))
        self.answers: list[Answer] = []

    def scorer(self, *, ready: bool = True, url: str | None = None, **scorer: Any) -> Worker:
        store = SnapshotSettings(url=url or self.settings.snapshots.url)
        settings = self.settings.model_copy(
            update={"scorer": self.settings.scorer.model_copy(update=scorer), "snapshots": store}
        )
        log = self.folder / f"scorer-{len(self.workers)}.log"
        worker = ForkedWorker("scorer", worker_environment(settings), log, cwd=self.folder)
        self.workers.append(worker)
        worker.start()
        if ready:
            worker.wait_ready(PATIENCE_S)
        return worker

    def ask(self, *names: str, candidates: int = 3) -> None:
        for name in names:
            self.producer.send(self.names.score_requests, key=name.encode(), value=request(name, candidates=candidates))
        self.producer.flush()

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            self.answers += self.stream.poll(50)
            for worker in self.workers:
                if worker.returncode not in (None, 0, -9):
                    raise AssertionError(worker.log.read_text())
            assert time.monotonic() < deadline, [worker.log.read_text()[-3_000:] for worker in self.workers]

    def answer_to(self, name: str) -> Answer:
        self.until(lambda: any(answer.request_id == name for answer in self.answers))
        return next(answer for answer in self.answers if answer.request_id == name)

    def heartbeats(self) -> list[Heartbeat]:
        async def read() -> list[Heartbeat]:
            async with HeartbeatReader(self.settings.kafka, self.names) as reader:
                return await reader.live()

        return asyncio.run(read())

    def committed(self) -> dict[int, int | None]:
        group = f"{self.names.prefix}{self.settings.scorer.group}"
        with closing(KafkaConsumer(**kafka_python_options(self.settings.kafka), group_id=group)) as consumer:
            topic = self.names.score_requests
            return {number: consumer.committed(TopicPartition(topic, number)) for number in range(2)}


@pytest.fixture
def scene(topics: Settings, tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(topics, tmp_path, stack)


def test_from_the_first_request_to_a_clean_stop(scene: Scene) -> None:
    """No model, a model, bad requests, a swap, a broken version, a rollback, SIGTERM: one process through all of it."""
    scene.ask("early")  # before any scorer: the first start begins at the start of the log
    worker = scene.scorer(ready=False, heartbeat_ms=200)
    early = scene.answer_to("early")
    assert early.error is not None and early.error.reason == "no_model" and early.model_version is None
    assert not worker.is_ready()

    asyncio.run(publish(scene.settings, 1, 2))
    worker.wait_ready(PATIENCE_S)
    scene.until(lambda: [beat.version for beat in scene.heartbeats()] == [2])
    scene.ask("scored")
    scored = scene.answer_to("scored")
    assert [(score.id, round(score.score, 6)) for score in scored.scores] == [("c0", 0.002), ("c1", 0.002), ("c2", 0.002)]
    assert scored.model_version == 2 and scored.snapshot_age_ms is not None and scored.snapshot_age_ms < 120_000
    assert not scored.stale and scored.event["type"] == "headrace.scores.v1"
    assert scored.event["source"].startswith("/headrace/scorer/")

    # Bad requests, one of them with nobody to answer; and one whose answer the topic would refuse.
    limit = asyncio.run(max_message_bytes(scene.settings.kafka, scene.names.scores))
    assert limit == scene.settings.topics.max_message_bytes
    listed = [{"id": "i" * 520} for _ in range(1_950)]
    large = json.dumps({"request_id": "large", "candidates": listed}, separators=(",", ":")).encode()
    topic = scene.names.score_requests
    for key, value in ((b"bad", b"{"), (None, b"{}"), (b"large", large), (b"other", request("named"))):
        scene.producer.send(topic, key=key, value=value)
    scene.ask("after")
    assert scene.answer_to("after").error is None
    for name, reason in (("bad", "malformed_json"), ("large", "answer_too_large"), ("other", "id_mismatch")):
        error = scene.answer_to(name).error
        assert error is not None and error.reason == reason and not scene.answer_to(name).scores
    assert _dead_letters(scene) == [("missing_field", topic)]

    # A version whose weights were damaged: the old one goes on, and says so.
    asyncio.run(publish(scene.settings, 3, promote=False))
    (weights,) = Path(scene.settings.snapshots.url).glob("*3/serving-00000.safetensors")
    damaged = weights.read_bytes()
    weights.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    position = asyncio.run(_promote(scene, 3))
    scene.until(lambda: worker.metrics().get(("headrace_scorer_swap_failures_total", ()), 0) > 0)
    scene.ask("beside")
    assert scene.answer_to("beside").model_version == 2
    (beat,) = scene.heartbeats()
    assert beat.version == 2 and beat.registry_offset < position, "what was asked for is not in effect"
    assert beat.fallback_of == 3 and "SHA-256" in beat.fallback_reason and beat.heartbeat_ms == 200
    weights.write_bytes(damaged)
    scene.until(lambda: [(beat.version, beat.fallback_of) for beat in scene.heartbeats()] == [(3, None)])

    rolled = asyncio.run(_roll_back(scene))
    assert (rolled.previous, rolled.version, len(rolled.confirmed), rolled.unconfirmed) == (3, 2, 1, [])
    scene.ask("back")
    assert scene.answer_to("back").model_version == 2

    assert requests_of(worker) == {
        "no_model": 1,
        "scored": 4,
        "malformed_json": 1,
        "dead_letter": 1,
        "answer_too_large": 1,
        "id_mismatch": 1,
    }
    asked = time.monotonic()
    worker.ask_to_stop()
    worker.wait_stopped()
    assert worker.returncode == 0 and time.monotonic() - asked < 9
    assert scene.heartbeats() == [], "a tombstone says that nobody need wait for it"
    assert sum(offset or 0 for offset in scene.committed().values()) == 9, "every request is behind us"


def test_a_scorer_without_a_version_takes_no_request_from_one_that_has_one(scene: Scene) -> None:
    """It starts beside a healthy one, and its store lacks every version; once it can read one it takes its share."""
    asyncio.run(publish(scene.settings, 1))
    scene.scorer(heartbeat_ms=200)
    elsewhere = scene.folder / "elsewhere"
    second = scene.scorer(ready=False, heartbeat_ms=200, instance_id="second", url=str(elsewhere))
    scene.until(lambda: any(beat.worker == "second" and beat.fallback_of == 1 for beat in scene.heartbeats()))
    names = [f"r{index}" for index in range(100)]
    scene.ask(*names)
    scene.until(lambda: {answer.request_id for answer in scene.answers} >= set(names))
    assert [answer for answer in scene.answers if answer.error is not None] == []
    assert not second.is_ready() and requests_of(second) == {}
    (beat,) = [beat for beat in scene.heartbeats() if beat.worker == "second"]
    assert beat.version == -1 and "expected a whole version" in beat.fallback_reason
    assert second.metrics()["headrace_scorer_fallback", ()] == 1

    shutil.copytree(scene.settings.snapshots.url, elsewhere, dirs_exist_ok=True)
    second.wait_ready(PATIENCE_S)

    def asked_again() -> bool:
        names.append(f"r{len(names)}")
        scene.ask(names[-1])
        return requests_of(second).get("scored", 0) > 5

    scene.until(asked_again)
    assert all(answer.error is None for answer in scene.answers)


def test_a_start_with_an_unreadable_champion_answers_with_an_older_good_version(scene: Scene) -> None:
    asyncio.run(publish(scene.settings, 1, 2, 3))
    (manifest,) = Path(scene.settings.snapshots.url).glob("*3/manifest.json")
    told = manifest.read_text()
    manifest.write_text(told.replace('"kind": "full"', '"kind": "of a newer format"'))
    worker = scene.scorer(heartbeat_ms=200)
    scene.ask("first")
    assert scene.answer_to("first").model_version == 2
    scene.until(lambda: [(beat.version, beat.fallback_of) for beat in scene.heartbeats()] == [(2, 3)])
    assert "expected a manifest" in scene.heartbeats()[0].fallback_reason
    manifest.write_text(told)
    scene.until(lambda: [(beat.version, beat.fallback_of) for beat in scene.heartbeats()] == [(3, None)])
    assert worker.metrics()["headrace_scorer_fallback", ()] == 0


def test_while_nobody_has_a_version_requests_wait_for_a_bounded_time(scene: Scene) -> None:
    """Two scorers without one: each request is answered by one of them, in time; a version that comes is answered with."""
    workers = [scene.scorer(ready=False, heartbeat_ms=200, instance_id=name, no_model_after_ms=300) for name in ("a", "b")]
    scene.until(lambda: [beat.version for beat in scene.heartbeats()] == [-1, -1])
    names = [f"r{index}" for index in range(50)]
    scene.ask(*names)
    scene.until(lambda: {answer.request_id for answer in scene.answers} >= set(names))
    reasons = {answer.error.reason for answer in scene.answers if answer.error is not None}
    assert reasons == {"no_model"} and len(scene.answers) == len(names), "by one of the two"
    assert sum(requests_of(worker).get("no_model", 0) for worker in workers) == len(names)
    asyncio.run(publish(scene.settings, 1))
    for worker in workers:
        worker.wait_ready(PATIENCE_S)
    scene.ask("late")
    assert scene.answer_to("late").model_version == 1
    scene.until(lambda: sum(offset or 0 for offset in scene.committed().values()) == len(names) + 1)
    assert len(scene.answers) == len(names) + 1, "what was answered is committed, and isn't answered again"


def test_a_scorer_killed_and_restarted_answers_every_request(scene: Scene) -> None:
    asyncio.run(publish(scene.settings, 1))
    first = scene.scorer(instance_id="one")
    names = [f"r{index}" for index in range(4_000)]
    os.kill(first.pid, signal.SIGSTOP)  # so that it can't be done before the test gets to killing it
    scene.ask(*names[:3_000], candidates=300)
    os.kill(first.pid, signal.SIGCONT)
    scene.until(lambda: len(scene.answers) > 0)
    first.kill()
    assert sum(offset or 0 for offset in scene.committed().values()) < 3_000, "the test must kill it at work"
    scene.ask(*names[3_000:], candidates=300)
    scene.scorer(instance_id="one")
    scene.until(lambda: {answer.request_id for answer in scene.answers} >= set(names))
    assert all(answer.error is None and len(answer.scores) == 300 for answer in scene.answers)
    again = Counter(answer.request_id for answer in scene.answers)
    assert sum(count > 1 for count in again.values()) < 2_500, "what was committed is not answered again"


def test_partitions_move_without_a_request_lost(scene: Scene) -> None:
    """A second scorer joins and leaves while requests come."""
    asyncio.run(publish(scene.settings, 1))
    scene.scorer()
    names: list[str] = []

    def ask_on(done: Callable[[], bool]) -> None:
        def step() -> bool:
            names.append(f"r{len(names)}")
            scene.ask(names[-1])
            return done()

        scene.until(step)

    ask_on(lambda: len(scene.answers) > 20)
    second = scene.scorer(ready=False)

    ask_on(lambda: requests_of(second).get("scored", 0) > 20)
    second.ask_to_stop()
    ask_on(lambda: second.returncode is not None)
    assert second.returncode == 0
    end = len(names) + 50
    ask_on(lambda: len(names) > end)
    scene.until(lambda: {answer.request_id for answer in scene.answers} >= set(names))
    repeated = len(scene.answers) - len(names)
    assert repeated <= 0.05 * len(names) + 10, "answers under way are committed before partitions go"


def requests_of(worker: Worker) -> dict[str, float]:
    """Requests that it answered, by outcome."""
    return {labels[0]: count for (name, labels), count in worker.metrics().items() if name == "headrace_scorer_requests_total"}


async def _promote(scene: Scene, version: int) -> int:
    writer = RegistryWriter(scene.settings.kafka, scene.names, who="test")
    try:
        return (await writer.promote(version, "test")).position
    finally:
        await writer.close()


async def _roll_back(scene: Scene) -> Any:
    return await Operations(scene.settings.kafka, scene.names, "test").rollback(RollbackRequest("test", timeout_ms=15_000))


def _dead_letters(scene: Scene) -> list[tuple[str, str]]:
    async def read() -> list[tuple[str, str]]:
        from aiokafka import AIOKafkaConsumer

        consumer = AIOKafkaConsumer(
            scene.names.dead_letters, **aiokafka_options(scene.settings.kafka), auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            fetched = await consumer.getmany(timeout_ms=5_000)
        finally:
            await consumer.stop()
        headers = [dict(record.headers) for records in fetched.values() for record in records]
        return [(each["reason"].decode(), each["source_topic"].decode()) for each in headers]

    return asyncio.run(read())
