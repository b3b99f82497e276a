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
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import click
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.structs import TopicPartition

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deploy.local_kafka import LocalKafka
from deploy.settings import LocalKafkaSettings, Settings
from stream.batches import BATCH_BYTES, send_batches
from stream.topic_admin import create_topics
from stream.topics import TopicNames

PARTITIONS = 4
WINDOW_MS = 60_000
SPACING_US = 200  # 5,000 impressions a second of event time: 300,000 in a window
CTR = 0.03
START_MS = 1_700_000_000_000
IMPRESSION_BYTES = 700


def log_of(impressions: int, seed: int = 0) -> dict[str, list[list[tuple[bytes, bytes, list[Any]]]]]:
    """Records of both topics by partition, in event-time order, ending with a watermark record."""
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
    mark = [("headrace-watermark", str(START_MS + impressions * SPACING_US // 1000 + 10 * WINDOW_MS).encode())]
    for partitions in out.values():
        for records in partitions:
            records.append((None, b"", mark))
    return out


async def fill(settings: Settings, impressions: int) -> int:
    """Put a log into fresh topics; returns the events in it."""
    names = TopicNames.of(settings.topics)
    create_topics(settings.kafka, settings.topics)
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, max_batch_size=BATCH_BYTES, max_request_size=1 << 24
    )
    await producer.start()
    logs = log_of(impressions)
    events = 0
    for topic, partitions in ((names.impressions, logs["impressions"]), (names.clicks, logs["clicks"])):
        for number, records in enumerate(partitions):
            events += len(records) - 1
            for first in range(0, len(records), 20_000):
                for future in await send_batches(producer, topic, number, records[first : first + 20_000]):
                    await future
    await producer.stop()
    return events


async def count_labels(
    settings: Settings, expected: int, worker: subprocess.Popen[bytes], patience_s: float
) -> tuple[int, float]:
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
        if worker.poll() is not None:
            raise SystemExit(f"the worker ended with {worker.returncode}")
        if time.monotonic() - changed > patience_s:
            raise SystemExit(f"no label for {patience_s:.0f} s: {seen} of {expected}")
    await consumer.stop()
    return seen, changed


def pinned(command: list[str], core: int, env: dict[str, str], errors: Path) -> subprocess.Popen[bytes]:
    """Start a process on one core."""
    return subprocess.Popen(  # noqa: S603
        command, env={**os.environ, **env}, stderr=errors.open("ab"), preexec_fn=lambda: os.sched_setaffinity(0, {core})
    )


def environment(settings: Settings, state_dir: Path) -> dict[str, str]:
    return {
        "HEADRACE_KAFKA__BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers,
        "HEADRACE_TOPICS__PREFIX": settings.topics.prefix,
        "HEADRACE_TOPICS__PARTITIONS": str(PARTITIONS),
        "HEADRACE_JOIN__WINDOW_MS": str(WINDOW_MS),
        "HEADRACE_STATE_DIR": str(state_dir),
    }


async def measure(kind: str, settings: Settings, impressions: int, work: Path) -> dict[str, Any]:
    """Events a second of one kind of worker over its own fresh topics."""
    settings = settings.model_copy(update={"topics": settings.topics.model_copy(update={"prefix": f"{kind}-{os.getpid()}-"})})
    events = await fill(settings, impressions)
    errors = work / f"{kind}.log"
    env = environment(settings, work / f"{kind}-state")
    port = 20_000 + os.getpid() % 20_000
    if kind == "headrace":
        command = [sys.executable, "-m", "headrace", "run", "join", "--http-port", str(port)]
    else:
        command = [
            sys.executable,
            str(Path(__file__).with_name("peer_faust_join.py")),
            "worker",
            "--without-web",
            "-l",
            "warning",
        ]
    worker = pinned(command, 0, env, errors)
    try:
        ready = time.monotonic()
        if kind == "headrace":
            ready = await until_ready(port, worker)
        seen, done = await count_labels(settings, impressions, worker, patience_s=60)
        cpu = sum(int(part) for part in Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])
        peak_kb = int(next(line for line in Path(f"/proc/{worker.pid}/status").open() if line.startswith("VmHWM")).split()[1])
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            worker.kill()
    return {
        "rate": events / (done - ready),
        "events": events,
        "seconds": done - ready,
        "labels": seen,
        "peak_rss_mb": peak_kb / 1024,
        "cpu_seconds": cpu / os.sysconf("SC_CLK_TCK"),
    }


async def until_ready(port: int, worker: subprocess.Popen[bytes]) -> float:
    """When the worker's /readyz first says ok: partitions are taken over, and fetching begins."""
    while worker.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):  # noqa: S310
                return time.monotonic()
        except OSError:
            await asyncio.sleep(0.01)
    raise SystemExit(f"the worker ended with {worker.returncode}")


@click.command()
@click.option("--impressions", default=900_000, show_default=True)
@click.option("--peer-impressions", default=30_000, show_default=True)
@click.option("--quick", is_flag=True, help="60,000 impressions, 5,000 for the peer.")
@click.option("--no-peer", is_flag=True)
@click.option("--keep", is_flag=True, help="Keep the workers' logs.")
def main(impressions: int, peer_impressions: int, quick: bool, no_peer: bool, keep: bool) -> None:
    """Measure and print; the last line is one JSON object."""
    if quick:
        impressions, peer_impressions = 60_000, 5_000
    work = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    os.sched_setaffinity(0, {1})  # this process, and the Kafka it starts, leave core 0 to the worker
    kafka = LocalKafka(LocalKafkaSettings(dir=work / "kafka", heap_mb=1024))
    try:
        bootstrap = kafka.start()
        settings = Settings(kafka={"bootstrap_servers": bootstrap}, topics={"partitions": PARTITIONS})
        ours = asyncio.run(measure("headrace", settings, impressions, work))
        click.echo(
            f"headrace  {ours['rate']:>10,.0f} events/s  {ours['events']:,} in {ours['seconds']:.1f} s  {ours['peak_rss_mb']:.0f} MB  {ours['cpu_seconds']:.1f} s CPU"
        )
        result = {
            "value": round(ours["rate"]),
            "unit": "events/s",
            "labels": ours["labels"],
            "peak_rss_mb": round(ours["peak_rss_mb"]),
        }
        if not no_peer:
            peer = asyncio.run(measure("faust", settings, peer_impressions, work))
            click.echo(
                f"faust     {peer['rate']:>10,.0f} events/s  {peer['events']:,} in {peer['seconds']:.1f} s  {peer['peak_rss_mb']:.0f} MB"
            )
            result |= {"peer": round(peer["rate"]), "ratio": round(ours["rate"] / peer["rate"], 1)}
    finally:
        kafka.stop()
        if keep:
            click.echo(f"logs: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    pending = WINDOW_MS * 1000 // SPACING_US
    click.echo(json.dumps(result | {"pending_in_window": min(pending, impressions), "partitions": PARTITIONS}))


if __name__ == "__main__":
    main()
