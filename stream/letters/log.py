"""The topic `dead-letters` as it is read: letters, and receipts of letters that were replayed.

A replay writes a receipt into `dead-letters`, beside the letters it stands for and in the transaction that feeds their records
again. A receipt lies after its letters in the same partition, so retention never deletes it before them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from aiokafka.structs import TopicPartition

from stream.errors import TopicError
from stream.kafka.batches import Outgoing
from stream.kafka.cluster import describe_cluster
from stream.kafka.log_spans import Span, high_watermarks, read_spans, span_consumer
from stream.records.dead_letter import ORIGINAL, OUR_HEADERS, SIZE_HEADER, WITHOUT_BYTES
from stream.records.record import Header
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["RECEIPT_HEADER", "Letter", "LetterLog", "Origin", "Wanted", "read_letter", "read_receipt", "receipt"]

# On the receipt of a replay, and on nothing else in `dead-letters`; its value is how many letters the receipt stands for.
RECEIPT_HEADER = "replayed"
# Longest wait for a transaction that is open before the end of `dead-letters`. The join's end by themselves after
# `join.transaction_timeout_ms`, 15 s by default.
OPEN_TRANSACTION_S = 60.0


class Origin(NamedTuple):
    """Where a record was found that became a dead letter. Two letters of one origin are one record, told twice."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter as it was read; `headers` are the original record's own, under their own names."""

    partition: int
    offset: int
    arrived_ms: int
    reason: str
    error: str
    path: str
    origin: Origin
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...]
    source_size: int | None = None
    """Bytes of the record, where the letter goes without them; None where it has them, or nobody knows."""

    @property
    def has_bytes(self) -> bool:
        """Whether the letter has the record's bytes; without them only `origin` says where they are."""
        return self.reason not in WITHOUT_BYTES

    @property
    def place(self) -> str:
        """How the command line names it: `PARTITION/OFFSET` in `dead-letters`."""
        return f"{self.partition}/{self.offset}"

    @property
    def size(self) -> int:
        """Bytes of key and value."""
        return len(self.key or b"") + len(self.value or b"")


class _Receipt(msgspec.Struct, frozen=True):
    who: str
    replayed: list[tuple[str, int, int]]


def read_letter(record: Any) -> Letter | None:
    """From a ConsumerRecord of `dead-letters`; None for a receipt, and for what isn't a letter of ours."""
    ours, theirs = record.headers[: len(OUR_HEADERS)], record.headers[len(OUR_HEADERS) :]
    if tuple(name for name, _ in ours) != OUR_HEADERS:
        return None
    values = {name: (value or b"").decode(errors="replace") for name, value in ours}
    try:
        origin = Origin(values["source_topic"], int(values["source_partition"]), int(values["source_offset"]))
        source_size = None
        if values["reason"] == "too_large" and theirs and theirs[0][0] == SIZE_HEADER:
            source_size, theirs = int(theirs[0][1] or b""), theirs[1:]
    except ValueError:
        return None
    return Letter(
        partition=record.partition,
        offset=record.offset,
        arrived_ms=record.timestamp,
        reason=values["reason"],
        error=values["error"],
        path=values["path"],
        origin=origin,
        key=record.key,
        value=record.value,
        headers=tuple((name.removeprefix(ORIGINAL), value) for name, value in theirs),
        source_size=source_size,
    )


def receipt(origins: Sequence[Origin], who: str) -> Outgoing:
    """The record that says: these were replayed."""
    document = _Receipt(who, [(origin.topic, origin.partition, origin.offset) for origin in origins])
    return None, msgspec.json.encode(document), [(RECEIPT_HEADER, b"%d" % len(origins))]


def read_receipt(record: Any) -> list[Origin]:
    """The origins that a record of `dead-letters` is a receipt for; none when it is no receipt."""
    if not record.headers or record.headers[0][0] != RECEIPT_HEADER:
        return []
    with contextlib.suppress(msgspec.DecodeError):
        return [Origin(*each) for each in msgspec.json.decode(record.value or b"", type=_Receipt).replayed]
    return []


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters. Empty and None stand for all; times are the letter's arrival in `dead-letters`, ms since the epoch."""

    reasons: Collection[str] = ()
    sources: Collection[str] = ()
    """Full names of source topics."""
    places: Collection[str] = ()
    """`PARTITION/OFFSET` in `dead-letters`."""
    since_ms: int | None = None
    until_ms: int | None = None

    def takes(self, letter: Letter) -> bool:
        return (
            (not self.reasons or letter.reason in self.reasons)
            and (not self.sources or letter.origin.topic in self.sources)
            and (not self.places or letter.place in self.places)
            and (self.since_ms is None or letter.arrived_ms >= self.since_ms)
            and (self.until_ms is None or letter.arrived_ms < self.until_ms)
        )


@dataclass(slots=True)
class LetterLog:
    """Reads `dead-letters` whole; looking writes nothing and belongs to no group. Use it in `async with`."""

    kafka: KafkaSettings
    names: TopicNames
    spans: dict[TopicPartition, Span] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    """How many partitions each topic has that letters can come from."""
    _consumer: Any = None

    async def __aenter__(self) -> LetterLog:
        """Raises TopicError where a topic is missing, and the Kafka clients' errors where Kafka is."""
        names = self.names
        sources = (names.impressions, names.clicks, names.examples, names.score_requests)
        cluster = await describe_cluster(self.kafka, (names.dead_letters, *sources))
        self.sources = {name: cluster.partitions[name] for name in sources}
        partitions = [TopicPartition(names.dead_letters, number) for number in range(cluster.partitions[names.dead_letters])]
        consumer = span_consumer(self.kafka)
        await consumer.start()
        try:
            starts, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        except BaseException:
            await consumer.stop()
            raise
        self.spans = {tp: (starts[tp], ends[tp]) for tp in partitions}
        self._consumer = consumer
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    async def to_the_very_end(self) -> None:
        """Take in what is written up to now, open transactions of other writers included: reading then waits for those."""
        ends = await high_watermarks(self.kafka, list(self.spans))
        self.spans = {tp: (start, ends[tp]) for tp, (start, _) in self.spans.items()}

    async def replayed(self) -> set[Origin]:
        """The origins of all that was replayed."""
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
            TopicError: there is none at that place.
        """
        tp = TopicPartition(self.names.dead_letters, partition)
        start, end = self.spans.get(tp, (0, 0))
        if start <= offset < end:
            async for record in self._records({tp: (offset, offset + 1)}):
                letter = read_letter(record)
                if letter is not None:
                    return letter
        raise TopicError(
            f"{self.names.dead_letters} {partition}/{offset}: expected a dead letter, found none at that place (partition "
            f"{partition} has offsets {start} to {end - 1}). `headrace dead-letters list` shows the places of those there are."
        )

    async def _records(self, spans: dict[TopicPartition, Span]) -> AsyncIterator[Any]:
        async for _, records in read_spans(self._consumer, spans, stall_s=OPEN_TRANSACTION_S):
            for record in records:
                yield record
