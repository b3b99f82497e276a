"""Trainers as processes, for tests on the real Kafka."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.settings import Settings
from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.kafka.clients import aiokafka_options
from stream.registry.log import read_registry
from stream.settings import TopicSettings
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames
from tests.forked import forked
from tests.stream.trainer.factory import MODEL, SCHEMA, headers, value

# Starting takes a second or two, more on a busy machine.
PATIENCE_S = 90.0


class Process:
    """`headrace run trainer` with a test's settings."""

    def __init__(self, settings: Settings, folder: Path, *options: str, **environment: str) -> None:
        self.log = folder / f"trainer-{time.monotonic_ns()}.log"
        fixed = own_environment(settings)
        self.log.touch()
        self.process = forked(["run", "trainer", *options], {**os.environ, **fixed, **environment}, Path.cwd(), self.log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and a clean end within the drain."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()

    def answer(self, path: str) -> str:
        """What it says over HTTP; empty until it listens."""
        for line in self.log.read_text().splitlines():
            if '"http_port":' in line:
                port = json.loads(line)["http_port"]
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
                        return str(response.read().decode())
                except OSError:
                    return ""
        return ""

    def metric(self, name: str) -> float:
        """A series' value; 0 until it is there."""
        lines = (line.rsplit(" ", 1) for line in self.answer("/metrics").splitlines())
        return next((float(number) for series, number in lines if series == f"headrace_trainer_{name}"), 0.0)


def own_environment(settings: Settings) -> dict[str, str]:
    """A test's settings, with the factory's schema and model, as variables of the environment."""
    return {
        "HEADRACE_KAFKA__BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers,
        "HEADRACE_TOPICS__PREFIX": settings.topics.prefix,
        "HEADRACE_SNAPSHOTS__URL": settings.snapshots.url,
        "HEADRACE_SNAPSHOTS__INTERVAL_MS": "200",
        "HEADRACE_FEATURES__FIELDS": json.dumps([{"name": field.name} for field in SCHEMA.fields]),
        "HEADRACE_FEATURES__EMBEDDING_DIM": str(SCHEMA.embedding_dim),
        "HEADRACE_MODEL__HIDDEN": json.dumps(MODEL.hidden),
        "HEADRACE_MODEL__BATCH_ROWS": str(MODEL.batch_rows),
        "HEADRACE_MODEL__ROW_HISTORY": str(MODEL.row_history),
        "HEADRACE_MODEL__CROSS_LAYERS": str(MODEL.cross_layers),
        "HEADRACE_TRAINER__DEVICE": "cpu",
        "HEADRACE_TRAINER__THREADS": "1",
    }


async def until(true: Callable[[], bool], process: Process, timeout_s: float = PATIENCE_S) -> None:
    ends = time.monotonic() + timeout_s
    while not true():
        assert process.process.poll() is None, process.log.read_text()
        assert time.monotonic() < ends, process.log.read_text()
        await asyncio.sleep(0.05)


async def until_version(process: Process, version: int) -> None:
    await until(lambda: process.metric("snapshot_version") >= version, process)


async def send(
    settings: Settings,
    numbers: range,
    *,
    partitions: int = 1,
    bad: Callable[[int], bool] = lambda index: False,
    **served: float,
):
    """Examples straight into `examples`, each in the partition of its number; `served` stands in each impression."""
    from aiokafka import AIOKafkaProducer

    producer = AIOKafkaProducer(**aiokafka_options(settings.kafka), max_batch_size=BATCH_BYTES)
    await producer.start()
    for partition in range(partitions):
        mine = [index for index in numbers if index % partitions == partition]
        records = [(b"x%d" % index, b"{" if bad(index) else value(index, **served), headers(index)) for index in mine]
        for future in await send_batches(producer, TopicNames.of(settings.topics).examples, partition, records):
            await future
    await producer.stop()


async def newest(settings: Settings) -> int:
    return (await read_registry(settings.kafka, TopicNames.of(settings.topics))).newest


def one_partition(settings: Settings, name: str, tmp_path: Path) -> Settings:
    """Settings of a system of its own with one partition, its topics made."""
    own = settings.model_copy(
        update={
            "topics": TopicSettings(prefix=f"{settings.topics.prefix}{name}-", partitions=1, request_partitions=1),
            "snapshots": settings.snapshots.model_copy(update={"url": str(tmp_path / name)}),
        }
    )
    create_topics(own.kafka, own.topics)
    return own


def kept(tensors: Mapping[str, object]) -> set[str]:
    """The names of what a version holds besides the model. It says when and by whom, so two trainers' may differ."""
    return {name for name in tensors if name.startswith("kept.")}
