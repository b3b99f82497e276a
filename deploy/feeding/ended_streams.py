"""Whether impressions and clicks end with a stream that is newer than the one about to be sent.

The sender of a stream ends it with a watermark record beyond the stream, and sends nothing after that. So the last record of
each partition shows whether a stream has ended there, and where. A new stream that is older by more than window and dedupe
horizon would be rejected as late. One that is a little older isn't, but nothing waits for its clicks: the join labels each of
its impressions as it arrives, until event time has passed that watermark.
"""

from __future__ import annotations

from aiokafka.structs import TopicPartition

from deploy.errors import DataSetError
from stream.kafka.clients import quietly_stopped, started
from stream.kafka.cluster import partition_counts
from stream.kafka.read_log import Span, first_records, log_consumer, log_spans
from stream.records.record import Record
from stream.records.watermark import WATERMARK_HEADER
from stream.settings import JoinSettings, KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["overlap_ms", "refuse_late"]

_READ_S = 5.0  # for one record of each partition; a partition that wasn't read by then isn't judged


async def refuse_late(kafka: KafkaSettings, topics: TopicNames, join: JoinSettings, first_ms: int) -> None:
    """Look at the ends of impressions and clicks. Writes nothing.

    Args:
        first_ms: event time of the first event to be sent.

    Raises:
        DataSetError: in some partition both streams have ended, and their watermark makes this event late.
    """
    kept_ms = join.window_ms + max(join.dedupe_horizon_ms, join.negative_skew_ms)
    for watermark_ms in await _ended_at(kafka, topics):
        if first_ms < watermark_ms - kept_ms:
            raise DataSetError(
                f"topic {topics.impressions!r}: expected no stream that ended later than this one begins, found a watermark of "
                f"{watermark_ms} at its end, and {first_ms} as the first event time: the join would refuse it as late. Use "
                "another topics.prefix, or `headrace kafka reset` for a fresh local Kafka; --loop replays again and again."
            )


async def overlap_ms(kafka: KafkaSettings, topics: TopicNames, first_ms: int) -> int:
    """How far the streams that have ended reach beyond the first event of a new one, in ms; 0 if they don't. Writes nothing."""
    return max((mark - first_ms for mark in await _ended_at(kafka, topics) if mark > first_ms), default=0)


async def _ended_at(kafka: KafkaSettings, topics: TopicNames) -> list[int]:
    """The watermarks of the partitions in which both streams have ended."""
    ends = await _last_watermarks(kafka, (topics.impressions, topics.clicks))
    found = []
    for partition in sorted(number for topic, number in ends if topic == topics.impressions):
        marks = [ends.get((topic, partition)) for topic in (topics.impressions, topics.clicks)]
        if None not in marks:
            found.append(min(mark for mark in marks if mark is not None))
    return found


async def _last_watermarks(kafka: KafkaSettings, topics: tuple[str, ...]) -> dict[tuple[str, int], int]:
    """The watermark that each partition ends with, by topic and partition. Partitions that end otherwise are left out."""
    counts = await partition_counts(kafka, topics)
    partitions = [TopicPartition(topic, number) for topic, count in counts.items() for number in range(count)]
    consumer = await started(kafka, log_consumer(kafka, committed=False), "the ends of streams")
    try:
        logs = await log_spans(kafka, consumer, partitions)
        last = {tp: Span(max(log.start, log.end - 1), log.end) for tp, log in logs.items()}
        records = await first_records(consumer, last, within_s=_READ_S)
    finally:
        await quietly_stopped(consumer.stop)
    marks = {(tp.topic, tp.partition): _mark(record) for tp, record in records.items() if record is not None}
    return {at: mark for at, mark in marks.items() if mark is not None}


def _mark(record: Record) -> int | None:
    mark = dict(record.headers).get(WATERMARK_HEADER)
    return int(mark) if not record.value and mark is not None and mark.isdigit() else None
