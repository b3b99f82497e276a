"""How many events a second one join worker labels on one core, against the same join as an ordinary Faust agent with tables.

    .venv/bin/python bench/join.py            # about 3 minutes
    .venv/bin/python bench/join.py --quick    # fewer events, no claim

A real Apache Kafka runs on the other core. Impressions of 700 bytes and clicks (CTR 3 %) are in the log before a worker starts;
event time is spaced so that the window holds over 200,000 pending impressions, and windows expire all along. Timed from the
worker's being ready until a `read_committed` reader has counted every label. The peer gets fewer events, being slower; each
is told in events a second.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.structs import TopicPartition

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report
from deploy.demo.play import worker_environment
from deploy.demo.workers import Worker
from deploy.local_kafka import LocalKafka
from deploy.settings import LocalKafkaSettings, Settings
from stream.batches import BATCH_BYTES, send_batches
from stream.settings import JoinSettings, KafkaSettings, TopicSettings
from stream.topic_admin import create_topics
from stream.topics import TopicNames

PARTITIONS = 4
WINDOW_MS = 60_000
SPACING_US = 200  # 5,000 impressions a second of event time: 300,000 in a window
CTR = 0.03
START_MS = 1_700_000_000_000
IMPRESSION_BYTES = 700


def log_of(impressions: int, seed: int = 0, *, ended: bool = True) -> dict[str, list[list[tuple[bytes, bytes, list[Any]]]]]:
    """Records of both topics by partition, in event-time order; a watermark record ends them, where they are `ended`."""
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
    mark = [("headrace-watermark", str(START_MS + impressions * SPACING_US // 1000 + 10 * WINDOW_MS).encode())]
    for partitions in out.values():
        for records in partitions:
            records.append((None, b"", mark))
    return out


async def fill(settings: Settings, impressions: int, *, ended: bool = True) -> int:
    """Put a log into fresh topics; returns the events in it."""
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
    return events


async def count_labels(settings: Settings, expected: int, alive: Callable[[], None], patience_s: float) -> tuple[int, float]:
    """Count `examples` as a read_committed reader until all are there; returns the count and when it was reached."""
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
    seen, changed = 0, time.monotonic()
    while seen < expected:
        for records in (await consumer.getmany(timeout_ms=200, max_records=20_000)).values():
            seen += len(records)
            changed = time.monotonic()
        alive()
        if time.monotonic() - changed > patience_s:
            raise SystemExit(f"no label for {patience_s:.0f} s: {seen} of {expected}")
    await consumer.stop()
    return seen, changed


def usage(pid: int) -> dict[str, float]:
    """CPU seconds and peak memory of a process so far."""
    ticks = sum(int(part) for part in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"cpu_seconds": ticks / os.sysconf("SC_CLK_TCK"), "peak_rss_mb": int(peak.split()[1]) / 1024}


def settings_for(kind: str, bootstrap_servers: str, work: Path) -> Settings:
    return Settings(
        kafka=KafkaSettings(bootstrap_servers=bootstrap_servers),
        topics=TopicSettings(prefix=f"{kind}-", partitions=PARTITIONS),
        join=JoinSettings(window_ms=WINDOW_MS),
        state_dir=work / f"{kind}-state",
    )


def measure_headrace(bootstrap_servers: str, impressions: int, work: Path) -> dict[str, float]:
    """Events a second of one join worker on core 0."""
    settings = settings_for("headrace", bootstrap_servers, work)
    events = asyncio.run(fill(settings, impressions))
    worker = Worker("join", worker_environment(settings), work / "headrace.log", cwd=work)
    worker.start()
    os.sched_setaffinity(worker.pid, {0})  # before it has started a thread: all of them inherit it
    try:
        worker.wait_ready()  # partitions are taken over, and fetching begins
        began, before = time.monotonic(), usage(worker.pid)["cpu_seconds"]
        seen, done = asyncio.run(count_labels(settings, impressions, worker.check, patience_s=60))
        used = usage(worker.pid)
    finally:
        worker.ask_to_stop()
        worker.wait_stopped()
    return {
        "rate": events / (done - began),
        "labels": seen,
        "cpu_us_per_event": (used["cpu_seconds"] - before) * 1e6 / events,
        "peak_rss_mb": used["peak_rss_mb"],
    }


def measure_faust(bootstrap_servers: str, impressions: int, work: Path) -> dict[str, float]:
    """Events a second of the peer on core 0, from its first label: its start-up is not counted against it."""
    settings = settings_for("faust", bootstrap_servers, work)
    events = asyncio.run(fill(settings, impressions))
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
    with (work / "faust.log").open("ab") as stderr:
        process = subprocess.Popen(command, env=env, stderr=stderr)
    os.sched_setaffinity(process.pid, {0})

    def alive() -> None:
        if process.poll() is not None:
            raise SystemExit(f"the peer ended with {process.returncode}: {(work / 'faust.log').read_text()[-2000:]}")

    try:
        seen, done = asyncio.run(count_labels(settings, impressions, alive, patience_s=90))
        began = float((work / "faust.started").read_text())
        used = usage(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {"rate": events / (done - began), "labels": seen, "peak_rss_mb": used["peak_rss_mb"]}


@click.command()
@click.option("--impressions", default=900_000, show_default=True)
@click.option("--peer-impressions", default=30_000, show_default=True)
@click.option("--quick", is_flag=True, help="60,000 impressions, 5,000 for the peer: no claim.")
@click.option("--no-peer", is_flag=True)
def main(impressions: int, peer_impressions: int, quick: bool, no_peer: bool) -> None:
    """Measure and print; the last line is one JSON object."""
    if quick:
        impressions, peer_impressions = 60_000, 5_000
    work = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores - {0} or cores)  # this process, and the Kafka it starts, leave core 0 to the worker
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=1024)) as kafka:
            ours = measure_headrace(kafka.bootstrap_servers, impressions, work)
            click.echo(
                f"headrace  {ours['rate']:>10,.0f} events/s   {ours['cpu_us_per_event']:.1f} µs of CPU an event, "
                f"{ours['peak_rss_mb']:.0f} MB"
            )
            peer = None if no_peer else measure_faust(kafka.bootstrap_servers, peer_impressions, work)
            if peer is not None:
                click.echo(f"faust     {peer['rate']:>10,.0f} events/s   {peer['peak_rss_mb']:.0f} MB")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.sched_setaffinity(0, cores)
    report(
        value=round(ours["rate"]),
        peer=peer and round(peer["rate"]),
        ratio=peer and round(ours["rate"] / peer["rate"], 1),
        unit="events/s",
        labels=ours["labels"],
        cpu_us_per_event=round(ours["cpu_us_per_event"], 2),
        peak_rss_mb=round(ours["peak_rss_mb"]),
        pending_in_window=min(WINDOW_MS * 1000 // SPACING_US, impressions),
        partitions=PARTITIONS,
    )


if __name__ == "__main__":
    main()
