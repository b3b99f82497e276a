"""How long after a click the first answer comes by weights that have learned it, from what the topics hold after a run.

- `examples` says where each click's label is, and when the click arrived in Kafka.
- `deltas` says which delta was the first whose weights have learned that label.
- `scores` says which answer was the first by weights that have this delta.

So every click is measured, and not a sample of them as in a scorer's own histogram. All times are the broker's, but for the
time at which a delta was taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
from aiokafka.structs import TopicPartition

from deploy.settings import Settings
from state.registry import RegistryState
from stream.kafka.clients import quietly_stopped, started
from stream.kafka.read_log import log_consumer, log_spans, read_spans
from stream.records.delta import DeltaHeader, read_piece
from stream.records.example import CORRECTION, read_example
from stream.records.join_notes import is_note
from stream.records.record import Record
from stream.registry.log import read_registry
from stream.topics.names import TopicNames

__all__ = ["Answers", "Clicks", "Deltas", "Followed", "follow_clicks", "read_followed"]

FETCH_BYTES = 8 << 20  # of one answer for one partition: a few round trips for a run
STALL_S = 20.0  # a broker that sends nothing for so long is away

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Clicks:
    """Examples with a click whose arrival is known, N of them: first labels and corrections.

    partition, offset  int64 (N,)  where the example is in `examples`
    impression_ms      int64 (N,)  event time of the impression
    arrived_ms         int64 (N,)  when the click arrived in Kafka
    written_ms         int64 (N,)  when the example arrived in Kafka
    corrects           int64 (N,)  1 for a correction, 0 for a first label
    """

    partition: Int64s
    offset: Int64s
    impression_ms: Int64s
    arrived_ms: Int64s
    written_ms: Int64s
    corrects: Int64s

    def __len__(self) -> int:
        return len(self.offset)


@dataclass(frozen=True, slots=True)
class Deltas:
    """Deltas of one chain, D of them, in the order of the log.

    sequence    int64 (D,)  the number in the chain
    taken_ms    int64 (D,)  when the trainer took the delta, by its own clock
    written_ms  int64 (D,)  when the delta's last record arrived in Kafka
    offsets     partition → int64 (D,): the next offset of `examples` to train
    """

    sequence: Int64s
    taken_ms: Int64s
    written_ms: Int64s
    offsets: Mapping[int, Int64s]

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers by weights of that chain, A of them, in the order in which they arrived in Kafka.

    sequence    int64 (A,)  the newest delta in the weights that scored
    written_ms  int64 (A,)
    """

    sequence: Int64s
    written_ms: Int64s

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True, slots=True)
class Followed:
    """The way of each click from its label to the first answer that knows it. The columns have the N clicks that got there.

    total        clicks in the log, those included that no delta or no answer had reached when the log was read
    clicks       the clicks that got there
    taken_ms     int64 (N,)  when the delta was taken that learned it first
    logged_ms    int64 (N,)  when this delta arrived in Kafka
    answered_ms  int64 (N,)  when the first answer by weights with this delta arrived in Kafka
    """

    total: int
    clicks: Clicks
    taken_ms: Int64s
    logged_ms: Int64s
    answered_ms: Int64s

    @property
    def click_to_answer_ms(self) -> Int64s:
        """int64 (N,): from the arrival of each click in Kafka to the first answer that knows it."""
        return self.answered_ms - self.clicks.arrived_ms


def follow_clicks(clicks: Clicks, deltas: Deltas, answers: Answers) -> Followed:
    """Find the first delta and the first answer of each click."""
    delta = np.full(len(clicks), len(deltas))
    for partition, ends in deltas.offsets.items():
        mine = np.flatnonzero(clicks.partition == partition)
        delta[mine] = np.searchsorted(ends, clicks.offset[mine], side="right")
    rows = np.flatnonzero(delta < len(deltas))
    # Partitions of `scores` may overtake one another, and a rollback goes back.
    reached = np.maximum.accumulate(answers.sequence)
    answer = np.searchsorted(reached, deltas.sequence[delta[rows]], side="left")
    rows, answer = rows[answer < len(answers)], answer[answer < len(answers)]
    there = Clicks(*(getattr(clicks, name)[rows] for name in Clicks.__slots__))
    first = delta[rows]
    return Followed(len(clicks), there, deltas.taken_ms[first], deltas.written_ms[first], answers.written_ms[answer])


async def read_followed(settings: Settings) -> Followed:
    """Read the logs of a run, whose trainer has published one chain."""
    names, topics = TopicNames.of(settings.topics), settings.topics
    clicks = _clicks(await _records(settings, names.examples, topics.partitions))
    deltas = _deltas(await _records(settings, names.deltas, 1), topics.partitions)
    registry = await read_registry(settings.kafka, names)
    answers = _answers(await _records(settings, names.scores, topics.request_partitions), registry)
    return follow_clicks(clicks, deltas, answers)


async def _records(settings: Settings, topic: str, partitions: int) -> list[Record]:
    """All committed records of a topic, in the order of their arrival."""
    kafka, wanted = settings.kafka, [TopicPartition(topic, number) for number in range(partitions)]
    consumer = await started(kafka, log_consumer(kafka, max_partition_fetch_bytes=FETCH_BYTES), topic)
    found: list[Record] = []
    try:
        async for _, records in read_spans(consumer, await log_spans(kafka, consumer, wanted), stall_s=STALL_S):
            found.extend(records)
    finally:
        await quietly_stopped(consumer.stop)
    return sorted(found, key=lambda record: record.timestamp)


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> Sequence[Int64s]:
    return list(np.array(rows, np.int64).reshape(-1, count).T)


def _clicks(records: Sequence[Record]) -> Clicks:
    rows = []
    for record in records:
        example = None if is_note(record) else read_example(record)
        if example is not None and example.click_arrived_ms >= 0:
            where, corrects = (record.partition, record.offset), int(example.kind == CORRECTION)
            rows.append((*where, example.impression_ms, example.click_arrived_ms, record.timestamp, corrects))
    return Clicks(*_columns(rows, 6))


def _deltas(records: Sequence[Record], partitions: int) -> Deltas:
    """The deltas of the newest chain. A delta of several records is in the log when its last record is."""
    decode = msgspec.json.Decoder(DeltaHeader).decode
    headers, written_ms = [], []
    for record in records:
        piece = read_piece(record.value)
        if not piece.piece:
            headers.append(decode(piece.content[: piece.header_bytes]))
        if piece.piece == piece.pieces - 1:
            written_ms.append(record.timestamp)
    newest = headers[-1].chain if headers else ""
    chosen = [index for index, header in enumerate(headers) if header.chain == newest]
    rows = [
        (
            headers[at].sequence,
            headers[at].at_ms,
            written_ms[at],
            *(headers[at].offsets.get(str(n), 0) for n in range(partitions)),
        )
        for at in chosen
    ]
    sequence, taken_ms, logged_ms, *offsets = _columns(rows, 3 + partitions)
    return Deltas(sequence, taken_ms, logged_ms, dict(enumerate(offsets)))


class _Answer(msgspec.Struct):
    """What is read of an answer's value."""

    model_version: int | None = None
    delta: int = 0


def _answers(records: Sequence[Record], registry: RegistryState) -> Answers:
    """The answers by versions of the newest chain, and by the deltas after them."""
    decode = msgspec.json.Decoder(_Answer).decode
    chain = next((each.chain for _, each in sorted(registry.versions.items(), reverse=True) if each.chain), "")
    begins = {version: each.sequence for version, each in registry.versions.items() if chain and each.chain == chain}
    rows = []
    for record in records:
        answer = decode(record.value or b"{}")
        begin = None if answer.model_version is None else begins.get(answer.model_version)
        if begin is not None:
            rows.append((begin + answer.delta, record.timestamp))
    return Answers(*_columns(rows, 2))
