"""Checks that a join worker's memory stays flat, with millions of events, some malformed, and a window full of impressions.

    .venv/bin/python bench/load.py                       # 10 million events, 2 million pending; about 5 minutes, 10 GB of disk
    .venv/bin/python bench/load.py --events 1000000      # 1 % malformed records among 1 million events
    .venv/bin/python bench/load.py --events 300000       # quick, too short to judge memory

It runs with a real Apache Kafka, an attribution window of an hour of event time, impressions of 300 bytes and a CTR of 3 %.
Past the middle the broker is stopped for a while (SIGSTOP): what the worker buffers meanwhile shows in its memory. A
`read_committed` reader compares every label and every dead letter with the events that were sent. The exit code is 0 only if:

- each impression has its right label once;
- each malformed record has one dead letter;
- memory stays flat while the window is full. This is only judged in runs that are long enough.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from deploy.demo.play import worker_environment
from deploy.feeding.partitions import partitions_of
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.usage import usage
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.records.example import read_example
from stream.records.record import Outgoing
from stream.records.watermark import watermark_header
from stream.settings import JoinSettings, KafkaSettings, TopicSettings
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames

PARTITIONS = 4
WINDOW_MS = 3_600_000
START_MS = 1_700_000_000_000
KEY_PREFIX = b"impression-"
IMPRESSION_BYTES = 300
CTR = 0.03
SLICE = 20_000  # impressions generated and sent at a time
LEAST_PENDING = 3 * SLICE  # so that a slice is less than half a window and no click is late
AHEAD = 400_000  # most impressions that are sent and neither labelled nor pending yet, so that the log doesn't become a backlog
STOPPED_S = 8.0  # shorter than the transaction timeout; a longer stop would rightly end the worker
SAMPLE_S = 0.5
PATIENCE_S = 120.0
FULL = 0.9  # the window counts as full with this share of its well-formed impressions pending (some 2 % are clicked)
RATIO_MOST = 1.1  # largest ratio of memory's peaks, second half over first; compactions change memory by a few percent
# With fewer samples (2 minutes) of a full window, memory doesn't affect the exit code. RocksDB's write buffers, up to 64 MB a
# partition and flushed every 30 s, must have been full several times in both halves.
FULL_SAMPLES = 240


class Labels:
    """For each impression, by its number: how many labels it has, and how many of them are positive."""

    def __init__(self, impressions: int) -> None:
        self.count: npt.NDArray[np.uint8] = np.zeros(impressions, np.uint8)
        self.clicked: npt.NDArray[np.uint8] = np.zeros(impressions, np.uint8)

    def add(self, examples: list[Any]) -> None:
        """Count records of `examples`."""
        numbers = np.array([int(record.key.removeprefix(KEY_PREFIX)) for record in examples], np.int64)
        clicked = np.array([read_example(record).click_ms >= 0 for record in examples], np.bool_)
        np.add.at(self.count, numbers, 1)
        np.add.at(self.clicked, numbers[clicked], 1)


@dataclass(slots=True)
class Sent:
    """The events sent so far: the labels that must come, the number of events, and the keys of malformed records."""

    labels: Labels
    events: int = 0
    malformed: set[bytes] = field(default_factory=set)


@dataclass(slots=True)
class Sample:
    """Memory, size on disk and pending impressions of the worker at one moment."""

    rss_mb: float
    state_mb: float
    pending: int


class Stream:
    """Impressions and clicks in event-time order, a slice at a time."""

    def __init__(self, events: int, pending: int, malformed: float, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._total = int(events / (1 + CTR))
        self._spacing_ms = WINDOW_MS / pending
        self._malformed = malformed
        self._due: dict[int, list[tuple[bytes, int]]] = defaultdict(list)  # slice → its clicks: id and time
        self._pad = "x" * IMPRESSION_BYTES
        self.sent = Sent(Labels(self._total))

    def slices(self) -> Iterator[tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]]:
        """The impressions and the clicks of each slice, each as key and value."""
        for number, first in enumerate(range(0, self._total, SLICE)):
            impressions = self._impressions(number, first, min(first + SLICE, self._total))
            yield impressions, self._clicks(number)
        for number in sorted(self._due):
            yield [], self._clicks(number)

    @property
    def end_ms(self) -> int:
        """A watermark past all windows."""
        return START_MS + int(self._total * self._spacing_ms) + 3 * WINDOW_MS

    def _impressions(self, number: int, first: int, until: int) -> list[tuple[bytes, bytes]]:
        clicked = self._rng.random(until - first) < CTR
        broken = self._rng.random(until - first) < self._malformed
        delays = self._rng.integers(0, WINDOW_MS // 2, until - first)
        self.sent.labels.count[first:until] = ~broken
        self.sent.labels.clicked[first:until] = clicked & ~broken
        rows = []
        for row, index in enumerate(range(first, until)):
            time_ms = START_MS + int(index * self._spacing_ms)
            key = KEY_PREFIX + b"%010d" % index
            if broken[row]:
                rows.append((key, b'{"impression_id":"%b","timestamp":' % key))
                self.sent.malformed.add(key)
                continue
            body = f'{{"impression_id":"{key.decode()}","timestamp":{time_ms},"features":{{"user":"{index % 9973}","text":"'
            rows.append((key, (body + self._pad[: IMPRESSION_BYTES - len(body) - 3] + '"}}').encode()))
            if clicked[row]:
                delay_ms = int(delays[row])
                self._due[number + int(delay_ms / self._spacing_ms) // SLICE].append((key, time_ms + delay_ms))
        self.sent.events += len(rows)
        return rows

    def _clicks(self, number: int) -> list[tuple[bytes, bytes]]:
        due = sorted(self._due.pop(number, ()), key=lambda row: row[1])
        self.sent.events += len(due)
        return [(key, b'{"impression_id":"%b","timestamp":%d}' % (key, time_ms)) for key, time_ms in due]


class Watch:
    """Records the worker's outputs, and samples the worker."""

    def __init__(self, settings: Settings, worker: Worker, impressions: int) -> None:
        self._settings, self._worker, self._names = settings, worker, TopicNames.of(settings.topics)
        self.labels, self.examples = Labels(impressions), 0
        self.dead: list[bytes] = []
        self.samples: list[Sample] = []

    async def read(self) -> None:
        """Read committed records of `examples` and `dead-letters` until cancelled."""
        async with AIOKafkaConsumer(
            bootstrap_servers=self._settings.kafka.bootstrap_servers,
            isolation_level="read_committed",
            enable_auto_commit=False,
            max_partition_fetch_bytes=8 << 20,
        ) as consumer:
            names = self._names
            topics = (names.examples, names.dead_letters)
            consumer.assign([TopicPartition(topic, number) for topic in topics for number in range(PARTITIONS)])
            await consumer.seek_to_beginning()
            while True:
                for tp, records in (await consumer.getmany(timeout_ms=200, max_records=20_000)).items():
                    if tp.topic == names.examples:
                        self.labels.add(records)
                        self.examples += len(records)
                    else:
                        self.dead += [record.key for record in records]

    async def sample(self) -> None:
        """Sample the worker every `SAMPLE_S` seconds until cancelled."""
        while True:
            self._worker.check()
            metrics = await asyncio.to_thread(self._worker.metrics)
            pending = sum(value for (name, _), value in metrics.items() if name == "headrace_join_pending_impressions")
            state_mb = await asyncio.to_thread(_folder_mb, self._settings.state_dir)
            self.samples.append(Sample(usage(self._worker.pid).rss_mb, state_mb, int(pending)))
            await asyncio.sleep(SAMPLE_S)

    @property
    def accounted(self) -> int:
        """Number of impressions that were labelled, dead letters or pending when last seen."""
        return self.examples + len(self.dead) + (self.samples[-1].pending if self.samples else 0)


def _folder_mb(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # a compaction has removed it meanwhile
            continue
    return total / (1 << 20)


async def play(settings: Settings, stream: Stream, worker: Worker, kafka: LocalKafka, events: int) -> Watch:
    """Send all events, at most AHEAD impressions before the worker, and wait for all outputs."""
    names, watch = TopicNames.of(settings.topics), Watch(settings, worker, len(stream.sent.labels.count))
    background = [asyncio.ensure_future(watch.read()), asyncio.ensure_future(watch.sample())]
    producer: Any = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, max_batch_size=BATCH_BYTES, max_request_size=1 << 24
    )
    await producer.start()
    shown, stopped, sent = 0, False, 0

    async def check() -> None:
        for task in background:
            if task.done():
                task.result()
        await asyncio.sleep(0.02)

    async def send(topic: str, rows: list[tuple[bytes, bytes]]) -> None:
        if not rows:
            return
        numbers = partitions_of([key for key, _ in rows], PARTITIONS)
        for number in range(PARTITIONS):
            mine: list[Outgoing] = [(*rows[index], []) for index in np.flatnonzero(np.asarray(numbers) == number).tolist()]
            for future in await send_batches(producer, topic, number, mine):
                await future

    for impressions, clicks in stream.slices():
        await send(names.impressions, impressions)
        await send(names.clicks, clicks)
        sent += len(impressions)
        while sent - watch.accounted > AHEAD:
            await check()
        if not stopped and stream.sent.events > 0.6 * events:
            stopped = True
            await _stand_still(kafka)
        if stream.sent.events - shown >= events / 20:
            shown = stream.sent.events
            last = watch.samples[-1]
            click.echo(
                f"{shown:>12,} events   {watch.examples:>12,} labels   {last.pending:>10,} pending   "
                f"RSS {last.rss_mb:6.0f} MB   RocksDB {last.state_mb:6.0f} MB",
                err=True,
            )
    for topic in (names.impressions, names.clicks):
        for number in range(PARTITIONS):
            await producer.send_and_wait(topic, b"", partition=number, headers=[watermark_header(stream.end_ms)])
    changed, seen = time.monotonic(), -1
    expected = int(stream.sent.labels.count.sum())
    while watch.examples < expected or len(watch.dead) < len(stream.sent.malformed):
        await check()
        if watch.examples != seen:
            changed, seen = time.monotonic(), watch.examples
        if time.monotonic() - changed > PATIENCE_S:
            break
    await asyncio.sleep(2.0)  # for labels that should not come
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await producer.stop()
    return watch


async def _stand_still(kafka: LocalKafka) -> None:
    """Stop the broker for a while, so that it answers nothing."""
    (pid,) = kafka.pids.values()
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(STOPPED_S)
    finally:
        os.kill(pid, signal.SIGCONT)


@click.command()
@click.option("--events", type=click.IntRange(min=5 * LEAST_PENDING), default=10_000_000, show_default=True)
@click.option("--pending", type=click.IntRange(min=LEAST_PENDING), default=2_000_000, help="Impressions in a window.")
@click.option("--malformed", default=0.01, show_default=True, help="Share of impressions that are malformed JSON.")
def main(events: int, pending: int, malformed: float) -> None:
    """Measure and print; the last line is one JSON object."""
    pending = min(pending, events // 5)
    warn_if_busy()
    work = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=1024)) as kafka:
            settings = Settings(
                kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers),
                topics=TopicSettings(prefix="load-", partitions=PARTITIONS),
                join=JoinSettings(window_ms=WINDOW_MS),
                state_dir=work / "state",
            )
            create_topics(settings.kafka, settings.topics)
            worker = Worker("join", worker_environment(settings), work / "join.log", cwd=work)
            worker.start()
            try:
                worker.wait_ready()
                stream = Stream(events, pending, malformed)
                began = time.monotonic()
                watch = asyncio.run(play(settings, stream, worker, kafka, events))
                seconds = time.monotonic() - began
            finally:
                worker.ask_to_stop()
                worker.wait_stopped()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sent, came = stream.sent, watch.labels
    wrong = {
        "lost": int((came.count < sent.labels.count).sum()),
        "too_many": int((came.count > sent.labels.count).sum()),
        "mislabelled": int(((came.count == sent.labels.count) & (came.clicked != sent.labels.clicked)).sum()),
    }
    exact = not any(wrong.values()) and sorted(watch.dead) == sorted(sent.malformed)
    full = [sample.rss_mb for sample in watch.samples if sample.pending >= FULL * (1 - malformed) * pending]
    most = max(sample.pending for sample in watch.samples)
    if not full:
        raise SystemExit(f"expected some {pending:,} impressions pending, found {most:,} at most")
    early, late = max(full[: len(full) // 2] or full), max(full[len(full) // 2 :])
    flat = len(full) < FULL_SAMPLES or late <= RATIO_MOST * early
    report(
        value=round(late),
        peer=round(early),
        ratio=round(late / early, 3),
        unit="MB of RSS at most, in the second half of the time with a full window, over the first half",
        events=sent.events,
        labels=watch.examples,
        labels_expected=int(sent.labels.count.sum()),
        positives=int(came.clicked.sum()),
        **wrong,
        dead_letters=len(watch.dead),
        malformed=len(sent.malformed),
        exact=exact,
        full_samples=len(full),
        pending_most=most,
        rocksdb_mb_most=round(max(sample.state_mb for sample in watch.samples)),
        events_per_s=round(sent.events / seconds),
        broker_stopped_s=STOPPED_S,
    )
    sys.exit(not (exact and flat))


if __name__ == "__main__":
    main()
