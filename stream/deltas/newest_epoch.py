"""The newest epoch that has written deltas, by the end of the log."""

from __future__ import annotations

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from stream.kafka.clients import quietly_stopped, started, unreachable
from stream.kafka.read_log import Span, log_consumer, log_spans, read_spans
from stream.records.delta import DeltaDamaged, read_piece
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["newest_epoch"]

# Offsets at the end of the log that are read. Epochs ascend along the log, since each writer fences the one before, so the last
# delta would do; some records may be markers of transactions, or somebody else's.
TAIL_RECORDS = 64
# Longest wait in which no broker sends anything.
STALL_S = 10.0


async def newest_epoch(kafka: KafkaSettings, names: TopicNames) -> int:
    """The largest epoch at the end of the log of deltas; 0 if there is no delta.

    The registry gives out epochs, and may have lost some: one that was made again knows those of versions only. A trainer that
    wrote under an epoch that scorers have already seen, or an older one, would not be followed.

    Raises:
        NoAnswer: Kafka can't be reached.
    """
    partition = TopicPartition(names.deltas, 0)
    consumer = await started(kafka, log_consumer(kafka), f"the end of {names.deltas}")
    found = 0
    try:
        start, end = (await log_spans(kafka, consumer, (partition,)))[partition]
        tail = {partition: Span(max(start, end - TAIL_RECORDS), end)}
        async for _, records in read_spans(consumer, tail, stall_s=STALL_S):
            for record in records:
                try:
                    found = max(found, read_piece(record.value).epoch)
                except DeltaDamaged:
                    continue
    except KafkaError as error:
        raise unreachable(kafka, f"the end of {names.deltas}", error) from error
    finally:
        await quietly_stopped(consumer.stop)
    return found
