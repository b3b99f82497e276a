"""Whether a trainer can be sent back to a version, and which stretches of `examples` it leaves out then.

Stretches are named by offsets, by times, or up to the log's end. Everything is resolved to offsets when the operation is
planned, so the registry says exactly what is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition
from msgspec.structs import replace

from state.changes import Rewinding
from state.errors import Refused
from state.manifest import Manifest
from state.rewinds import SkippedRange
from state.store import SnapshotStore
from stream.kafka.clients import answer, quietly_stopped, started, unreachable
from stream.kafka.cluster import describe_cluster
from stream.kafka.read_log import Span, log_consumer, log_spans
from stream.records.times import clock
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = [
    "NOTHING",
    "AskedRange",
    "Moment",
    "SkipRequest",
    "TimeRange",
    "between",
    "checked",
    "require_past",
    "require_startable",
    "resolve_rewinding",
    "up_to_the_end",
]

# Clocks of brokers may differ by this much before a range that ends now counts as one in the future.
CLOCK_MS = 60_000


class TimeRange(NamedTuple):
    """From one time up to but not including another, ms since epoch, by the times of Kafka's records."""

    from_ms: int
    to_ms: int

    def at(self, now_ms: int) -> TimeRange:
        """The same."""
        return self


class Moment(NamedTuple):
    """A time, ms since epoch; or how long ago, ms."""

    ms: int
    ago: bool = False

    def at(self, now_ms: int) -> int:
        """As ms since epoch."""
        return now_ms - self.ms if self.ago else self.ms


class AskedRange(NamedTuple):
    """From one time up to but not including another. How long ago it was counts from the operation, by Kafka's clock."""

    first: Moment
    to: Moment

    def at(self, now_ms: int) -> TimeRange:
        """As ms since epoch."""
        return TimeRange(self.first.at(now_ms), self.to.at(now_ms))


@dataclass(frozen=True, slots=True)
class SkipRequest:
    """What to leave out.

    to_latest  everything from the version's offsets to the log's end as it is now
    ranges     by offsets
    times      by times
    """

    to_latest: bool = False
    ranges: tuple[SkippedRange, ...] = ()
    times: tuple[TimeRange | AskedRange, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.to_latest or self.ranges or self.times)


NOTHING = SkipRequest()
"""Nothing is left out."""


async def resolve_rewinding(
    kafka: KafkaSettings,
    names: TopicNames,
    store: SnapshotStore | None,
    version: int,
    request: SkipRequest,
    now_ms: int,
) -> Rewinding:
    """What the trainer is asked for when it is sent back to a version: ranges as offsets of the log as it is now.

    Args:
        store: None: don't check whether a trainer can go on from the version. Nothing can be left out then.
        now_ms: by Kafka's clock, where the request goes by time.

    Raises:
        Refused: no trainer could go on from the version; or a range isn't in the log, or the version has learned some of it.
        SnapshotError: the store can't be read.
        NoAnswer: Kafka can't be reached.
        TopicError: the topic doesn't exist.
    """
    if store is None:
        return Rewinding()
    manifest = await asyncio.to_thread(store.manifest, version)
    learned = {int(partition): offset for partition, offset in manifest.offsets.items()}
    cluster = await describe_cluster(kafka, (names.examples,))
    topic_id = cluster.topic_ids[names.examples]
    partitions = [TopicPartition(names.examples, number) for number in range(cluster.partitions[names.examples])]
    consumer = await started(kafka, log_consumer(kafka), f"the offsets of {names.examples}")
    try:
        spans = {tp.partition: span for tp, span in (await log_spans(kafka, consumer, partitions)).items()}
        require_startable(manifest, topic_id, spans)
        found = list(request.ranges)
        for asked_times in request.times:
            times = asked_times.at(now_ms)
            require_past(times, now_ms)
            bounds = []
            for at_ms in times:
                asked = consumer.offsets_for_times(dict.fromkeys(partitions, at_ms))
                offsets = await answer(kafka, asked, f"the offsets of a time in {names.examples}")
                bounds.append({tp.partition: None if each is None else each.offset for tp, each in offsets.items()})
            found += between(times, bounds[0], bounds[1], spans)
    except KafkaError as error:
        raise unreachable(kafka, f"the offsets of {names.examples}", error) from error
    finally:
        await quietly_stopped(consumer.stop)
    if request.to_latest:
        found += up_to_the_end(learned, spans)
    ranges = checked(found, learned, spans, version)
    return Rewinding(tuple(replace(each, topic_id=topic_id) for each in ranges))


def require_startable(manifest: Manifest, topic_id: str, spans: Mapping[int, Span]) -> None:
    """Raise Refused unless a trainer can go on from a version. One that is sent to another one ends, and can't start again.

    Args:
        topic_id: Kafka's id of `examples` as it is now.
    """
    name = f"rewind to version {manifest.version}"
    otherwise = "Choose another version: `headrace snapshot list`. --unchecked sends the trainer there all the same."
    if not any(file.startswith("trainer") for file in manifest.files):
        raise Refused(f"{name}: expected a version with the trainer's state, found one without. {otherwise}")
    trained = manifest.topic_ids.get("examples")
    if trained and trained != topic_id:
        raise Refused(
            f"{name}: expected one that was trained on the present topic of examples (id {topic_id}), found one of a topic "
            f"with id {trained}, whose offsets mean nothing here. {otherwise}"
        )
    for partition, offset in sorted((int(partition), offset) for partition, offset in manifest.offsets.items()):
        span = spans.get(partition)
        if span is None or not span.start <= offset <= span.end:
            there = "no such partition" if span is None else f"a log from {span.start} to {span.end}"
            raise Refused(
                f"{name}: expected examples from offset {offset} of partition {partition} on, which come next after this "
                f"version, found {there}. {otherwise}"
            )


def require_past(times: TimeRange, now_ms: int) -> None:
    """Raise Refused for a range of times that is empty or isn't over: only what is in the log can be left out."""
    name = f"--skip-time {clock(times.from_ms)}..{clock(times.to_ms)}"
    if times.from_ms >= times.to_ms:
        raise Refused(f"{name}: expected the earlier time first, found the later one.")
    if times.to_ms > now_ms + CLOCK_MS:
        raise Refused(
            f"{name}: expected times that have passed, found an end {(times.to_ms - now_ms) / 1_000:,.0f} s from now by "
            "Kafka's clock. What is stored later can't be left out: roll back again then."
        )


def between(
    times: TimeRange, first: Mapping[int, int | None], to: Mapping[int, int | None], spans: Mapping[int, Span]
) -> list[SkippedRange]:
    """The ranges of a time in all partitions.

    Args:
        first, to: by partition, the offset of the first record that is as new as the beginning, and as the end; None: there is
            none.

    Raises:
        Refused: no partition has a record of that time.
    """
    found = []
    for partition, span in spans.items():
        start, end = (span.end if (at := each.get(partition)) is None else min(at, span.end) for each in (first, to))
        if start < end:
            found.append(SkippedRange(partition=partition, first=start, to=end))
    if not found:
        raise Refused(
            f"--skip-time {clock(times.from_ms)}..{clock(times.to_ms)}: expected examples that Kafka stored in that time, "
            "found none in any partition, so nothing would be left out. Is the time zone right? Without an offset it is UTC."
        )
    return found


def up_to_the_end(learned: Mapping[int, int], spans: Mapping[int, Span]) -> list[SkippedRange]:
    """Everything that a version hasn't learned yet."""
    ranges = []
    for partition, span in sorted(spans.items()):
        first = max(learned.get(partition, span.start), span.start)
        if first < span.end:
            ranges.append(SkippedRange(partition=partition, first=first, to=span.end))
    return ranges


def checked(
    ranges: Iterable[SkippedRange], learned: Mapping[int, int], spans: Mapping[int, Span], version: int
) -> list[SkippedRange]:
    """The ranges, by partition and offset.

    Raises:
        Refused: a range is empty or isn't in the log, or the version has learned some of it.
    """
    found = sorted(ranges, key=lambda each: (each.partition, each.first, each.to))
    for each in found:
        name = f"skip {each.partition}:{each.first}-{each.to}"
        span = spans.get(each.partition)
        if span is None:
            raise Refused(f"{name}: expected a partition of examples, 0 to {max(spans, default=0)}, found {each.partition}.")
        if each.first >= each.to:
            raise Refused(f"{name}: expected a first offset below the end of the range, found {each.first}.")
        if each.to > span.end:
            raise Refused(f"{name}: expected a range of the log, which ends at offset {span.end}, found one up to {each.to}.")
        known = learned.get(each.partition, span.start)
        if each.first < known:
            raise Refused(
                f"{name}: expected a range that version {version} hasn't learned, found one whose offsets up to "
                f"{min(known, each.to)} are in its weights. Go back further (`--to`, `--back`, `--before`), or begin the range "
                f"at offset {known}."
            )
    return found
