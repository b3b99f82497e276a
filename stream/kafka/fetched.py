"""Returns the records of a fetch a batch at a time, where aiokafka returns them one at a time.

aiokafka makes a `ConsumerRecord` of each record, by a generator, an iterator and a loop in Python: 1.4 µs a record. Here
aiokafka's compiled parser fills one list a batch, and each record becomes a named tuple: 0.8 µs. Transactions, checksums and
positions are handled as in aiokafka 0.14.0; `tests/stream/kafka/test_fetched.py` compares the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecord, DefaultRecordBatch

__all__ = ["LogRecord", "install"]

# Limit for the expanded bytes of compressed batches in one `take`. Batches beyond stay compressed until the next `take`. The
# last batch may exceed the limit; each batch has its own (`stream/kafka/batch_reader.py`). Batches that aren't compressed are
# limited by the size of the fetch.
TAKE_MAX_BYTES = 64 << 20


class LogRecord(NamedTuple):
    """A record of the log: the attributes of aiokafka's `ConsumerRecord` that Headrace uses, under the same names."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


def install() -> None:
    """Make every consumer of this process read this way. Safe to repeat; called where client options are built."""
    fetcher.PartitionRecords = _PartitionRecords
    fetcher.FetchResult = _FetchResult


class _PartitionRecords(PartitionRecords):
    """The records of one partition in one fetch."""

    next_fetch_offset: int

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._left: list[DefaultRecord] = []  # the rest of the current batch, in reverse
        self._next_batch_offset = self.next_fetch_offset
        self._expanded = 0  # expanded bytes of compressed batches in this `take`
        self.exhausted = False

    def _unpack_records(self) -> None:
        """aiokafka's generator isn't needed: `take` reads batches."""

    def __next__(self) -> LogRecord:
        for record in self.take(1):
            return record
        raise StopIteration

    def take(self, most: int | None) -> list[LogRecord]:
        """Return the next records, at most `most`, and move the position behind them.

        Fewer are returned at the end (then `exhausted` is true), and where compressed batches reach `TAKE_MAX_BYTES`.
        """
        taken: list[LogRecord] = []
        self._expanded = 0
        topic, partition = self._tp
        while most is None or len(taken) < most:
            if not self._left and (self._expanded >= TAKE_MAX_BYTES or not self._begin_batch()):
                break
            count = len(self._left) if most is None else min(most - len(taken), len(self._left))
            raw = self._left[: -count - 1 : -1]
            del self._left[-count:]
            taken += [
                LogRecord(topic, partition, one.offset, one.timestamp, one.key, one.value, tuple(one.headers)) for one in raw
            ]
            # At the end of a batch, go behind the whole batch: compaction may have removed its last records.
            self.next_fetch_offset = taken[-1].offset + 1 if self._left else self._next_batch_offset
        return taken

    def _begin_batch(self) -> bool:
        """Read the next batch with records at or behind the position. False when there is none."""
        records = self._records
        while records.has_next():
            batch = records.next_batch()
            if self._check_crcs and not batch.validate_crc():
                raise CorruptRecordException(f"Invalid CRC - {self._tp}")
            if not self._is_aborted(batch) and not batch.is_control_batch:
                self._left = [record for record in batch if record.offset >= self.next_fetch_offset]
                self._left.reverse()
                self._expanded += getattr(batch, "expanded_bytes", 0)  # of `stream.kafka.batch_reader`'s batches
            self._next_batch_offset = batch.next_offset
            if self._left:
                return True
            self.next_fetch_offset = batch.next_offset
        self.exhausted = True
        return False

    def _is_aborted(self, batch: DefaultRecordBatch) -> bool:
        if self._isolation_level != READ_COMMITTED or batch.producer_id is None:
            return False
        self._consume_aborted_up_to(batch.base_offset)
        if batch.is_control_batch and self._contains_abort_marker(batch):
            self._aborted_producers.discard(batch.producer_id)
        return batch.is_transactional and batch.producer_id in self._aborted_producers


class _FetchResult(FetchResult):
    """The records of one partition in one fetch, as aiokafka's fetcher keeps them until they are asked for."""

    _partition_records: _PartitionRecords | None

    def getall(self, max_records: int | None = None) -> list[LogRecord]:
        if not self.check_assignment(self._topic_partition) or self._partition_records is None:
            return []
        taken = self._partition_records.take(max_records)
        self._update_position()
        if self._partition_records.exhausted:
            self._partition_records = None
        return taken
