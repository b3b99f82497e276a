"""Reading the topic `dead-letters`: letters, and receipts of letters that were replayed.

A replay writes a receipt to `dead-letters`, in the partition of the letters that it stands for, and in the transaction that
sends their records again. The receipt lies after its letters, so retention never deletes it before them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from stream.errors import TopicError
from stream.kafka.cluster import describe_cluster
from stream.kafka.read_log import Span, high_watermarks, log_consumer, log_spans, read_spans
from stream.records.dead_letter import Letter, Origin, read_letter
from stream.records.record import Record
from stream.records.replay import read_receipt
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["LetterLog", "Wanted"]

# Longest wait for a transaction that is open before the end of `dead-letters`. The broker ends the join's transactions after
# `join.transaction_timeout_ms`, 15 s by default.
OPEN_TRANSACTION_S = 60.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters to read. Empty and None stand for all. Times are of the arrival in `dead-letters`, ms since the epoch."""

    reasons: Collection[str] = ()
    sources: Collection[str] = ()
    """Full names of source topics."""
    names: Collection[str] = ()
    """`PARTITION/OFFSET` in `dead-letters` (`Letter.name`)."""
    since_ms: int | None = None
    until_ms: int | None = None

    def takes(self, letter: Letter) -> bool:
        return (
            (not self.reasons or letter.reason in self.reasons)
            and (not self.sources or letter.origin.topic in self.sources)
            and (not self.names or letter.name in self.names)
            and (self.since_ms is None or letter.arrived_ms >= self.since_ms)
            and (self.until_ms is None or letter.arrived_ms < self.until_ms)
        )


@dataclass(slots=True)
class LetterLog:
    """Reads all of `dead-letters`, without a consumer group and without writing anything. Use it in `async with`."""

    kafka: KafkaSettings
    names: TopicNames
    spans: dict[TopicPartition, Span] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    """The number of partitions of each topic that letters can come from."""
    _consumer: AIOKafkaConsumer | None = None

    async def __aenter__(self) -> LetterLog:
        """Raises TopicError when a topic is missing, and the Kafka clients' errors when Kafka can't be reached."""
        names = self.names
        sources = (names.impressions, names.clicks, names.examples, names.score_requests)
        cluster = await describe_cluster(self.kafka, (names.dead_letters, *sources))
        self.sources = {name: cluster.partitions[name] for name in sources}
        partitions = [TopicPartition(names.dead_letters, number) for number in range(cluster.partitions[names.dead_letters])]
        consumer = log_consumer(self.kafka)
        await consumer.start()
        try:
            self.spans = await log_spans(self.kafka, consumer, partitions)
        except BaseException:
            await consumer.stop()
            raise
        self._consumer = consumer
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._consumer is not None:
            await self._consumer.stop()

    async def to_the_very_end(self) -> None:
        """Also read what is written by now in open transactions of other writers. Reading then waits until these end."""
        ends = await high_watermarks(self.kafka, list(self.spans))
        self.spans = {tp: Span(span.start, ends[tp]) for tp, span in self.spans.items()}

    async def replayed(self) -> set[Origin]:
        """The origins of all letters that were replayed."""
        return {origin async for record in self._records(self.spans) for origin in read_receipt(record)}

    async def letters(self, wanted: Wanted) -> AsyncIterator[Letter]:
        """The wanted letters, in order of offset within a partition."""
        async for record in self._records(self.spans):
            letter = read_letter(record)
            if letter is not None and wanted.takes(letter):
                yield letter

    async def letter(self, partition: int, offset: int) -> Letter:
        """One letter.

        Raises:
            TopicError: there is no letter at that offset.
        """
        tp = TopicPartition(self.names.dead_letters, partition)
        start, end = self.spans.get(tp, Span(0, 0))
        if start <= offset < end:
            async for record in self._records({tp: Span(offset, offset + 1)}):
                letter = read_letter(record)
                if letter is not None:
                    return letter
        raise TopicError(
            f"{self.names.dead_letters} {partition}/{offset}: expected a dead letter, found none at that offset (partition "
            f"{partition} has offsets {start} to {end - 1}). `headrace dead-letters list` shows the offsets of all letters."
        )

    async def _records(self, spans: dict[TopicPartition, Span]) -> AsyncIterator[Record]:
        async for _, records in read_spans(self._consumer, spans, stall_s=OPEN_TRANSACTION_S):
            for record in records:
                yield record
