"""Rolls 20 scorers back and lets them go on, 100 times, under load: when all have confirmed, and what is lost or mixed.

    .venv/bin/python bench/rollback.py                              # 20 scorers, 100,000 rows, 100 rounds, about 8 minutes
    .venv/bin/python bench/rollback.py --scorers 5 --rounds 20

Each scorer is a process (`headrace run scorer`). A stand-in for the trainer publishes a delta of some 1,000 rows every 250 ms,
with dense weights by `snapshots.dense_interval_ms`, and keeps what each point of the chain scores. A client asks for scores at
a steady rate. The operator has a process of its own, as a command has; it has been started before. Broker, scorers, trainer,
client and operator share the machine.

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
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
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
from bench.stand_in import CANDIDATES, PROBES, Trainer, bench_settings, features_of, now_ms
from deploy.demo.play import worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.usage import usage
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from state.store import SnapshotStore
from stream.registry.operations import Operations
from stream.registry.requests import PromoteRequest, RollbackRequest
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames

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
    operator_cpu_ms: float


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


async def measure(
    settings: Settings, work: Path, broker: int, scorers: int, rows: int, rounds: int, rate: float
) -> dict[str, object]:
    """Start everything, do the rounds, and look at the answers. `broker` is the broker's pid."""
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
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as operator:
            await operate(operator, settings, "hold")  # the process has started, and imported what it needs
            await operate(operator, settings, "resume")
            cpu_s, began_s = cpu(workers, broker), time.monotonic()
            done = [await one_round(operator, settings, number) for number in range(rounds)]
        busy = {who: (now - cpu_s[who]) / (time.monotonic() - began_s) for who, now in cpu(workers, broker).items()}
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
        "operator_cpu_p50_ms": round(float(np.median([each.operator_cpu_ms for each in done])), 1),
        **looked_at(client, trainer, done),
        "requests": client.sent,
        **{f"cores_{who}": round(share, 2) for who, share in busy.items()},
        "scorer_peak_mb": memory,
    }


async def one_round(operator: ProcessPoolExecutor, settings: Settings, number: int) -> Round:
    """A rollback to version 1, and resume; then version 2 becomes champion again, which changes no weights."""
    rolled, cpu_ms = await operate(operator, settings, "rollback")
    pinned_ms = now_ms()
    await asyncio.sleep(SETTLE_S)
    resumed_ms = now_ms()
    resumed, _ = await operate(operator, settings, "resume")
    for beat in (*rolled.unconfirmed, *resumed.unconfirmed):
        print(f"round {number}: {beat.worker} did not confirm", file=sys.stderr)
    written_ms = rolled.took_ms - max((each.after_ms for each in rolled.confirmed), default=0.0)
    print(
        f"round {number}: {rolled.took_ms:.0f} ms back, written after {written_ms:.0f} ms; {resumed.took_ms:.0f} ms on",
        file=sys.stderr,
    )
    await operate(operator, settings, "promote")
    await asyncio.sleep(SETTLE_S)
    confirmations = [each.after_ms for each in rolled.confirmed]
    return Round(rolled.took_ms, resumed.took_ms, pinned_ms, resumed_ms, confirmations, cpu_ms)


async def operate(operator: ProcessPoolExecutor, settings: Settings, what: str) -> tuple[Any, float]:
    """Run an operation in the operator's process. Returns what it returns, and the CPU time that it took (ms)."""
    return await asyncio.get_running_loop().run_in_executor(operator, in_operator, settings, what)


def in_operator(settings: Settings, what: str) -> tuple[object, float]:
    """One operation, on an event loop of its own."""
    names, store = TopicNames.of(settings.topics), SnapshotStore(settings.snapshots)
    operations = Operations(settings.kafka, names, "bench", store=store)
    works: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "rollback": lambda: operations.rollback(RollbackRequest("bench", to=1, timeout_ms=TIMEOUT_MS)),
        "resume": lambda: operations.resume_everywhere(TIMEOUT_MS),
        "promote": lambda: operations.promote(PromoteRequest(2, "bench")),
        "hold": lambda: operations.hold("bench"),
    }
    began_s = time.process_time()
    done = asyncio.run(works[what]())
    return done, (time.process_time() - began_s) * 1_000


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


def cpu(workers: list[Worker], broker: int) -> dict[str, float]:
    """Seconds of CPU so far: of all scorers, of the broker, and of this process, which is trainer and client."""
    scorers = sum(usage(worker.pid).cpu_seconds for worker in workers)
    return {"scorers": scorers, "broker": usage(broker).cpu_seconds, "bench": time.process_time()}


def request_body(ids: np.ndarray, probe: int) -> bytes:
    """A request without its id."""
    rows = ids[probe * CANDIDATES : (probe + 1) * CANDIDATES].tolist()
    listed = [{"id": f"c{at}", "features": features_of(row)} for at, row in enumerate(rows)]
    return b'"context":{},"candidates":%b}' % msgspec.json.encode(listed)


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--scorers", default=20, show_default=True, help="Scorer processes.")
@click.option("--rows", default=100_000, show_default=True, help="Rows of the table.")
@click.option("--rounds", default=100, show_default=True, help="Rollbacks, each with a resume.")
@click.option("--rate", default=50.0, show_default=True, help="Requests a second, of 10 candidates each.")
@click.option("--heartbeat-ms", default=1_000, show_default=True, help="scorer.heartbeat_ms.")
def main(scorers: int, rows: int, rounds: int, rate: float, heartbeat_ms: int) -> None:
    warn_if_busy()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="headrace-rollback-"))
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=768)) as kafka:
            settings = bench_settings(kafka.bootstrap_servers, work, scorers, heartbeat_ms=heartbeat_ms)
            create_topics(settings.kafka, settings.topics)
            found = asyncio.run(measure(settings, work, next(iter(kafka.pids.values())), scorers, rows, rounds, rate))
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
