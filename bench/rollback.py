"""Rolls 20 scorers back and lets them go on, 100 times, under load: when all have confirmed, and what is lost or mixed.

    .venv/bin/python bench/rollback.py                              # 20 scorers, 100,000 rows, 100 rounds, about 8 minutes
    .venv/bin/python bench/rollback.py --scorers 5 --rounds 20

Each scorer is a process (`headrace run scorer`). A stand-in for the trainer publishes a delta of some 1,000 rows every 250 ms,
with dense weights by `snapshots.dense_interval_ms`, and keeps what each point of the chain scores. A client asks for scores at
a steady rate. Broker, scorers, trainer, client and operator share the machine.

A round is a rollback to version 1, exactly as `headrace snapshot rollback --to 1` does it, and then `resume`. Both are timed
from their beginning, connecting to Kafka included, to the confirmation of the last scorer. Then all answers are looked at:

- `lost`: requests without an answer; `twice`: with more than one;
- `mixed`: answers with a score that isn't the score of the version and delta that they name;
- `late`: answers by other weights than version 1 after all had confirmed the rollback, before `resume`.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import machine, report, warn_if_busy
from deploy.demo.play import worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.usage import usage
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from model.batch import FeatureBatch
from model.features import FeatureDecoder
from model.learner import Learner
from model.predictor import Predictor
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.gate_report import GateReport
from state.manifest import Manifest
from state.pieces import piece_rows
from state.store import SnapshotStore
from stream.deltas.writer import DeltaWriter
from stream.registry.operations import Operations
from stream.registry.requests import PromoteRequest, RollbackRequest
from stream.registry.writer import RegistryWriter
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames
from stream.trainer.captured import CapturedDelta, Position
from stream.trainer.chain import Chain

FIELDS, DIM, HIDDEN = 39, 16, (400, 400, 400)
PROBES, CANDIDATES = 40, 10  # distinct requests
DELTA_S, DELTA_ROWS = 0.25, 26  # examples of a delta: each touches 39 rows
TIMEOUT_MS = 60_000
SETTLE_S, READY_S = 0.5, 600.0  # between two operations; until all scorers are ready
# Scores are sent with 8 digits after the point, and a batch of another shape adds in another order.
CLOSE = 2e-6


@dataclass(slots=True)
class Answer:
    """An answer as it came: by which weights, with which scores, and when it was appended (ms, the broker's clock)."""

    version: int | None
    delta: int
    scores: list[float]
    at_ms: int


@dataclass(slots=True)
class Round:
    """What one round took, in ms, and the time in which version 1 alone may answer (ms, the broker's clock)."""

    rollback_ms: float
    resume_ms: float
    pinned_ms: int
    resumed_ms: int
    confirmations: list[float]


class Trainer:
    """A stand-in for the trainer: it learns, publishes deltas, and keeps the scores of the probes at every point."""

    def __init__(self, settings: Settings, rows: int) -> None:
        self._settings, self._names = settings, TopicNames.of(settings.topics)
        self._model = ModelSettings(hidden=HIDDEN)
        self.store = SnapshotStore(settings.snapshots)
        self.learner = Learner(settings.features, self._model, device="cpu")
        self._each = rows // FIELDS
        self._rng = np.random.default_rng(0)
        self._decoder = FeatureDecoder(settings.features)
        for first in range(0, self._each, 512):
            self._learn(np.repeat(np.arange(first, min(first + 512, self._each))[:, None], FIELDS, axis=1))
        self.ids = self._rng.integers(0, self._each, (PROBES * CANDIDATES, FIELDS))
        self._probes = self._batch(self.ids)
        self._dense_due_s = 0.0
        self.scores: dict[int, np.ndarray] = {}  # by sequence
        self.sequences: dict[int, int] = {}  # by version

    def _batch(self, ids: np.ndarray) -> FeatureBatch:
        impressions = [
            msgspec.json.encode({"impression_id": "i", "timestamp": 1, "features": features_of(row)}) for row in ids.tolist()
        ]
        return self._decoder.impressions(impressions).batch

    def _learn(self, ids: np.ndarray) -> None:
        self.learner.learn(self._batch(ids), self._rng.random(len(ids)) < 0.3)

    async def begin(self) -> None:
        """Take an epoch, and begin the chain with version 1."""
        self.registry = RegistryWriter(self._settings.kafka, self._names, who="trainer")
        self._epoch = await self.registry.take_trainer_epoch()
        self._writer = DeltaWriter(self._settings.kafka, self._names, epoch=self._epoch)
        await self._writer.open()
        self._chain = Chain(f"deepfm/{self._epoch}/0", self._writer, None, self.learner.touched_keys)
        self.learner.take_delta()
        self._replica = Predictor.of(self._settings.features, self._model, self.learner.serving_state(), device="cpu")
        self._chain.begin()
        await self.version(1)
        await self.registry.tag_good(1)

    async def version(self, number: int) -> None:
        """Write the weights as they are, and announce them. They are a point of the chain."""
        point = self._chain.published
        assert point is not None
        self._note()
        self.sequences[number] = point.point.sequence
        with self.learner.freeze() as frozen:
            manifest = self.store.write_version(
                Manifest(
                    version=number,
                    epoch=self._epoch,
                    created_at_ms=now_ms(),
                    examples_seen=self.learner.examples_seen,
                    chain=point.point.chain,
                    sequence=point.point.sequence,
                    deltas_offset=point.offset,
                    digest=f"{self.learner.digest:016x}",
                    verdict=GateReport(flow="flowing", clicks=1_000, negatives=1_000),
                    schema_hash=self._settings.features.fingerprint(),
                    features=self._settings.features.model_dump(mode="json"),
                    model=self._model.model_dump(mode="json"),
                ),
                dense=frozen.dense,
                small=frozen.small,
                pieces=frozen.pieces(piece_rows(DIM)),
            )
        announced = await self.registry.announce(manifest, gate=self._settings.snapshots)
        assert announced.promoted, announced.reason

    async def delta(self, *, dense: bool = False) -> None:
        """Learn some examples, and publish what they have changed; the dense weights too if they are due or asked for."""
        await asyncio.to_thread(self._learn, self._rng.integers(0, self._each, (DELTA_ROWS, FIELDS)))
        dense = dense or time.monotonic() >= self._dense_due_s
        if dense:
            self._dense_due_s = time.monotonic() + self._settings.snapshots.dense_interval_ms / 1_000
        delta = self.learner.take_delta(dense=dense)
        position = Position({0: self.learner.examples_seen}, 0, self.learner.examples_seen, 1.0, 0, now_ms())
        self._replica.apply(self._replica.prepare(delta))
        self._note(next_one=True)  # before a scorer can answer with it
        await self._chain.publish(CapturedDelta(delta, position))

    def _note(self, *, next_one: bool = False) -> None:
        assert self._chain.published is not None
        sequence = self._chain.published.point.sequence + int(next_one)
        self.scores[sequence] = self._replica.predict(self._probes).reshape(PROBES, CANDIDATES)

    async def run(self) -> None:
        """Publish deltas until cancelled."""
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + DELTA_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            await self.delta()

    async def close(self) -> None:
        await self._writer.close()
        await self.registry.close()


@dataclass(slots=True)
class Client:
    """Asks for scores at a steady rate, and reads all answers."""

    settings: Settings
    bodies: list[bytes]
    rate: float
    sent: int = 0
    answers: dict[bytes, list[Answer]] = field(default_factory=dict)

    async def ask(self) -> None:
        """Send requests until cancelled."""
        names = TopicNames.of(self.settings.topics)
        producer = AIOKafkaProducer(
            bootstrap_servers=self.settings.kafka.bootstrap_servers, acks="all", enable_idempotence=True
        )
        await producer.start()
        try:
            began = time.perf_counter()
            while True:
                while self.sent < (time.perf_counter() - began) * self.rate:
                    name = b"%d" % self.sent
                    body = b'{"request_id":"%b",%b' % (name, self.bodies[self.sent % PROBES])
                    await producer.send(names.score_requests, body, key=name)
                    self.sent += 1
                await asyncio.sleep(0.005)
        finally:
            await producer.stop()

    async def read(self) -> None:
        """Read answers until cancelled."""
        topics = self.settings.topics
        consumer: Any = AIOKafkaConsumer(
            bootstrap_servers=self.settings.kafka.bootstrap_servers,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        )
        await consumer.start()
        consumer.assign([TopicPartition(TopicNames.of(topics).scores, number) for number in range(topics.request_partitions)])
        try:
            async for record in consumer:
                value = msgspec.json.decode(record.value)
                scores = [each["score"] for each in value.get("scores", [])]
                answer = Answer(value.get("model_version"), value.get("delta", 0), scores, record.timestamp)
                self.answers.setdefault(record.key, []).append(answer)
        finally:
            await consumer.stop()


async def measure(settings: Settings, work: Path, scorers: int, rows: int, rounds: int, rate: float) -> dict[str, object]:
    """Start everything, do the rounds, and look at the answers."""
    names = TopicNames.of(settings.topics)
    trainer = Trainer(settings, rows)
    await trainer.begin()
    for number in range(4):
        await trainer.delta(dense=number == 3)  # a version is written where the dense weights are those of a delta
    await trainer.version(2)
    workers = [Worker("scorer", worker_environment(settings), work / f"scorer-{n}.log", cwd=work) for n in range(scorers)]
    client = Client(settings, [request_body(trainer.ids, probe) for probe in range(PROBES)], rate)
    tasks: list[asyncio.Task[None]] = []
    try:
        for worker in workers:
            worker.start()
        tasks.append(asyncio.create_task(trainer.run()))
        for worker in workers:
            await asyncio.to_thread(worker.wait_ready, READY_S)
        print(f"{scorers} scorers are ready", file=sys.stderr)
        tasks += [asyncio.create_task(client.read()), asyncio.create_task(client.ask())]
        await asyncio.sleep(10.0)  # until all have read the version that a rollback goes to
        operations = Operations(settings.kafka, names, "bench", store=trainer.store)
        cpu_s, began_s = cpu(workers), time.monotonic()
        done = [await one_round(operations, number) for number in range(rounds)]
        busy = {who: (now - cpu_s[who]) / (time.monotonic() - began_s) for who, now in cpu(workers).items()}
        tasks.pop().cancel()
        until = time.monotonic() + 30
        while len(client.answers) < client.sent and time.monotonic() < until:
            await asyncio.sleep(0.1)
        memory = max(worker.peak_rss_mb() for worker in workers)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await trainer.close()
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            await asyncio.to_thread(worker.wait_stopped)
    times = {"rollback": [each.rollback_ms for each in done], "resume": [each.resume_ms for each in done]}
    figures = {
        f"{name}_{q}_ms": round(float(np.quantile(values, level)), 1)
        for name, values in times.items()
        for q, level in (("p50", 0.5), ("p99", 0.99))
    }
    first, last = ([choose(each.confirmations) for each in done] for choose in (min, max))
    return {
        **figures,
        # Until the rollback was written: connecting, reading the registry, checking files, one transaction.
        "written_p50_ms": round(float(np.median(times["rollback"]) - np.median(last)), 1),
        "first_confirmation_p50_ms": round(float(np.median(first)), 1),
        "last_confirmation_p50_ms": round(float(np.median(last)), 1),
        **looked_at(client, trainer, done),
        "requests": client.sent,
        **{f"cores_{who}": round(share, 2) for who, share in busy.items()},
        "scorer_peak_mb": memory,
    }


async def one_round(operations: Operations, number: int) -> Round:
    """A rollback to version 1, and resume; then version 2 becomes champion again, which changes no weights."""
    rolled = await operations.rollback(RollbackRequest("bench", to=1, timeout_ms=TIMEOUT_MS))
    pinned_ms = now_ms()
    await asyncio.sleep(SETTLE_S)
    resumed_ms = now_ms()
    resumed = await operations.resume_everywhere(TIMEOUT_MS)
    for beat in (*rolled.unconfirmed, *resumed.unconfirmed):
        print(f"round {number}: {beat.worker} did not confirm", file=sys.stderr)
    if number % 10 == 0:
        print(f"round {number}: {rolled.took_ms:.0f} ms back, {resumed.took_ms:.0f} ms on", file=sys.stderr)
    await operations.promote(PromoteRequest(2, "bench"))
    await asyncio.sleep(SETTLE_S)
    return Round(rolled.took_ms, resumed.took_ms, pinned_ms, resumed_ms, [each.after_ms for each in rolled.confirmed])


def looked_at(client: Client, trainer: Trainer, rounds: list[Round]) -> dict[str, int]:
    """Every answer against what the weights that it names score."""
    found: Counter[str] = Counter()
    for number in range(client.sent):
        answers = client.answers.get(b"%d" % number, [])
        found["lost"] += not answers
        found["twice"] += len(answers) > 1
        for answer in answers:
            if answer.version is None:
                found["without_scores"] += 1
                continue
            expected = trainer.scores[trainer.sequences[answer.version] + answer.delta][number % PROBES]
            found["mixed"] += not np.allclose(expected, answer.scores, rtol=0, atol=CLOSE)
            pinned = (answer.version, answer.delta) == (1, 0)
            found["by_version_1"] += pinned
            found["late"] += not pinned and any(each.pinned_ms < answer.at_ms < each.resumed_ms for each in rounds)
    names = ("lost", "twice", "mixed", "late", "without_scores", "by_version_1")
    return {name: int(found[name]) for name in names}


def cpu(workers: list[Worker]) -> dict[str, float]:
    """Seconds of CPU so far: of all scorers, and of this process, which is trainer, client and operator."""
    return {"scorers": sum(usage(worker.pid).cpu_seconds for worker in workers), "bench": time.process_time()}


def features_of(ids: list[int]) -> dict[str, str]:
    return {f"f{at}": str(each) for at, each in enumerate(ids)}


def request_body(ids: np.ndarray, probe: int) -> bytes:
    """A request without its id."""
    rows = ids[probe * CANDIDATES : (probe + 1) * CANDIDATES].tolist()
    listed = [{"id": f"c{at}", "features": features_of(row)} for at, row in enumerate(rows)]
    return b'"context":{},"candidates":%b}' % msgspec.json.encode(listed)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--scorers", default=20, show_default=True, help="Scorer processes.")
@click.option("--rows", default=100_000, show_default=True, help="Rows of the table.")
@click.option("--rounds", default=100, show_default=True, help="Rollbacks, each with a resume.")
@click.option("--rate", default=50.0, show_default=True, help="Requests a second, of 10 candidates each.")
@click.option("--heartbeat-ms", default=1_000, show_default=True, help="scorer.heartbeat_ms.")
def main(scorers: int, rows: int, rounds: int, rate: float, heartbeat_ms: int) -> None:
    warn_if_busy()
    torch.set_num_threads(1)
    base = Settings()
    fields = tuple(FieldSpec(name=f"f{at}") for at in range(FIELDS))
    work = Path(tempfile.mkdtemp(prefix="headrace-rollback-"))
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=768)) as kafka:
            settings = base.model_copy(
                update={
                    "kafka": base.kafka.model_copy(update={"bootstrap_servers": kafka.bootstrap_servers}),
                    "topics": base.topics.model_copy(update={"partitions": 2, "request_partitions": max(2, scorers)}),
                    "snapshots": base.snapshots.model_copy(
                        update={"url": str(work / "snapshots"), "first_examples": 0, "good_after_ms": 86_400_000}
                    ),
                    "scorer": base.scorer.model_copy(update={"threads": 1, "heartbeat_ms": heartbeat_ms}),
                    "features": FeatureSchema(fields=fields, embedding_dim=DIM),
                    "state_dir": work / "state",
                }
            )
            create_topics(settings.kafka, settings.topics)
            found = asyncio.run(measure(settings, work, scorers, rows, rounds, rate))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sizes = {"scorers": scorers, "rows": rows, "rounds": rounds, "requests_per_s": rate, "heartbeat_ms": heartbeat_ms}
    report(
        benchmark="rollback",
        value=found["rollback_p99_ms"],
        unit="ms until all scorers confirmed, p99",
        **sizes,
        **found,
        machine=machine(),
    )


if __name__ == "__main__":
    main()
