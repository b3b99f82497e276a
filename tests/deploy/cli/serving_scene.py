"""A trainer, a scorer and an application as processes on Kafka, for tests of commands that try something on requests."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from kafka import KafkaProducer

from deploy.demo.play import worker_environment
from deploy.processes.workers import stop_workers
from deploy.settings import Settings
from headrace.scores import Answer, ScoreStream
from model.schema import FeatureSchema
from state.registry import RegistryState
from stream.kafka.clients import kafka_python_options
from stream.records.heartbeat import Heartbeat
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.log import read_registry
from stream.topics.names import TopicNames
from tests.forked import ForkedWorker
from tests.stream.trainer.factory import MODEL, SCHEMA, headers, value

PATIENCE_S = 90.0


class Scene:
    """A trainer, a scorer, and an application that asks, shows and is clicked."""

    def __init__(self, settings: Settings, folder: Path, stack: ExitStack) -> None:
        snapshots = settings.snapshots.model_copy(update={"interval_ms": 500, "first_examples": 100, "first_clicks": 10})
        self.settings = settings.model_copy(
            update={
                "snapshots": snapshots,
                "features": FeatureSchema(fields=SCHEMA.fields, embedding_dim=SCHEMA.embedding_dim),
                "model": MODEL,
                "trainer": settings.trainer.model_copy(update={"device": "cpu", "threads": 1}),
                "scorer": settings.scorer.model_copy(update={"heartbeat_ms": 200, "threads": 1}),
            }
        )
        self.names = TopicNames.of(settings.topics)
        self.workers = [
            ForkedWorker(kind, worker_environment(self.settings), folder / f"{kind}.log", cwd=folder)
            for kind in ("trainer", "scorer")
        ]
        stack.callback(lambda: stop_workers(self.workers))
        options = kafka_python_options(settings.kafka)
        self.stream = stack.enter_context(ScoreStream(self.names.scores, options, from_beginning=True))
        self.producer = stack.enter_context(closing(KafkaProducer(**options)))
        self.sent = self.asked = 0
        self.chance = random.Random(7)
        for worker in self.workers:
            worker.start()

    def until(self, done: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := done()):
            for worker in self.workers:
                worker.check()
            assert time.monotonic() < deadline, [worker.log.read_text()[-3_000:] for worker in self.workers]
            time.sleep(0.05)
        return found

    def registry(self, track: str = "main") -> RegistryState:
        return asyncio.run(read_registry(self.settings.kafka, self.names.of_track(track)))

    def add_trainer(self, track: str, folder: Path, **changed: Any) -> ForkedWorker:
        """Start a trainer on a track of its own, with these changes of its model."""
        settings = self.settings.model_copy(
            update={"snapshots": self.settings.snapshots.on_track(track), "model": MODEL.model_copy(update=changed)}
        )
        worker = ForkedWorker("trainer", worker_environment(settings), folder / f"trainer-{track}.log", cwd=folder)
        self.workers.append(worker)
        worker.start()
        return worker

    def beat(self) -> Heartbeat | None:
        async def read() -> list[Heartbeat]:
            async with HeartbeatReader(self.settings.kafka, self.names, every_track=True) as reader:
                return await reader.live()

        return next(iter(asyncio.run(read())), None)

    def learn(self, shown: list[dict[str, Any]]) -> None:
        """Send examples, each with what its impression carries of an answer."""
        for more in shown:
            number, self.sent = self.sent, self.sent + 1
            # Noisy, so that no version predicts them nearly without loss: relative differences would be huge then.
            clicked = self.chance.random() < (0.6 if number % 7 < 2 else 0.2)
            self.producer.send(
                self.names.examples,
                key=b"x%d" % number,
                value=value(number, **more),
                headers=headers(number, label=b"1" if clicked else b"0"),
                partition=0,
            )
        self.producer.flush()

    def ask(self, count: int) -> list[Answer]:
        """Answers to this many requests about the impressions that are sent next."""
        wanted = {}
        for number in range(self.sent, self.sent + count):
            name, self.asked = f"request-{self.asked}", self.asked + 1
            features = json.loads(value(number))["features"]
            request = {"request_id": name, "candidates": [{"id": "a", "features": features}]}
            self.producer.send(self.names.score_requests, key=name.encode(), value=json.dumps(request).encode())
            wanted[name] = number
        self.producer.flush()
        found: dict[str, Answer] = {}

        def all_there() -> bool:
            found.update({each.request_id: each for each in self.stream.poll(50) if each.request_id in wanted})
            return len(found) == count

        self.until(all_there)
        return [found[name] for name in wanted]


def shown(answer: Answer, **changed: Any) -> dict[str, Any]:
    """What an application puts into the impression of the first candidate."""
    (score,) = answer.scores
    there = {"score": score.score, "model_version": answer.model_version, "delta": answer.delta}
    if score.shadow is not None:
        there |= {"shadow_score": score.shadow, "shadow_version": answer.shadow_version}
    return there | changed
