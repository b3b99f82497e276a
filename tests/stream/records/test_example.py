"""An example is read as it was written, and its headers are what the contract says."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.records import example as module
from stream.records.dead_letter import DeadLetter
from stream.records.example import (
    CORRECTION,
    FIRST,
    REPLAY,
    Example,
    _BadHeader,
    _check,
    _columns,
    example_records,
    max_example_bytes,
    read_example,
    read_examples,
    replayed_example,
)
from stream.records.packing import batch_bytes, pack_headers, unpack_headers

POSITION = {"impression_ms": b"5", "source_offset": b"7"}
BY_KIND = {
    (FIRST, -1): {"label": b"0", "weight": b"1", "kind": b"first", **POSITION},
    (FIRST, 9): {"label": b"1", "weight": b"1", "kind": b"first", **POSITION, "click_ms": b"9"},
    (CORRECTION, 9): {"label": b"1", "weight": b"1", "kind": b"correction", **POSITION, "click_ms": b"9"},
}
ARRIVED = {"click_arrived_ms": b"11"}


def record(headers: Any, key: bytes | None = b"i", value: bytes | None = b"{}", offset: int = 3) -> Any:
    return SimpleNamespace(topic="examples", partition=0, offset=offset, timestamp=0, key=key, value=value, headers=headers)


@pytest.mark.parametrize(("kind", "click_ms"), BY_KIND)
def test_headers_of_each_kind(kind, click_ms):
    example = Example(b"i", b"{}", 5, 7, click_ms, kind)
    for rate, more in ((1.0, {}), (0.1, {"rate": b"0.1"})):
        [(key, value, packed)] = example_records([example], rate)
        assert (key, value) == (b"i", b"{}")
        headers = unpack_headers(packed)
        assert dict(headers) == {**BY_KIND[kind, click_ms], **more}
        assert len(headers) == len(dict(headers))
        assert read_example(record(headers)) == example


@pytest.mark.parametrize("kind", [FIRST, CORRECTION])
def test_the_arrival_of_a_click(kind):
    example = Example(b"i", b"{}", 5, 7, 9, kind, 11)
    [(_, _, packed)] = example_records([example], 1.0)
    headers = unpack_headers(packed)
    assert dict(headers) == {**BY_KIND[kind, 9], **ARRIVED}
    assert read_example(record(headers)) == example


@pytest.mark.parametrize("found", [b"", b"x", b"-3", b"9" * 40, None, b"1.5"])
def test_an_arrival_that_is_no_time_is_not_known_and_costs_no_example(found):
    headers = tuple({**BY_KIND[FIRST, 9], "click_arrived_ms": found}.items())
    assert read_example(record(headers)).click_arrived_ms == -1
    known = record(tuple({**BY_KIND[FIRST, 9], **ARRIVED}.items()))
    columns = read_examples([record(tuple(BY_KIND[FIRST, -1].items())), record(headers), known])
    assert columns.letters == []
    assert columns.arrived_ms is not None
    assert columns.arrived_ms.tolist() == [-1, -1, 11]
    assert read_examples([record(tuple(BY_KIND[FIRST, 9].items()))]).arrived_ms is None


EXAMPLES = st.lists(
    st.builds(
        Example,
        st.binary(min_size=1, max_size=5),
        st.binary(max_size=9),
        st.integers(0, 1 << 50),
        st.integers(0, 1 << 40),
        st.one_of(st.just(-1), st.integers(0, 1 << 50)),
        st.sampled_from([FIRST, CORRECTION]),
        st.one_of(st.just(-1), st.integers(0, 1 << 50)),
    ).map(lambda each: each if each.click_ms >= 0 else msgspec.structs.replace(each, click_arrived_ms=-1)),
    max_size=9,
)


@given(EXAMPLES, st.sampled_from([1.0, 0.25]))
def test_packed_headers_are_those_that_kafka_would_pack(examples, rate):
    expected = []
    for example in examples:
        headers = [("label", b"0" if example.click_ms < 0 else b"1"), ("weight", b"1"), ("kind", example.kind.encode())]
        headers += [("rate", b"0.25")] if rate < 1 else []
        headers += [("impression_ms", b"%d" % example.impression_ms), ("source_offset", b"%d" % example.source_offset)]
        headers += [] if example.click_ms < 0 else [("click_ms", b"%d" % example.click_ms)]
        headers += [] if example.click_arrived_ms < 0 else [("click_arrived_ms", b"%d" % example.click_arrived_ms)]
        expected.append((example.key, example.value, pack_headers(headers)))
        assert batch_bytes(example.key, example.value, headers) <= max_example_bytes(example.key, example.value)
    found = list(example_records(examples, rate))
    assert found == expected
    assert [read_example(record(unpack_headers(packed), key, value)) for key, value, packed in found] == examples


@pytest.mark.parametrize(
    "change",
    [
        {"kind": b"guess"},
        {"label": b"2"},
        {"label": None},
        {"source_offset": b"x"},
        {"impression_ms": b"-1"},
        {"source_offset": b"9" * 40},
        {"impression_ms": None},
        {"click_ms": b"-5"},
        {"click_ms": None},
    ],
)
def test_what_the_join_has_not_written_is_no_example(change):
    headers = {**BY_KIND[FIRST, 9], **change}
    with pytest.raises((KeyError, TypeError, ValueError)):
        read_example(record(tuple(headers.items())))
    for name in headers:
        if name != "weight":
            with pytest.raises((KeyError, TypeError, ValueError)):
                read_example(record(tuple((each, value) for each, value in BY_KIND[FIRST, 9].items() if each != name)))
    with pytest.raises((KeyError, TypeError, ValueError)):
        read_example(record(tuple(BY_KIND[FIRST, 9].items()), key=None))


def test_a_replayed_first_label_is_of_a_kind_of_its_own():
    for kind, again in ((FIRST, REPLAY), (CORRECTION, CORRECTION), (REPLAY, REPLAY)):
        headers = replayed_example([("trace", b"first"), ("kind", kind.encode()), ("label", b"0")])
        assert headers == [("trace", b"first"), ("kind", again.encode()), ("label", b"0")]


def test_records_without_a_key_are_dead_letters_among_examples():
    headers = tuple(BY_KIND[FIRST, -1].items())
    columns = read_examples([record(headers), record(headers, key=None, offset=4)])
    assert [each.offset for each in columns.records] == [3]
    assert columns.letters == [
        DeadLetter(
            "missing_field",
            "key: expected the impression id as the record's key, found none",
            "key",
            "examples",
            0,
            4,
            None,
            b"{}",
            headers,
        )
    ]


JUNK = st.one_of(
    st.none(), st.binary(max_size=20), st.sampled_from([b"0", b"1", b"1.5", b"1e400", b"12", b"1_0", b" 7", b"\xb2"])
)


# The headers that the trainer parses. The others are for people and for the join's own rebuild.
NAMES = ("label", "weight", "impression_ms", "rate", "kind", "click_arrived_ms")
UNPARSED = ("click_ms", "source_offset")


def test_every_header_is_parsed_or_known_not_to_be():
    table = [line for line in (module.__doc__ or "").splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {*NAMES, *UNPARSED}


@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, JUNK)), max_size=6))
def test_columns_and_single_records_agree_on_what_is_bad(headers):
    def good(each):
        try:
            _check(each)
        except _BadHeader:
            return False
        return True

    verdicts = [good(each) for each in headers]
    assert (_columns([], headers) is not None) == all(verdicts)
    assert _columns([], [each for each, fine in zip(headers, verdicts, strict=True) if fine]) is not None
