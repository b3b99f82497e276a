"""Which stretches of `examples` a trainer that is sent back leaves out: named by offsets, by times, or up to the log's end.

Everything is resolved to offsets when the operation is planned, so the registry says exactly what is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition
from msgspec.structs import replace

from state.errors import Refused
from state.rewinds import SkippedRange
from stream.kafka.clients import answer, quietly_stopped, started, unreachable
from stream.kafka.cluster import describe_cluster
from stream.kafka.read_log import Span, log_consumer, log_spans
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["NOTHING", "SkipRequest", "TimeRange", "checked", "resolve_skips", "up_to_the_end"]


class TimeRange(NamedTuple):
    """From one time up to but not including another, ms since epoch, by the times of Kafka's records."""

    from_ms: int
    to_ms: int


@dataclass(frozen=True, slots=True)
class SkipRequest:
    """What to leave out.

    to_latest  everything from the version's offsets to the log's end as it is now
    ranges     by offsets
    times      by times
    """

    to_latest: bool = False
    ranges: tuple[SkippedRange, ...] = ()
    times: tuple[TimeRange, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.to_latest or self.ranges or self.times)


NOTHING = SkipRequest()
"""Nothing is left out."""


async def resolve_skips(
    kafka: KafkaSettings, names: TopicNames, request: SkipRequest, version: int, learned: Mapping[int, int]
) -> tuple[SkippedRange, ...]:
    """The ranges that a request names, as offsets of the log as it is now.

    Args:
        version: the version that the trainer is sent back to.
        learned: by partition, the next offset that this version would train.

    Raises:
        Refused: a range isn't in the log, or the version has learned some of it.
        NoAnswer: Kafka can't be reached.
        TopicError: the topic doesn't exist.
    """
    cluster = await describe_cluster(kafka, (names.examples,))
    partitions = [TopicPartition(names.examples, number) for number in range(cluster.partitions[names.examples])]
    consumer = await started(kafka, log_consumer(kafka), f"the offsets of {names.examples}")
    try:
        spans = {tp.partition: span for tp, span in (await log_spans(kafka, consumer, partitions)).items()}
        found = list(request.ranges)
        for times in request.times:
            if times.from_ms >= times.to_ms:
                raise Refused(f"--skip-time: expected a time before {times.to_ms} ms, found {times.from_ms} ms.")
            bounds = []
            for at_ms in times:
                asked = consumer.offsets_for_times(dict.fromkeys(partitions, at_ms))
                offsets = await answer(kafka, asked, f"the offsets of a time in {names.examples}")
                bounds.append({tp.partition: None if each is None else each.offset for tp, each in offsets.items()})
            for partition, span in spans.items():
                # None: no record is as new as that time.
                first, to = (span.end if (at := each.get(partition)) is None else min(at, span.end) for each in bounds)
                if first < to:
                    found.append(SkippedRange(partition=partition, first=first, to=to))
    except KafkaError as error:
        raise unreachable(kafka, f"the offsets of {names.examples}", error) from error
    finally:
        await quietly_stopped(consumer.stop)
    if request.to_latest:
        found += up_to_the_end(learned, spans)
    ranges = checked(found, learned, spans, version)
    return tuple(replace(each, topic_id=cluster.topic_ids[names.examples]) for each in ranges)


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
