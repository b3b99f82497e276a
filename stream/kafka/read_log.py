"""Reading partitions of a log up to known offsets, with a consumer that belongs to no group.

`read_to` is the one loop. It goes by the consumer's positions, not by the offsets of records: a log may end in transactions'
markers and aborted records, which are never delivered, so the record before an end may never come.

```python
consumer = await started(kafka, log_consumer(kafka), "the ends of examples")
spans = await log_spans(kafka, consumer, partitions)
async for partition, records in read_spans(consumer, spans, stall_s=20):
    ...
```
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from stream.errors import NoAnswer
from stream.kafka.clients import aiokafka_options, answer, quietly_stopped, started
from stream.records.record import Record
from stream.settings import KafkaSettings

__all__ = [
    "FETCHER_LOOK_MS",
    "Positions",
    "Span",
    "first_records",
    "high_watermarks",
    "log_consumer",
    "log_spans",
    "read_spans",
    "read_to",
]

POLL_MS = 200  # one wait for records
# How often aiokafka's fetcher looks for something to do although nothing has happened. Records, seeks, resumed partitions and
# answers wake it, so this is only for what nobody thought of. Its own 200 ms are most of what an idle consumer costs.
FETCHER_LOOK_MS = 2_000
FETCH_BYTES = 1 << 20  # Kafka's own default

Positions = Mapping[TopicPartition, int]


class Span(NamedTuple):
    """A stretch of one partition: its first offset, and the offset after its last."""

    start: int
    end: int


def log_consumer(
    kafka: KafkaSettings, *, committed: bool = True, max_partition_fetch_bytes: int = FETCH_BYTES
) -> AIOKafkaConsumer:
    """A consumer for the functions of this module, not started.

    Args:
        committed: leave out the records of open and aborted transactions.
        max_partition_fetch_bytes: of one answer. Kafka sends one whole batch even where this is 1.
    """
    return AIOKafkaConsumer(
        **aiokafka_options(kafka),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        isolation_level="read_committed" if committed else "read_uncommitted",
        consumer_timeout_ms=FETCHER_LOOK_MS,
        max_partition_fetch_bytes=max_partition_fetch_bytes,
    )


async def log_spans(
    kafka: KafkaSettings, consumer: AIOKafkaConsumer, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, Span]:
    """Each partition's first offset and its end, as this consumer sees it: the last stable offset for a committed reader.

    Raises:
        NoAnswer: no answer in time.
        aiokafka.errors.KafkaError: as the consumer raises.
    """
    if not partitions:
        return {}
    what = ", ".join(sorted({partition.topic for partition in partitions}))
    starts = await answer(kafka, consumer.beginning_offsets(list(partitions)), f"the beginnings of {what}")
    ends = await answer(kafka, consumer.end_offsets(list(partitions)), f"the ends of {what}")
    return {partition: Span(starts[partition], ends[partition]) for partition in partitions}


async def high_watermarks(kafka: KafkaSettings, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
    """The ends of all that is written, open transactions included. (A `read_committed` consumer's ends are before them.)"""
    consumer = await started(kafka, log_consumer(kafka, committed=False), "the ends of logs")
    try:
        return await answer(kafka, consumer.end_offsets(list(partitions)), "the ends of logs")
    finally:
        await quietly_stopped(consumer.stop)


async def read_to(
    consumer: AIOKafkaConsumer,
    ends: Positions,
    *,
    poll_ms: int = POLL_MS,
    max_records: int | None = None,
    stall_s: float | None = None,
    pause: bool = False,
    on_round: Callable[[Positions], object] | None = None,
) -> AsyncIterator[tuple[TopicPartition, list[Record]]]:
    """Read on from the consumer's positions until each one is at its end.

    Yields runs of records as they are fetched: in order of offset within a partition, partitions in any order. The last run of
    a partition may hold records beyond its end.

    Args:
        ends: the end of each partition to be read. Other assigned partitions are left alone.
        poll_ms: longest single wait for records.
        max_records: limit for the records of one wait, over all partitions.
        stall_s: give up when no position has moved for so long; None: wait for as long as it takes.
        pause: pause each partition at its end, so that nothing beyond it is fetched.
        on_round: called with the positions before each wait. What it raises ends the reading.

    Raises:
        NoAnswer: no position has moved for `stall_s`.
        aiokafka.errors.KafkaError: as the consumer raises, such as for an offset that retention has deleted.
    """
    left = dict(ends)
    positions: dict[TopicPartition, int] = {}
    moved = time.monotonic()
    while True:
        for partition in list(left):
            position = await consumer.position(partition)
            if positions.get(partition) != position:
                positions[partition], moved = position, time.monotonic()
            if position >= left[partition]:
                del left[partition]
                if pause:
                    consumer.pause(partition)
        if on_round is not None:
            on_round(positions)
        if not left:
            return
        if stall_s is not None and time.monotonic() - moved > stall_s:
            partition = min(left)
            raise NoAnswer(
                f"{partition.topic}, partition {partition.partition}: expected to read up to offset {left[partition]}, found "
                f"nothing after {positions[partition]} for {stall_s:.0f} s. A transaction is open there, or no broker leads "
                "the partition: `headrace doctor`."
            )
        fetched = await consumer.getmany(*left, timeout_ms=poll_ms, max_records=max_records)
        for partition, records in fetched.items():
            if records:
                yield partition, records


async def read_spans(
    consumer: AIOKafkaConsumer,
    spans: Mapping[TopicPartition, Span],
    *,
    stall_s: float,
    poll_ms: int = POLL_MS,
    on_round: Callable[[Positions], object] | None = None,
) -> AsyncIterator[tuple[TopicPartition, list[Record]]]:
    """Read these stretches and nothing else; the arguments are those of `read_to`. Replaces the consumer's assignment.

    Raises:
        NoAnswer: no position has moved for `stall_s`: a broker is away, or an open transaction is before an end.
        aiokafka.errors.KafkaError: as the consumer raises, such as for an offset that retention has deleted.
    """
    wanted = _stand_at_starts(consumer, spans)
    ends = {partition: span.end for partition, span in wanted.items()}
    if not ends:
        return
    async for partition, records in read_to(consumer, ends, poll_ms=poll_ms, stall_s=stall_s, pause=True, on_round=on_round):
        end = ends[partition]
        within = records if records[-1].offset < end else [record for record in records if record.offset < end]
        if within:
            yield partition, within


async def first_records(
    consumer: AIOKafkaConsumer, spans: Mapping[TopicPartition, Span], *, within_s: float
) -> dict[TopicPartition, Record | None]:
    """The first record of each span. Replaces the consumer's assignment.

    Returns:
        None for a span that holds markers only. A partition is missing where no broker answered within `within_s`.
    """
    wanted = _stand_at_starts(consumer, spans)
    first: dict[TopicPartition, Record | None] = {partition: None for partition in spans if partition not in wanted}
    left = set(wanted)
    deadline = time.monotonic() + within_s
    while left and time.monotonic() < deadline:
        fetched = await consumer.getmany(*left, timeout_ms=POLL_MS, max_records=len(left))
        for partition, records in fetched.items():
            if records[0].offset < wanted[partition].end:
                first[partition] = records[0]
        for partition in list(left):
            if partition in first or await consumer.position(partition) >= wanted[partition].end:
                first.setdefault(partition)
                left.discard(partition)
                consumer.pause(partition)
    return first


def _stand_at_starts(consumer: AIOKafkaConsumer, spans: Mapping[TopicPartition, Span]) -> dict[TopicPartition, Span]:
    """Assign the partitions whose spans aren't empty, each at its start. Returns those spans."""
    wanted = {partition: span for partition, span in spans.items() if span.start < span.end}
    if wanted:
        # No await between these: a fetch must not begin without a position.
        consumer.assign(list(wanted))
        for partition, span in wanted.items():
            consumer.seek(partition, span.start)
    return wanted
