"""Reading given stretches of several partitions, from an offset to an offset, with a consumer that belongs to no group.

A stretch may end in transactions' markers and aborted records, which no reader is given: whether it has been read, the position
tells.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from stream.errors import StreamError
from stream.kafka.clients import aiokafka_options, answer, quietly_stopped, started
from stream.settings import KafkaSettings

__all__ = ["Span", "first_records", "high_watermarks", "read_spans", "span_consumer"]

Span = tuple[int, int]  # first offset, and the offset after the last

POLL_MS = 200  # one wait for records
FETCH_BYTES = 1 << 20  # Kafka's own default


def span_consumer(
    kafka: KafkaSettings, *, committed: bool = True, max_partition_fetch_bytes: int = FETCH_BYTES
) -> AIOKafkaConsumer:
    """A consumer for the functions below, not started.

    Args:
        committed: whether open and aborted transactions are passed over.
        max_partition_fetch_bytes: of one answer; Kafka hands over one batch all the same, also with 1.
    """
    return AIOKafkaConsumer(
        **aiokafka_options(kafka),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        isolation_level="read_committed" if committed else "read_uncommitted",
        max_partition_fetch_bytes=max_partition_fetch_bytes,
    )


async def high_watermarks(kafka: KafkaSettings, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
    """The ends of all that is written, open transactions included: a `read_committed` consumer's ends stop before those."""
    consumer = await started(kafka, span_consumer(kafka, committed=False), "the ends of logs")
    try:
        return await answer(kafka, consumer.end_offsets(list(partitions)), "the ends of logs")
    finally:
        await quietly_stopped(consumer.stop)


async def read_spans(
    consumer: Any, spans: Mapping[TopicPartition, Span], *, stall_s: float
) -> AsyncIterator[tuple[TopicPartition, list[Any]]]:
    """Runs of records, in order of offset within a partition; partitions come as they are fetched.

    Ends when the position of every partition is at its span's end, so also where markers or aborted records are last.

    Raises:
        StreamError: nothing moved for `stall_s`: a broker is away, or an open transaction stands before an end.
        aiokafka.errors.KafkaError: as the consumer raises, such as for an offset that retention has deleted.
    """
    left = {tp: span for tp, span in spans.items() if span[0] < span[1]}
    if not left:
        return
    # No await between these: a fetch must not begin without a position.
    consumer.assign(list(left))
    for tp, (first, _) in left.items():
        consumer.seek(tp, first)
    positions = {tp: first for tp, (first, _) in left.items()}
    moved = time.monotonic()
    while left:
        for tp, records in (await consumer.getmany(*left, timeout_ms=POLL_MS)).items():
            wanted = [record for record in records if record.offset < left[tp][1]]
            if wanted:
                yield tp, wanted
        for tp in list(left):
            position = await consumer.position(tp)
            if position > positions[tp]:
                positions[tp], moved = position, time.monotonic()
            if position >= left[tp][1]:
                del left[tp]
                consumer.pause(tp)
        if left and time.monotonic() - moved > stall_s:
            tp = min(left)
            raise StreamError(
                f"{tp.topic}-{tp.partition}: expected to read up to offset {left[tp][1]}, found nothing more after "
                f"{positions[tp]} for {stall_s:.0f} s. A transaction is open there, or a broker is away; try again."
            )


async def first_records(
    consumer: Any, spans: Mapping[TopicPartition, Span], *, within_s: float
) -> dict[TopicPartition, Any | None]:
    """The first record of each span, None where it holds markers only; without an entry where no broker answered in time."""
    first: dict[TopicPartition, Any | None] = {tp: None for tp, span in spans.items() if span[0] >= span[1]}
    left = {tp: span for tp, span in spans.items() if tp not in first}
    if not left:
        return first
    # No await between these: a fetch must not begin without a position.
    consumer.assign(list(left))
    for tp, (offset, _) in left.items():
        consumer.seek(tp, offset)
    deadline = time.monotonic() + within_s
    while left and time.monotonic() < deadline:
        for tp, records in (await consumer.getmany(*left, timeout_ms=POLL_MS, max_records=len(left))).items():
            if records[0].offset < left[tp][1]:
                first[tp] = records[0]
        for tp in list(left):
            if tp in first or await consumer.position(tp) >= left[tp][1]:
                first.setdefault(tp)
                del left[tp]
                consumer.pause(tp)
    return first
