"""Events a second that one join worker labels on one core, compared with a peer that does the same join.

    .venv/bin/python bench/join.py                                         # about 3 minutes
    .venv/bin/python bench/join.py --quick                                 # fewer events, too few for a result
    .venv/bin/python bench/join.py --peer kafka-streams --impressions 2720000 --pairs 5   # about 12 minutes

A real Apache Kafka runs on the other core. Impressions of 700 bytes and clicks (CTR 3 %) are in the log before a worker starts.
Event times are spaced so that the window holds 300,000 pending impressions, and windows expire all the time. A run is timed
from the moment when the partitions are assigned and fetching begins until a `read_committed` reader has read every label. This
reader compares each label with the log.

The peers:

- `faust`: an ordinary Faust agent with tables (`peer_faust_join.py`). It gets fewer events, since it is slower;
- `kafka-streams`: the same join on the Processor API of Kafka Streams, exactly once (`kafka_streams/`, built by Maven).
  Headrace and the peer read the same topics in turns, `--pairs` times, and the medians are reported.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.structs import TopicPartition

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.peer_kafka_streams import KafkaStreamsPeer, pinned
from deploy.demo.play import worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.usage import usage
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.records.watermark import watermark_header
from stream.settings import JoinSettings, KafkaSettings, TopicSettings
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames

PARTITIONS = 4
WINDOW_MS = 60_000
SPACING_US = 200  # 5,000 impressions a second of event time: 300,000 in a window
CTR = 0.03
START_MS = 1_700_000_000_000
IMPRESSION_BYTES = 700


@dataclass(slots=True)
class Truth:
    """The right labels of a log: by partition and offset of the impression, whether it was clicked."""

    events: int
    clicked: list[bytearray]

    @property
    def impressions(self) -> int:
        return sum(len(partition) for partition in self.clicked)

    @property
    def clicks(self) -> int:
        return sum(sum(partition) for partition in self.clicked)


def log_of(impressions: int, seed: int = 0, *, ended: bool = True) -> dict[str, list[list[tuple[bytes, bytes, list[Any]]]]]:
    """Records of both topics by partition, in event-time order. If `ended`, a watermark record follows in each partition."""
    rng = np.random.default_rng(seed)
    partitioner, every = DefaultPartitioner(), list(range(PARTITIONS))
    out: dict[str, list[list[Any]]] = {name: [[] for _ in every] for name in ("impressions", "clicks")}
    clicked = rng.random(impressions) < CTR
    delays = rng.integers(0, WINDOW_MS - 1_000, impressions)
    due: list[tuple[int, bytes, int]] = []
    pad = "".join(chr(97 + i % 26) for i in range(IMPRESSION_BYTES))
    for index in range(impressions):
        time_ms = START_MS + index * SPACING_US // 1000
        key = b"impression-%010d" % index
        body = f'{{"impression_id":"{key.decode()}","timestamp":{time_ms},"features":{{"user":"{index % 9973}","text":"'
        value = (body + pad[: IMPRESSION_BYTES - len(body) - 3] + '"}}').encode()
        partition = partitioner(key, every, every)
        out["impressions"][partition].append((key, value, []))
        if clicked[index]:
            due.append((time_ms + int(delays[index]), key, partition))
    for time_ms, key, partition in sorted(due):
        value = b'{"impression_id":"%s","timestamp":%d}' % (key, time_ms)
        out["clicks"][partition].append((key, value, []))
    if not ended:
        return out
    mark = [watermark_header(START_MS + impressions * SPACING_US // 1000 + 10 * WINDOW_MS)]
    for partitions in out.values():
        for records in partitions:
            records.append((None, b"", mark))
    return out


async def fill(settings: Settings, impressions: int, *, ended: bool = True) -> Truth:
    """Write a log into new topics; returns its right labels."""
    names = TopicNames.of(settings.topics)
    create_topics(settings.kafka, settings.topics)
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, max_batch_size=BATCH_BYTES, max_request_size=1 << 24
    )
    await producer.start()
    logs = log_of(impressions, ended=ended)
    events = 0
    for topic, partitions in ((names.impressions, logs["impressions"]), (names.clicks, logs["clicks"])):
        for number, records in enumerate(partitions):
            events += len(records) - ended
            for first in range(0, len(records), 20_000):
                for future in await send_batches(producer, topic, number, records[first : first + 20_000]):
                    await future
    await producer.stop()
    clicked = {key for records in logs["clicks"] for key, _, _ in records if key is not None}
    by_partition = [bytearray(key in clicked for key, _, _ in part if key is not None) for part in logs["impressions"]]
    return Truth(events, by_partition)


async def count_labels(
    settings: Settings, truth: Truth, alive: Callable[[], None], patience_s: float
) -> tuple[dict[str, int], float]:
    """Read `examples` with `read_committed` until every impression has its label, and compare each label with the truth.

    Returns:
        The counts, and the time (monotonic) at which the last label came.

    Raises:
        SystemExit: a label is wrong or came twice, or no label has come for `patience_s`.
    """
    names = TopicNames.of(settings.topics)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        isolation_level="read_committed",
        enable_auto_commit=False,
        max_partition_fetch_bytes=8 << 20,
    )
    await consumer.start()
    consumer.assign([TopicPartition(names.examples, number) for number in range(PARTITIONS)])
    await consumer.seek_to_beginning()
    unseen = 2
    labels = [bytearray([unseen]) * len(partition) for partition in truth.clicked]
    firsts = corrections = positives = 0
    changed = time.monotonic()
    while firsts < truth.impressions or positives < truth.clicks:
        for tp, records in (await consumer.getmany(timeout_ms=200, max_records=20_000)).items():
            known = labels[tp.partition]
            for record in records:
                if record.key is None:
                    continue  # a record that the join writes for itself
                headers = dict(record.headers)
                label = headers["label"] == b"1"
                positives += label
                if "source_offset" not in headers:
                    firsts += 1  # a label of the Faust peer, which names no offset: only counted
                    continue
                offset = int(headers["source_offset"])
                if headers["kind"] == b"correction":
                    corrections += 1
                    right = known[offset] == 0 and label and truth.clicked[tp.partition][offset] == 1
                else:
                    firsts += 1
                    right = known[offset] == unseen and label <= truth.clicked[tp.partition][offset]
                if not right:
                    raise SystemExit(f"partition {tp.partition}, offset {record.offset}: a wrong label, {headers}")
                known[offset] = label
            changed = time.monotonic()
        alive()
        if time.monotonic() - changed > patience_s:
            found = f"{firsts} of {truth.impressions} labels, {positives} of {truth.clicks} positive"
            raise SystemExit(f"no label for {patience_s:.0f} s: {found}")
    await consumer.stop()
    return {"labels": firsts, "positives": positives, "corrections": corrections}, changed


def settings_for(kind: str, bootstrap_servers: str, work: Path, hold_ms: int | None = None) -> Settings:
    join = JoinSettings(window_ms=WINDOW_MS)
    return Settings(
        kafka=KafkaSettings(bootstrap_servers=bootstrap_servers),
        topics=TopicSettings(prefix=f"{kind}-", partitions=PARTITIONS),
        join=join if hold_ms is None else join.model_copy(update={"hold_ms": hold_ms}),
        state_dir=work / f"{kind}-state",
    )


async def empty_outputs(settings: Settings, application: str | None = None) -> None:
    """Create `examples` and `dead-letters` anew, and delete the changelog topics of an application."""
    names = TopicNames.of(settings.topics)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    try:
        found = await admin.list_topics()
        changelogs = [topic for topic in found if application and topic.startswith(f"{application}-")]
        await admin.delete_topics([names.examples, names.dead_letters, *changelogs])
        while {names.examples, names.dead_letters} & set(await admin.list_topics()):
            await asyncio.sleep(0.1)
    finally:
        await admin.close()
    create_topics(settings.kafka, settings.topics)


@dataclass(slots=True)
class Measured:
    """The result of one run."""

    rate: float  # events a second
    cpu_us: float  # µs of CPU an event, from the start of the timing
    peak_rss_mb: float
    counts: dict[str, int]

    def __str__(self) -> str:
        figures = f"{self.rate:>10,.0f} events/s   {self.cpu_us:5.1f} µs of CPU an event   {self.peak_rss_mb:6,.0f} MB"
        return f"{figures}   {self.counts}"


def measure_headrace(settings: Settings, truth: Truth, work: Path) -> Measured:
    """One join worker on core 0."""
    worker = Worker("join", worker_environment(settings), work / "headrace.log", cwd=work)
    with pinned(0):
        worker.start()
    try:
        worker.wait_ready()  # it has taken over its partitions, and begins to fetch
        return timed(settings, truth, worker.pid, worker.check)
    finally:
        worker.ask_to_stop()
        worker.wait_stopped()


def measure_kafka_streams(settings: Settings, truth: Truth, work: Path, application: str) -> Measured:
    """The Kafka Streams peer on core 0."""
    peer = KafkaStreamsPeer(settings, application, work)
    try:
        peer.wait_ready()
        return timed(settings, truth, peer.pid, peer.check)
    finally:
        peer.stop()


def timed(settings: Settings, truth: Truth, pid: int, alive: Callable[[], None]) -> Measured:
    """Time a run from now until every label has been read."""
    began, before = time.monotonic(), usage(pid).cpu_seconds
    counts, done = asyncio.run(count_labels(settings, truth, alive, patience_s=60))
    used = usage(pid)
    cpu_us = (used.cpu_seconds - before) * 1e6 / truth.events
    return Measured(truth.events / (done - began), cpu_us, used.peak_rss_mb, counts)


def in_turns(settings: Settings, impressions: int, pairs: int, work: Path) -> tuple[list[Measured], list[Measured]]:
    """Runs of Headrace and of Kafka Streams over the same log; which of them is first changes from pair to pair."""
    truth = asyncio.run(fill(settings, impressions))
    ours, theirs = [], []
    for pair in range(pairs):
        for kind in ("headrace", "kafka-streams") if pair % 2 == 0 else ("kafka-streams", "headrace"):
            application = f"{kind}-{pair}"
            if kind == "headrace":
                join = settings.join.model_copy(update={"group": application})
                own = settings.model_copy(update={"join": join, "state_dir": work / application})
                ours.append(measured := measure_headrace(own, truth, work))
            else:
                theirs.append(measured := measure_kafka_streams(settings, truth, work, application))
            click.echo(f"{kind:<14}{measured}")
            asyncio.run(empty_outputs(settings, application))
    return ours, theirs


def measure_faust(bootstrap_servers: str, impressions: int, work: Path) -> dict[str, float]:
    """Events a second of the Faust peer on core 0, from its first record on: its start isn't counted."""
    settings = settings_for("faust", bootstrap_servers, work)
    truth = asyncio.run(fill(settings, impressions))
    env = {
        **os.environ,
        "PEER_BROKER": bootstrap_servers,
        "PEER_PREFIX": settings.topics.prefix,
        "PEER_WINDOW_MS": str(WINDOW_MS),
        "PEER_PARTITIONS": str(PARTITIONS),
        "PEER_DATA_DIR": str(settings.state_dir),
        "PEER_STARTED": str(work / "faust.started"),
    }
    command = [sys.executable, str(Path(__file__).with_name("peer_faust_join.py")), "worker", "--without-web", "-l", "warn"]
    with (work / "faust.log").open("ab") as stderr, pinned(0):
        process = subprocess.Popen(command, env=env, stderr=stderr)

    def alive() -> None:
        if process.poll() is not None:
            raise SystemExit(f"the peer ended with {process.returncode}: {(work / 'faust.log').read_text()[-2000:]}")

    try:
        _, done = asyncio.run(count_labels(settings, truth, alive, patience_s=90))
        began = float((work / "faust.started").read_text())
        used = usage(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {"rate": truth.events / (done - began), "peak_rss_mb": used.peak_rss_mb}


@click.command()
@click.option("--impressions", default=900_000, show_default=True)
@click.option("--peer", type=click.Choice(["faust", "kafka-streams", "none"]), default="faust", show_default=True)
@click.option("--peer-impressions", default=30_000, show_default=True, help="Impressions for the Faust peer.")
@click.option("--pairs", default=1, show_default=True, help="Runs of Headrace and of Kafka Streams, in turns.")
@click.option("--hold-ms", type=int, help=f"`join.hold_ms` of both. {WINDOW_MS} holds every label for the whole window.")
@click.option("--quick", is_flag=True, help="60,000 impressions, 5,000 for the Faust peer: too few for a result.")
def main(impressions: int, peer: str, peer_impressions: int, pairs: int, hold_ms: int | None, quick: bool) -> None:
    """Measure and print; the last line is one JSON object."""
    if quick:
        impressions, peer_impressions = 60_000, 5_000
    work = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    cores = os.sched_getaffinity(0)
    warn_if_busy()
    os.sched_setaffinity(0, cores - {0} or cores)  # this process and the Kafka that it starts leave core 0 to the worker
    theirs: list[Measured] = []
    peer_rate = peer_mb = None
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=1024)) as kafka:
            settings = settings_for("join", kafka.bootstrap_servers, work, hold_ms)
            if peer == "kafka-streams":
                ours, theirs = in_turns(settings, impressions, pairs, work)
                peer_rate = statistics.median(run.rate for run in theirs)
                peer_mb = max(run.peak_rss_mb for run in theirs)
            else:
                ours = [measure_headrace(settings, asyncio.run(fill(settings, impressions)), work)]
                click.echo(f"headrace      {ours[0]}")
                if peer == "faust":
                    faust = measure_faust(kafka.bootstrap_servers, peer_impressions, work)
                    peer_rate, peer_mb = faust["rate"], faust["peak_rss_mb"]
                    click.echo(f"faust         {peer_rate:>10,.0f} events/s   {peer_mb:,.0f} MB")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.sched_setaffinity(0, cores)
    rate = statistics.median(run.rate for run in ours)
    report(
        value=round(rate),
        peer=peer_rate and round(peer_rate),
        peer_is=peer,
        ratio=peer_rate and round(rate / peer_rate, 2),
        unit="events/s",
        hold_ms=settings.join.held_ms,
        **ours[-1].counts,
        cpu_us_per_event=round(statistics.median(run.cpu_us for run in ours), 2),
        peer_cpu_us_per_event=round(statistics.median(run.cpu_us for run in theirs), 2) if theirs else None,
        peak_rss_mb=round(max(run.peak_rss_mb for run in ours)),
        peer_peak_rss_mb=peer_mb and round(peer_mb),
        pairs=len(ours),
        pending_in_window=min(WINDOW_MS * 1000 // SPACING_US, impressions),
        partitions=PARTITIONS,
    )


if __name__ == "__main__":
    main()
