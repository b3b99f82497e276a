"""Only the record that stands for unreadable ones is taken for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stream.records.unreadable import UNREADABLE_HEADER, unreadable_headers, why_unreadable


def record(headers: Any, key: bytes | None = None, value: bytes | None = None) -> Any:
    return SimpleNamespace(key=key, value=value, headers=headers)


def test_the_reason_is_read_as_it_was_written():
    assert why_unreadable(record(unreadable_headers("offset 3 can't be read: \udcff"))) == "offset 3 can't be read: ?"


def test_a_header_of_this_name_on_another_record_means_nothing():
    ours = unreadable_headers("offset 3")
    others = [
        record(()),
        record([("trace", b"1")]),
        record([*ours, ("trace", b"1")]),
        record(ours, key=b"k"),
        record(ours, value=b""),
    ]
    assert {why_unreadable(each) for each in others} == {None}
    assert why_unreadable(record([(UNREADABLE_HEADER, None)])) == ""
