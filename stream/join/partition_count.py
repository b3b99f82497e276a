"""Ends a join worker whose number of partitions was changed while records from before are still needed.

Kafka chooses a key's partition by its hash and the number of partitions. With another number, clicks of pending impressions go
to partitions that don't know these impressions, and a repeated impression goes to one that doesn't remember its id.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream.errors import TopicError
from stream.join.commit_metadata import Progress, decode_progress
from stream.kafka.offsets import committed_offsets
from stream.kafka.read_log import high_watermarks
from stream.settings import JoinSettings, KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["check_partition_count", "check_partitions"]


class _Joined(NamedTuple):
    """What was committed for one partition number."""

    impressions: TopicPartition
    impressions_at: int
    clicks_at: int
    progress: Progress


async def check_partitions(kafka: KafkaSettings, settings: JoinSettings, names: TopicNames, partitions: int) -> None:
    """Read what the join's group has committed, and check it with `check_partition_count`.

    Raises:
        TopicError: see there.
        NoAnswer: Kafka can't be reached.
    """
    sources = [TopicPartition(topic, number) for topic in (names.impressions, names.clicks) for number in range(partitions)]
    committed = await committed_offsets(kafka, f"{names.prefix}{settings.group}", sources)
    ends = await high_watermarks(kafka, sources)
    check_partition_count(committed, ends, names, partitions, settings.accept_partitions)


def check_partition_count(
    committed: Mapping[TopicPartition, OffsetAndMetadata],
    ends: Mapping[TopicPartition, int],
    names: TopicNames,
    partitions: int,
    accepted: int | None,
) -> None:
    """Check what the join's group has committed under another number of partitions.

    Args:
        committed: offsets and metadata of every partition of both sources that has any.
        ends: of both sources' logs.
        partitions: how many the topics have now.
        accepted: `join.accept_partitions`.

    Raises:
        TopicError: a partition still needs records from before the change, or has not read them; the message says what to do.
    """
    if accepted == partitions:
        return
    joined: list[_Joined] = []
    for tp, impressions in sorted(committed.items()):
        clicks = committed.get(TopicPartition(names.clicks, tp.partition))
        if tp.topic != names.impressions or clicks is None or not impressions.metadata:
            continue
        with contextlib.suppress(msgspec.DecodeError):  # the takeover of that partition says what is wrong
            joined.append(_Joined(tp, impressions.offset, clicks.offset, decode_progress(impressions.metadata)))
    # Once something is committed under the present number, unread records were sent under that number, too: unread records from
    # before were reported at the first start under it.
    begun = any(each.progress.partitions == partitions for each in joined)
    for tp, impressions_at, clicks_at, progress in joined:
        if progress.partitions in (0, partitions):
            continue
        settled = (progress.impressions_low, progress.clicks_low) == (impressions_at, clicks_at)
        read = ends.get(tp, 0) <= impressions_at and ends.get(TopicPartition(names.clicks, tp.partition), 0) <= clicks_at
        if settled and (read or begun):
            continue
        needed = "Records from before are not read yet" if settled else "Impressions from before are pending or remembered"
        raise TopicError(
            f"{names.impressions}, {names.clicks}: expected {progress.partitions} partitions, as when partition {tp.partition} "
            f"was joined last, found {partitions}. {needed}, and Kafka now sends their clicks to other partitions. Before you "
            "add partitions, stop the producers, let the join read to the end and send watermark records beyond the window and "
            "twice the dedupe horizon: everything is settled and forgotten then. To go on without that, with some clicks lost "
            f"and some repeated ids labelled twice, set HEADRACE_JOIN__ACCEPT_PARTITIONS={partitions}. "
            "See docs/join.md, More partitions."
        )
