"""The log of deltas as a replica reads it: `stream.deltas.reader` in the words of `state.chain`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from state.chain import Problem
from stream.deltas.pieces import DeltaProblem
from stream.deltas.reader import DeltaReader
from stream.scorer.replica import DeltaLog, LogItem
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["open_deltas"]


@asynccontextmanager
async def open_deltas(kafka: KafkaSettings, names: TopicNames, offset: int) -> AsyncIterator[DeltaLog]:
    """The log from an offset on.

    Raises:
        TopicError: the topic doesn't exist.
        NoAnswer: Kafka can't be reached.
    """
    reader = DeltaReader(kafka, names, start=offset)
    await reader.open()
    try:
        yield _Reading(reader)
    finally:
        await reader.close()


class _Reading:
    def __init__(self, reader: DeltaReader) -> None:
        self._reader = reader

    @property
    def position(self) -> int:
        return self._reader.position

    @property
    def at_end(self) -> bool:
        return self._reader.at_end

    async def __aiter__(self) -> AsyncIterator[LogItem]:
        async for found in self._reader:
            if isinstance(found, DeltaProblem):
                yield LogItem(_problem(found), found.next_offset)
            else:
                yield LogItem(found.delta, found.next_offset)


def _problem(found: DeltaProblem) -> Problem:
    epoch, ordinal, sequence = (None if number < 0 else number for number in (found.epoch, found.ordinal, found.sequence))
    return Problem(found.reason, f"{found.message} At offset {found.offset} of deltas.", epoch, ordinal, sequence)
