"""What the join writes for itself is read as it was written, and is never taken for an example."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from stream.records.join_notes import (
    Matched,
    is_note,
    left_out_records,
    matched_records,
    note_count,
    read_left_out,
    read_matched,
)


def read(outgoing: Any, key: bytes | None = None) -> Any:
    _, value, headers = outgoing
    return SimpleNamespace(key=key, value=value, headers=tuple(headers))


@pytest.mark.parametrize("count", [0, 1, 2_000, 2_001, 4_500])
def test_notes_are_read_as_they_were_written(count):
    clicks = [Matched(number, number + 1, number + 2, number - 1) for number in range(count)]
    left_out, matched = (
        [read(each) for each in left_out_records(list(range(count)), 0.5)],
        [read(each) for each in matched_records(clicks)],
    )
    assert [offset for record in left_out for offset in read_left_out(record) or ()] == list(range(count))
    assert [click for record in matched for click in read_matched(record) or ()] == clicks
    assert note_count(count, count) == len(left_out) + len(matched)
    assert all(map(is_note, [*left_out, *matched]))
    assert {read_matched(record) for record in left_out} | {read_left_out(record) for record in matched} <= {None}


def test_a_record_with_a_key_is_no_note():
    for record in (read(next(left_out_records([1], 1.0)), b"k"), read(next(matched_records([Matched(1, 2, 3)])), b"k")):
        assert (is_note(record), read_left_out(record), read_matched(record)) == (False, None, None)


def test_a_note_without_arrivals_is_read_and_one_with_too_few_is_an_error():
    """As a version wrote it that did not keep arrivals."""
    note = SimpleNamespace(key=None, value=b"[[1,2,3],[4,5,6]]", headers=(("kind", b"matched"),))
    assert read_matched(note) == [Matched(1, 2, 3, -1), Matched(4, 5, 6, -1)]
    for arrivals in (b"[7]", b"", b'["7",8]'):
        note.headers = (("kind", b"matched"), ("click_arrived_ms", arrivals))
        with pytest.raises(msgspec.DecodeError):
            read_matched(note)


@pytest.mark.parametrize("value", [None, b"", b'["x"]', b"[[1]]", b"[[1,2,3,4]]", b"{}"])
def test_a_note_of_somebody_else_is_an_error(value):
    for kind, decode in ((b"left_out", read_left_out), (b"matched", read_matched)):
        with pytest.raises(msgspec.DecodeError):
            decode(SimpleNamespace(key=None, value=value, headers=(("kind", kind),)))
