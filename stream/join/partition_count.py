"""Refusing to go on after the number of partitions was changed under records that are still needed.

Kafka places a key by its hash and the number of partitions. With another number, clicks of pending impressions go to partitions
that don't know these, and a repeated impression to one that doesn't remember its id.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import msgspec
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream.errors import TopicError
from stream.join.commit_metadata import decode_progress
from stream.topics.names import TopicNames

__all__ = ["check_partition_count"]


def check_partition_count(
    committed: Mapping[TopicPartition, OffsetAndMetadata],
    ends: Mapping[TopicPartition, int],
    names: TopicNames,
    partitions: int,
    accepted: int | None,
) -> None:
    """Look at what the join's group has committed under another number of partitions.

    Args:
        committed: offsets and metadata of both sources, of every partition that has any.
        ends: of both sources' logs.
        partitions: of the topics now.
        accepted: `join.accept_partitions`.

    Raises:
        TopicError: a partition still needs records of before, or has not read them; the message says what to do.
    """
    if accepted == partitions:
        return
    joined = []
    for tp, impressions in sorted(committed.items()):
        clicks = committed.get(TopicPartition(names.clicks, tp.partition))
        if tp.topic != names.impressions or clicks is None or not impressions.metadata:
            continue
        with contextlib.suppress(msgspec.DecodeError):  # taking that partition over says what is wrong
            joined.append((tp, impressions.offset, clicks.offset, decode_progress(impressions.metadata)))
    # What has come since the first commit under this number was sent under it; who is behind was told so at the first start.
    begun = any(progress.partitions == partitions for *_, progress in joined)
    for tp, impressions_at, clicks_at, progress in joined:
        if progress.partitions in (0, partitions):
            continue
        settled = (progress.impressions_low, progress.clicks_low) == (impressions_at, clicks_at)
        read = ends.get(tp, 0) <= impressions_at and ends.get(TopicPartition(names.clicks, tp.partition), 0) <= clicks_at
        if settled and (read or begun):
            continue
        needed = "Records of before are not read yet" if settled else "Impressions of before are pending or remembered"
        raise TopicError(
            f"{names.impressions}, {names.clicks}: expected {progress.partitions} partitions, as when partition {tp.partition} "
            f"was joined last, found {partitions}. {needed}, and Kafka now places their clicks elsewhere. Before you add "
            "partitions, stop the producers, let the join read to the end and send watermark records beyond the window and "
            "twice the dedupe horizon: everything is settled and forgotten then. To go on without that, with some clicks lost "
            f"and some repeated ids labelled twice, set HEADRACE_JOIN__ACCEPT_PARTITIONS={partitions}. "
            "See docs/join.md, More partitions."
        )
