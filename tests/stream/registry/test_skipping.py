"""What a trainer leaves out, resolved to offsets: everything up to the end, and what is refused."""

from __future__ import annotations

import pytest

from state.errors import Refused
from state.rewinds import SkippedRange
from stream.kafka.read_log import Span
from stream.registry.requests import RollbackRequest
from stream.registry.skipping import SkipRequest, checked, up_to_the_end

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
