"""What a trainer leaves out, resolved to offsets: everything up to the end, and what is refused."""

from __future__ import annotations

import pytest

from state.errors import Refused
from state.manifest import FileEntry, Manifest
from state.rewinds import SkippedRange
from stream.kafka.read_log import Span
from stream.registry.requests import RollbackRequest
from stream.registry.skipping import (
    SkipRequest,
    TimeRange,
    between,
    checked,
    require_past,
    require_startable,
    up_to_the_end,
)

SPANS = {0: Span(100, 1_000), 1: Span(0, 50), 2: Span(0, 0)}


def test_up_to_the_end_begins_where_the_version_ends() -> None:
    found = up_to_the_end({0: 400, 1: 50}, SPANS)
    assert [(each.partition, each.first, each.to) for each in found] == [(0, 400, 1_000)]
    found = up_to_the_end({}, SPANS)
    assert [(each.partition, each.first, each.to) for each in found] == [(0, 100, 1_000), (1, 0, 50)]


def test_ranges_are_sorted_and_kept() -> None:
    ranges = [SkippedRange(partition=1, first=10, to=20), SkippedRange(partition=0, first=400, to=401)]
    assert checked(ranges, {0: 400, 1: 10}, SPANS, 7) == ranges[::-1]


@pytest.mark.parametrize(
    ("partition", "first", "to", "why"),
    [
        (3, 1, 2, r"skip 3:1-2: expected a partition of examples, 0 to 2, found 3"),
        (0, 500, 500, r"skip 0:500-500: expected a first offset below the end of the range"),
        (0, 500, 1_001, r"expected a range of the log, which ends at offset 1000, found one up to 1001"),
        (0, 300, 600, r"expected a range that version 7 hasn't learned, found one whose offsets up to 400 are in its weights"),
        (0, 300, 350, r"offsets up to 350 are in its weights\. Go back further"),
    ],
)
def test_what_is_refused(partition: int, first: int, to: int, why: str) -> None:
    with pytest.raises(Refused, match=why):
        checked([SkippedRange(partition=partition, first=first, to=to)], {0: 400}, SPANS, 7)


def test_skipping_needs_a_rewind() -> None:
    with pytest.raises(ValueError, match="expected a rewind of the trainer beside what is to be skipped"):
        RollbackRequest("bad", skip=SkipRequest(to_latest=True))


def test_a_time_is_a_range_in_each_partition_that_has_records_of_it() -> None:
    found = between(TimeRange(5, 9), {0: 200, 1: None, 2: None}, {0: None, 1: None, 2: None}, SPANS)
    assert [(each.partition, each.first, each.to) for each in found] == [(0, 200, 1_000)]
    found = between(TimeRange(5, 9), {0: 200, 1: 4}, {0: 200, 1: 7}, SPANS)
    assert [(each.partition, each.first, each.to) for each in found] == [(1, 4, 7)]


def test_a_time_of_which_the_log_has_nothing_is_refused() -> None:
    with pytest.raises(Refused, match=r"^--skip-time \S+Z\.\.\S+Z: expected .* stored in that time, .* time zone right\?"):
        between(TimeRange(5, 9), {0: None, 1: 20}, {0: None, 1: 20}, SPANS)


def test_a_time_that_is_not_over_is_refused() -> None:
    require_past(TimeRange(5, 100_000), 99_000)
    with pytest.raises(Refused, match="expected times that have passed, found an end 3,600 s from now"):
        require_past(TimeRange(5, 3_700_000), 100_000)
    with pytest.raises(Refused, match="expected the earlier time first"):
        require_past(TimeRange(9, 9), 100_000)


TRAINER = {"trainer.safetensors": FileEntry(1, "a" * 64)}


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (Manifest(version=7), "expected a version with the trainer's state, found one without"),
        (Manifest(version=7, files=TRAINER, topic_ids={"examples": "old"}), "found one of a topic with id old"),
        (
            Manifest(version=7, files=TRAINER, offsets={"0": 99}),
            r"expected examples from offset 99 .* found a log from 100 to 1000",
        ),
        (Manifest(version=7, files=TRAINER, offsets={"1": 51}), "expected examples from offset 51 of partition 1 on"),
        (Manifest(version=7, files=TRAINER, offsets={"3": 1}), "found no such partition"),
    ],
)
def test_a_trainer_is_never_sent_where_it_could_not_start(manifest: Manifest, why: str) -> None:
    with pytest.raises(Refused, match=f"rewind to version 7: .*{why}"):
        require_startable(manifest, "now", SPANS)
    offsets = {"0": 100, "1": 50}
    require_startable(Manifest(version=7, files=TRAINER, topic_ids={"examples": "now"}, offsets=offsets), "now", SPANS)
