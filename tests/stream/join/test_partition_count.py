"""Other partitions under records that are still needed are rejected; once all is settled they are fine."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream.errors import TopicError
from stream.join.commit_metadata import Progress, encode_progress
from stream.join.partition_count import check_partition_count
from tests.stream.join.world import NAMES

ENDS = {TopicPartition(NAMES.impressions, 0): 100, TopicPartition(NAMES.clicks, 0): 30}


def committed(*, partitions: int, impressions_low: int = 100, clicks_low: int = 30) -> dict[TopicPartition, OffsetAndMetadata]:
    """Of partition 0: 100 impressions and 30 clicks were read."""
    metadata = encode_progress(
        Progress(
            watermark_ms=5,
            impressions_seen_ms=5,
            clicks_seen_ms=5,
            impressions_low=impressions_low,
            clicks_low=clicks_low,
            examples_low=0,
            partitions=partitions,
        )
    )
    return {
        TopicPartition(NAMES.impressions, 0): OffsetAndMetadata(100, metadata),
        TopicPartition(NAMES.clicks, 0): OffsetAndMetadata(30, metadata),
    }


@pytest.mark.parametrize("needed", [{"impressions_low": 99}, {"clicks_low": 29}])
def test_what_is_still_needed_refuses_other_partitions(needed: dict[str, Any]) -> None:
    with pytest.raises(TopicError, match="expected 1 partitions, as when partition 0 was joined last, found 4") as told:
        check_partition_count(committed(partitions=1, **needed), ENDS, NAMES, 4, None)
    assert "HEADRACE_JOIN__ACCEPT_PARTITIONS=4" in str(told.value)
    check_partition_count(committed(partitions=1, **needed), ENDS, NAMES, 4, 4)  # at a price that was accepted
    check_partition_count(committed(partitions=4, **needed), ENDS, NAMES, 4, None)
    check_partition_count(committed(partitions=0, **needed), ENDS, NAMES, 4, None)  # of version 0.1.0, which doesn't say
    with pytest.raises(TopicError):
        check_partition_count(committed(partitions=1, **needed), ENDS, NAMES, 4, 2)


def test_once_all_is_settled_partitions_may_change() -> None:
    check_partition_count(committed(partitions=1), ENDS, NAMES, 4, None)
    check_partition_count({}, ENDS, NAMES, 4, None)


@pytest.mark.parametrize("topic", [NAMES.impressions, NAMES.clicks])
def test_what_is_not_read_yet_refuses_other_partitions(topic: str) -> None:
    """Its clicks, and those that it waits for, may be elsewhere by now."""
    ends = {tp: end + (tp.topic == topic) for tp, end in ENDS.items()}
    with pytest.raises(TopicError, match=r"found 4\. Records from before are not read yet") as told:
        check_partition_count(committed(partitions=1), ends, NAMES, 4, None)
    assert "HEADRACE_JOIN__ACCEPT_PARTITIONS=4" in str(told.value)
    check_partition_count(committed(partitions=1), ends, NAMES, 4, 4)
    check_partition_count(committed(partitions=4), ends, NAMES, 4, None)
    # Another partition was joined under the new number: what comes now comes under it.
    another = {TopicPartition(tp.topic, 1): offset for tp, offset in committed(partitions=4).items()}
    check_partition_count(committed(partitions=1) | another, ends, NAMES, 4, None)


def test_metadata_of_somebody_else_is_told_of_elsewhere() -> None:
    foreign = {tp: OffsetAndMetadata(at.offset, "{}") for tp, at in committed(partitions=1).items()}
    check_partition_count(foreign, ENDS, NAMES, 4, None)
