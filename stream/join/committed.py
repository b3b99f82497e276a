"""Reads what the join's group has committed for a partition number, and rejects it where the join can't go on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream.errors import PositionError
from stream.join.commit_metadata import Progress, decode_progress
from stream.kafka.offsets import committed_offsets
from stream.kafka.read_log import Span, high_watermarks, read_spans
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["STALL_S", "Committed", "CommittedReader"]

# Longest wait for records that an open transaction holds back: that of a replay ends within its timeout of 60 s.
STALL_S = 90.0


@dataclass(slots=True)
class Committed:
    """What the join's group has committed for a partition number, and where the logs begin and end."""

    impressions: int
    clicks: int
    impressions_start: int  # of the log
    clicks_start: int
    examples_start: int
    examples_end: int  # of all that is written, open transactions of others included
    progress: Progress | None  # None before the first transaction ever, and after the offsets were reset by hand


@dataclass(frozen=True, slots=True)
class CommittedReader:
    """Reads the committed offsets of one partition number, with their metadata.

    Read them after the partition's transactional producer has started: before that, a commit of the previous owner may be in
    flight.
    """

    kafka: KafkaSettings
    names: TopicNames
    group: str
    identity: str
    """The ids of cluster and topics (`JoinWorker`). Progress with another identity belongs to another log."""

    async def read(self, consumer: Any, number: int) -> Committed:
        """The committed offsets and their metadata; the start of the logs before the first transaction.

        Args:
            consumer: a started one without a group, which reads committed records.

        Raises:
            PositionError: the log lost records that were not read yet, or ends before what was committed; or `examples` holds
                labels but nothing is committed; or the offsets were reset for one source alone.
        """
        impressions = TopicPartition(self.names.impressions, number)
        clicks = TopicPartition(self.names.clicks, number)
        known = await committed_offsets(self.kafka, self.group, [impressions, clicks])
        examples = TopicPartition(self.names.examples, number)
        starts = await consumer.beginning_offsets([impressions, clicks, examples])
        end = (await high_watermarks(self.kafka, [examples]))[examples]
        bounds = starts[impressions], starts[clicks], starts[examples], end
        if not known:
            if await _holds_records(consumer, examples, starts[examples], end):
                # Brokers forget the offsets of a group without members after a week (offsets.retention.minutes).
                raise PositionError(
                    f"group {self.group}, partition {number}: expected committed offsets, since {self.names.examples} holds "
                    "labels, found none: they have expired, or `join.group` has changed. Beginning at the head of the log "
                    "would label again what was labelled. Set the offsets of impressions and clicks with Kafka's "
                    "consumer-groups tool, and the join begins from there."
                )
            return Committed(starts[impressions], starts[clicks], *bounds, None)
        self._check_pair(known, number)
        self._check_log(known, starts, await consumer.end_offsets([impressions, clicks]), number)
        progress = self._progress(known[impressions].metadata, number)
        return Committed(known[impressions].offset, known[clicks].offset, *bounds, progress)

    def _check_pair(self, known: Mapping[TopicPartition, OffsetAndMetadata], number: int) -> None:
        """Offsets of both sources must be there, and have been committed by the same transaction."""
        if len(known) != 2:
            raise PositionError(
                f"group {self.group}, partition {number}: expected committed offsets of impressions and clicks, found only "
                f"{', '.join(tp.topic for tp in known)}: the other topic was deleted and made anew, which deletes its "
                "offsets, or they were reset alone. To begin again, reset those of both topics with Kafka's consumer-groups "
                "tool."
            )
        if len(alone := [tp.topic for tp, offset in known.items() if not offset.metadata]) == 1:
            raise PositionError(
                f"group {self.group}, partition {number}: expected the join's progress with the committed offsets of "
                f"impressions and clicks, found none with those of {alone[0]}: they were reset alone. Labelled "
                "impressions can't be told apart from pending ones then. To begin again, reset those of both topics with "
                "Kafka's consumer-groups tool."
            )

    def _check_log(
        self,
        known: Mapping[TopicPartition, OffsetAndMetadata],
        starts: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
        number: int,
    ) -> None:
        """The committed offsets must lie within the logs."""
        for tp, offset in known.items():
            if offset.offset > ends[tp]:
                raise PositionError(
                    f"{tp.topic}, partition {number}: committed up to {offset.offset}, found the log ending at {ends[tp]}. "
                    "The topic was made anew or lost data: reset the group's offsets with Kafka's consumer-groups tool."
                )
            if offset.offset < starts[tp]:
                raise PositionError(
                    f"{tp.topic}, partition {number}: offsets {offset.offset} to {starts[tp] - 1} were deleted before they "
                    "were read. Retention is too short for how long the join stood still: raise `topics.retention_ms`, and "
                    "reset the group's offsets with Kafka's consumer-groups tool to go on without them."
                )

    def _progress(self, metadata: str, number: int) -> Progress | None:
        try:
            progress = decode_progress(metadata) if metadata else None
        except msgspec.DecodeError as error:
            raise PositionError(
                f"group {self.group}, partition {number}: expected the join's progress in the committed offsets' metadata, "
                f"found {metadata[:80]!r}. Something else commits in this group: give the join another `join.group`, or reset "
                "the offsets of both topics with Kafka's consumer-groups tool, and the join begins from there."
            ) from error
        if progress is not None and progress.identity not in ("", self.identity):
            raise PositionError(
                f"group {self.group}, partition {number}: expected the topics that its progress was committed for, found "
                f"others of the same names: {self._recreated(progress.identity)}. Labelled impressions can't be told apart "
                "from pending ones. To begin again, reset the offsets of impressions and clicks with Kafka's consumer-groups "
                "tool: to the ends of their logs if no impression may be labelled a second time."
            )
        return progress

    def _recreated(self, then: str) -> str:
        """What differs between an identity committed earlier and this one."""
        names = ("the cluster", self.names.impressions, self.names.clicks, self.names.examples)
        pairs = zip(names, then.split("/"), self.identity.split("/"), strict=False)
        return ", ".join(f"{name} was made anew (id {new}, before {old})" for name, old, new in pairs if old != new)


async def _holds_records(consumer: Any, tp: TopicPartition, start: int, end: int) -> bool:
    """Whether any record was ever committed there; markers of an aborted first transaction don't count."""
    async for _ in read_spans(consumer, {tp: Span(start, end)}, stall_s=STALL_S):
        return True
    return False
