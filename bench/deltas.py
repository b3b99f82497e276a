"""Deltas over a local Kafka: encode, send, read and join, and how many bytes they take beside their payload.

    .venv/bin/python bench/deltas.py                             # 100,000 rows of width 16, half a minute
    .venv/bin/python bench/deltas.py --rows 2500 --deltas 200    # what a quarter of a second touches

One process has the writer and the reader. The last line is one JSON object; times are medians in ms.

| figure | what it is |
| --- | --- |
| `encode_ms` | from the tensors to the records' values |
| `send_ms` | one transaction, from the first byte to the commit's answer |
| `read_ms` | from that answer until a reader has the delta joined; the reader fetches while the writer sends |
| `assemble_ms` | joining the records alone, a part of `read_ms` |
| `value` | bytes that the topic's files grow by, over the bytes of the tensors: at most 1.2 |
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings
from model.rows import ModelDelta, Rows
from stream.deltas.pieces import FoundDelta
from stream.deltas.reader import DeltaReader
from stream.deltas.writer import DeltaWriter
from stream.records.delta import DeltaHeader, Point, encode_delta
from stream.records.delta_assembly import assemble
from stream.registry.writer import RegistryWriter
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames

WARM_UP = 5  # deltas before the first that counts
# Wait between two deltas: a transaction that begins before the marker of the last one is written has to wait for it.
PAUSE_S = 0.05


class Times:
    """Milliseconds of each part, in the order of the deltas."""

    def __init__(self) -> None:
        self.encode: list[float] = []
        self.send: list[float] = []
        self.read: list[float] = []
        self.assemble: list[float] = []


def made(rows: int, dim: int) -> ModelDelta:
    keys = torch.randperm(10 * rows)[:rows]
    return ModelDelta(Rows(keys, torch.randn(rows, dim), torch.randn(rows)), torch.empty(0, dtype=torch.int64), None, 1)


def payload(delta: ModelDelta) -> int:
    return sum(tensor.nbytes for tensor in (delta.rows.keys, delta.rows.embedding, delta.rows.first_order, delta.gone))


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    into.append((time.perf_counter() - began) * 1_000)


async def run(kafka: KafkaSettings, names: TopicNames, delta: ModelDelta, deltas: int, times: Times) -> None:
    registry = RegistryWriter(kafka, names, who="bench")
    epoch = await registry.take_trainer_epoch()
    await registry.close()
    writer = DeltaWriter(kafka, names, epoch=epoch)
    await writer.open()
    reader = DeltaReader(kafka, names, start=None)
    await reader.open()
    chain = f"deepfm/{epoch}/0"
    for sequence in range(1, WARM_UP + deltas + 1):
        header = DeltaHeader(
            chain=chain,
            sequence=sequence,
            parent=Point(chain, sequence - 1),
            offsets={str(partition): 10**9 for partition in range(4)},
            watermark_ms=1_700_000_000_000,
            examples_seen=10**9,
            negative_rate=1.0,
            at_ms=1_700_000_000_000,
            arrivals=tuple(range(1_700_000_000_000, 1_700_000_000_064)),
        )
        with timed(times.encode):
            pieces = encode_delta(header, delta, writer.limit)
        reading = asyncio.create_task(reader.next(timeout_s=60))
        await asyncio.sleep(0)
        with timed(times.send):
            await writer.send(pieces)
        with timed(times.read):
            found = await reading
        assert isinstance(found, FoundDelta) and found.delta.header.sequence == sequence
        with timed(times.assemble):
            assemble(pieces)
        await asyncio.sleep(PAUSE_S)
    await reader.close()
    await writer.close()


@click.command()
@click.option("--rows", default=100_000, show_default=True)
@click.option("--dim", default=16, show_default=True)
@click.option("--deltas", default=60, show_default=True, help="Number of deltas that count.")
def main(rows: int, dim: int, deltas: int) -> None:
    """Measure deltas of one size."""
    warn_if_busy()
    torch.manual_seed(1)
    delta, times = made(rows, dim), Times()
    with (
        tempfile.TemporaryDirectory(prefix="headrace-deltas-") as folder,
        LocalKafka(LocalKafkaSettings(dir=Path(folder) / "kafka")) as broker,
    ):
        kafka, topics = KafkaSettings(bootstrap_servers=broker.bootstrap_servers), TopicSettings()
        create_topics(kafka, topics)
        names = TopicNames.of(topics)
        asyncio.run(run(kafka, names, delta, deltas, times))
        files = [path for path in broker.dir.rglob("*.log") if path.parent.name == f"{names.deltas}-0"]
        written = sum(path.stat().st_size for path in files)
    medians = {
        f"{name}_ms": round(statistics.median(getattr(times, name)[WARM_UP:]), 2)
        for name in ("encode", "send", "read", "assemble")
    }
    whole = [sum(parts) for parts in zip(times.encode, times.send, times.read, strict=True)][WARM_UP:]
    report(
        benchmark="deltas",
        value=round(written / (payload(delta) * (WARM_UP + deltas)), 4),
        unit="bytes in Kafka over payload",
        rows=rows,
        dim=dim,
        deltas=deltas,
        payload_bytes=payload(delta),
        **medians,
        all_ms=round(statistics.median(whole), 2),
        all_p99_ms=round(sorted(whole)[int(0.99 * len(whole))], 2),
    )


if __name__ == "__main__":
    main()
