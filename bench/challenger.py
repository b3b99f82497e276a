"""What a challenger costs a scorer: CPU of an idle scorer that follows one track, and a second one beside.

    .venv/bin/python bench/challenger.py               # two minutes on two cores, alone on the machine

Two trainers learn the same 500 examples a second, and send four deltas a second each. The scorer gets no requests. Stretches
without and with a share for the second trainer's track take turns. The last line is one JSON object. What a request of the
share costs is that of any shadow: `bench/candidate.py`.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import click
from kafka import KafkaProducer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from deploy.demo.play import worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.usage import usage
from deploy.processes.workers import Worker, stop_workers
from deploy.settings import LocalKafkaSettings, Settings
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.settings import SnapshotSettings
from stream.kafka.clients import kafka_python_options
from stream.records.heartbeat import Heartbeat
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.log import read_registry
from stream.registry.track_operations import TrackOperations
from stream.settings import KafkaSettings, ScorerSettings, TopicSettings, TrainerSettings
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames

FIELDS, RATE, STRETCH_S, PATIENCE_S = 20, 500, 12.0, 120.0


def send(settings: Settings, over: threading.Event) -> None:
    """Examples of `FIELDS` values each, a twentieth of them clicked, until it is over."""
    topic = TopicNames.of(settings.topics).examples
    with closing(KafkaProducer(**kafka_python_options(settings.kafka))) as producer:
        number, began = 0, time.monotonic()
        while not over.is_set():
            for _ in range(RATE // 20):
                features = ",".join(f'"f{index}":"{(number * (index + 7)) % 997}"' for index in range(FIELDS))
                at_ms = 1_650_000_000_000 + number
                value = f'{{"impression_id":"x{number}","timestamp":{at_ms},"features":{{{features}}}}}'
                headers = {"label": int(number % 20 == 0), "weight": 1, "kind": "first"}
                headers |= {"impression_ms": at_ms, "source_offset": number}
                listed = [(name, str(each).encode()) for name, each in headers.items()]
                producer.send(topic, key=b"x%d" % number, value=value.encode(), headers=listed)
                number += 1
            time.sleep(max(began + number / RATE - time.monotonic(), 0))


class System:
    """The processes, and what their scorer says."""

    def __init__(self, settings: Settings, work: Path, stack: ExitStack) -> None:
        self.settings, self.names = settings, TopicNames.of(settings.topics)
        self.operations = TrackOperations(settings.kafka, self.names, "bench", snapshots=settings.snapshots)
        beside = settings.model_copy(update={"snapshots": settings.snapshots.on_track("beside")})
        kinds = (("trainer", settings), ("trainer", beside), ("scorer", settings))
        self.workers = [
            Worker(kind, worker_environment(own), work / f"{index}.log", cwd=work) for index, (kind, own) in enumerate(kinds)
        ]
        stack.callback(lambda: stop_workers(self.workers))
        for worker in self.workers:
            worker.start()

    def beat(self) -> Heartbeat | None:
        async def read() -> list[Heartbeat]:
            async with HeartbeatReader(self.settings.kafka, self.names) as scorers:
                return await scorers.live()

        return next(iter(asyncio.run(read())), None)

    def until_following(self, *, beside: bool) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (beat := self.beat()) is None or not beat.following or any(e.version > 0 for e in beat.shadows) != beside:
            for worker in self.workers:
                worker.check()
            assert time.monotonic() < deadline, "the scorer doesn't follow"
            time.sleep(0.2)

    def share(self, share: float) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while asyncio.run(read_registry(self.settings.kafka, self.names.of_track("beside"))).champion.version is None:
            assert time.monotonic() < deadline, "the second trainer has no champion"
            time.sleep(0.2)
        asyncio.run(self.operations.share("beside", share, "bench", timeout_ms=10_000))
        self.until_following(beside=share > 0)

    def cpu_percent(self) -> float:
        """Of the scorer, over a stretch."""
        pid = self.workers[-1].pid
        time.sleep(1.0)
        before, began = usage(pid).cpu_seconds, time.monotonic()
        time.sleep(STRETCH_S)
        return (usage(pid).cpu_seconds - before) / (time.monotonic() - began) * 100


@click.command()
@click.option("--rounds", default=2, show_default=True)
def main(rounds: int) -> None:
    """Measure and print; the last line is one JSON object."""
    work = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    warn_if_busy()
    over = threading.Event()
    try:
        with ExitStack() as stack:
            kafka = stack.enter_context(LocalKafka(LocalKafkaSettings(dir=work / "kafka")))
            settings = Settings(
                kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers),
                topics=TopicSettings(partitions=1, request_partitions=1),
                features=FeatureSchema(fields=tuple(FieldSpec(name=f"f{index}") for index in range(FIELDS))),
                model=ModelSettings(hidden=(64, 64)),
                trainer=TrainerSettings(device="cpu", threads=1),
                scorer=ScorerSettings(threads=1),
                snapshots=SnapshotSettings(url=str(work / "snapshots"), interval_ms=10_000),
                state_dir=work / "state",
            )
            create_topics(settings.kafka, settings.topics, track="beside")
            sender = threading.Thread(target=send, args=(settings, over))
            sender.start()
            stack.callback(sender.join)
            stack.callback(over.set)
            system = System(settings, work, stack)
            system.until_following(beside=False)
            alone, beside = [], []
            for _ in range(rounds):
                alone.append(system.cpu_percent())
                system.share(0.05)
                beside.append(system.cpu_percent())
                system.share(0.0)
                click.echo(f"alone {alone[-1]:5.1f} % of a core   with a challenger {beside[-1]:5.1f} %")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    mean = sum(alone) / rounds, sum(beside) / rounds
    report(alone_percent=round(mean[0], 1), beside_percent=round(mean[1], 1), ratio=round(mean[1] / mean[0], 2))


if __name__ == "__main__":
    main()
