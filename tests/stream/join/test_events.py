"""Envelopes: the corpus' verdicts, whatever a record is mixed with, by the fast path and by the slow one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from model.features import FeatureDecoder
from stream.join.events import Events, _read_fast, _read_slow, read_run
from stream.kafka import batch_reader
from stream.records.dead_letter import MAX_TEXT, REASONS, DeadLetter
from stream.records.packing import batch_bytes
from stream.records.times import MAX_AGE_MS, MAX_TIMESTAMP_MS
from stream.records.watermark import WATERMARK_HEADER
from stream.settings import JoinSettings, TopicSettings
from stream.topics.contract import OUTPUT_MARGIN_BYTES
from tests.corpus import CORPUS, SCHEMA, TIME_MS, Case, envelope
from tests.raw_batches import CODECS, raw_batch, raw_records

batch_reader.install()

MAX_FUTURE_MS = 3_600_000

ENVELOPE = [case for case in CORPUS if case.judge == "envelope"]
PASSED_ON = [case for case in CORPUS if case.judge != "envelope"]
TRAINER = [case for case in PASSED_ON if case.source == "impressions"]


def record(
    offset: int,
    key: bytes | None,
    value: bytes | None,
    headers: tuple[tuple[str, bytes | None], ...] = (),
    arrival_ms: int = TIME_MS,
) -> Any:
    """As aiokafka hands it over."""
    return SimpleNamespace(
        topic="impressions", partition=0, offset=offset, key=key, value=value, headers=headers, timestamp=arrival_ms
    )


def of(case: Case, offset: int = 0) -> Any:
    return record(offset, case.key, case.value, case.headers_read)


def neighbour(offset: int) -> Any:
    return record(offset, b"n%d" % offset, envelope(f"n{offset}"))


def quick(records: list[Any]) -> Events | None:
    """The fast path, on values as they came."""
    return _read_fast(records, MAX_FUTURE_MS, [record.value for record in records])


def slow(records: list[Any]) -> Events:
    """The slow path, on values as they came."""
    return _read_slow(records, MAX_FUTURE_MS, MAX_FUTURE_MS, [record.value for record in records])


def columns(events: Events) -> tuple[Any, ...]:
    return (
        events.keys,
        events.times_ms,
        events.offsets,
        events.values,
        events.records,
        events.arrivals_ms,
        events.dead,
        events.watermark_ms,
    )


@pytest.mark.parametrize("case", ENVELOPE, ids=str)
def test_a_bad_record_is_set_aside_wherever_it_stands(case):
    for count in (0, 1, 4):
        for place in range(count + 1):
            records = [neighbour(offset) for offset in range(count + 1)]
            records[place] = of(case, place)
            events = read_run(records, MAX_FUTURE_MS, MAX_FUTURE_MS)
            assert columns(events) == columns(slow(records))
            assert events.offsets == [offset for offset in range(count + 1) if offset != place]
            [letter] = events.dead
            assert (letter.reason, letter.path, letter.offset) == (case.reason, case.path, place)
            assert (letter.key, letter.value, letter.headers) == (case.key, case.value, case.headers_read)
            assert letter.reason in REASONS
            assert letter.message


@pytest.mark.parametrize("case", PASSED_ON, ids=str)
def test_what_only_others_can_judge_is_passed_on(case):
    for place in range(4):
        records = [neighbour(offset) for offset in range(4)]
        records[place] = of(case, place)
        events = read_run(records, MAX_FUTURE_MS, MAX_FUTURE_MS)
        assert columns(events) == columns(slow(records))
        assert events.dead == []
        assert events.values == [each.value for each in records]


@pytest.mark.parametrize("case", TRAINER, ids=str)
def test_the_trainer_judges_the_rest_wherever_it_stands(case):
    """Alone and among few the trainer decodes one by one, among many it begins with whole columns."""
    expected = [(case.reason, case.path)] if case.judge == "trainer" else []
    for count, place in ((0, 0), (40, 0), (40, 23), (40, 40)):
        values = [envelope(f"n{index}") for index in range(count)]
        values.insert(place, case.value or b"")
        decoded = FeatureDecoder(SCHEMA).impressions(values)
        assert [(bad.reason, bad.path) for bad in decoded.bad] == expected
        assert all(bad.index == place and bad.reason in REASONS for bad in decoded.bad)
        assert len(decoded.batch) == count + 1 - len(expected)


def test_the_whole_corpus_in_one_run():
    records = [of(case, offset) for offset, case in enumerate(CORPUS)]
    events = read_run(records, MAX_FUTURE_MS, MAX_FUTURE_MS)
    assert [(letter.offset, letter.reason) for letter in events.dead] == [
        (offset, case.reason) for offset, case in enumerate(CORPUS) if case.judge == "envelope"
    ]
    assert events.keys == [case.key for case in PASSED_ON]


def test_the_fast_path_takes_ordinary_runs():
    records = [neighbour(offset) for offset in range(50)]
    records += [of(case, 50 + index) for index, case in enumerate(TRAINER) if case.name not in SLOW_BUT_GOOD]
    fast = quick(records)
    assert fast is not None
    assert columns(fast) == columns(slow(records))


# Good JSON that isn't one object a line.
SLOW_BUT_GOOD = {"spread over lines", "carriage returns", "spaces around"}


@pytest.mark.parametrize(
    "values",
    [
        [envelope("a") + envelope("b"), b" "],
        [b"", envelope("a") + envelope("b")],
        [envelope("a")[:-1], b"}" + envelope("b")],
        [b'{"impression_id":"a","timestamp":1,"x":[{}', b'{}]}{"impression_id":"b","timestamp":1}'],
        [b'{"impression_id":"a","timestamp":1,"x":{}', b',"y":{}}{"impression_id":"b","timestamp":1}'],
        [envelope("a") + b"\n" + envelope("b"), b"{}"],
    ],
)
def test_records_that_only_balance_together_are_refused(values):
    records = [record(offset, key, value) for offset, (key, value) in enumerate(zip((b"a", b"b"), values, strict=True))]
    assert quick(records) is None
    assert read_run(records, MAX_FUTURE_MS, MAX_FUTURE_MS).dead


_A, _B = envelope("a", "{}"), envelope("b", "{}")
PIECES = st.sampled_from([b"", b" ", b"\n", b"{", b"}", b"[", b"]", b",", b'"', b'"x":', b"{}", _A, _B, _A[:-1], _A[1:], b"\r"])
VALUES = st.one_of(st.none(), st.just(_A), st.just(_B), st.lists(PIECES, max_size=4).map(b"".join))


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", None]), VALUES), max_size=5))
def test_the_fast_path_never_says_otherwise(rows):
    records = [record(offset, key, value) for offset, (key, value) in enumerate(rows)]
    fast = quick(records)
    if fast is not None:
        assert columns(fast) == columns(slow(records))


@given(st.lists(st.binary(max_size=30), max_size=4))
def test_any_bytes_get_a_verdict(values):
    records = [record(offset, b"k", value) for offset, value in enumerate(values)]
    events = read_run(records, MAX_FUTURE_MS, MAX_FUTURE_MS)
    assert sorted(events.offsets + [letter.offset for letter in events.dead]) == list(range(len(values)))


def test_the_future_is_judged_by_the_records_own_arrival():
    def verdict(arrival_ms: int, time_ms: int) -> list[str]:
        lone = record(0, b"a", envelope("a", time=str(time_ms)), arrival_ms=arrival_ms)
        among = [record(1, b"b", envelope("b", time="5"), arrival_ms=10**12), lone]
        reasons = [[letter.reason for letter in read_run(run, 1_000, 1_000).dead] for run in ([lone], among)]
        assert reasons[0] == reasons[1]
        return reasons[0]

    assert verdict(5_000, 6_000) == []
    assert verdict(5_000, 6_001) == ["future_timestamp"]


def test_watermark_records():
    marks = [(b"%d" % mark, mark) for mark in (TIME_MS - MAX_AGE_MS, TIME_MS, MAX_TIMESTAMP_MS)]
    for value in (b"", None):
        for mark, expected in marks:
            events = read_run(
                [neighbour(0), record(1, None, value, ((WATERMARK_HEADER, mark),))], MAX_FUTURE_MS, MAX_TIMESTAMP_MS
            )
            assert (events.offsets, events.dead, events.watermark_ms) == ([0], [], expected)
    several = [
        record(index, None, b"", ((WATERMARK_HEADER, mark),))
        for index, mark in enumerate((b"1700000000007", b"1700000000009", b"8"))
    ]
    assert read_run(several, MAX_FUTURE_MS, MAX_FUTURE_MS).watermark_ms == 1_700_000_000_009
    # With a value the record is an event like any other.
    assert (
        read_run([record(0, b"a", envelope("a"), ((WATERMARK_HEADER, b"9"),))], MAX_FUTURE_MS, MAX_FUTURE_MS).watermark_ms == -1
    )


def test_a_watermark_far_beyond_its_arrival_is_refused():
    """It would make every impression that comes after it late, for good."""

    def read(mark: bytes, bound_ms: int) -> Events:
        return read_run([record(3, None, b"", ((WATERMARK_HEADER, mark),), arrival_ms=5_000)], 1_000, bound_ms)

    for mark, bound_ms in [(b"7500", 2_500), (b"5", 0)]:
        assert (read(mark, bound_ms).watermark_ms, read(mark, bound_ms).dead) == (int(mark), [])
    for mark, bound_ms in [(b"7501", 2_500), (b"5001", 0)]:
        assert read(mark, bound_ms).watermark_ms == -1
        [letter] = read(mark, bound_ms).dead
        assert (letter.reason, letter.offset) == ("future_timestamp", 3)
        assert mark.decode() in letter.message
        assert "5000" in letter.message


def test_an_event_as_far_ahead_as_is_allowed_can_be_settled():
    """Whatever ends a stream sends a watermark beyond the last event's window: never refused where the event was not."""
    settings = JoinSettings(max_future_ms=1_000, window_ms=60_000, lateness_ms=50)
    last = record(0, b"a", envelope("a", time="6000"), arrival_ms=5_000)
    mark = record(1, None, b"", ((WATERMARK_HEADER, b"%d" % (6_000 + 60_000 + 50)),), arrival_ms=5_000)
    events = read_run([last, mark], settings.max_future_ms, settings.max_watermark_future_ms)
    assert (events.times_ms, events.watermark_ms, events.dead) == ([6_000], 66_050, [])


def test_a_dead_letter_fits_whatever_its_record_is():
    """A letter beyond what `dead-letters` takes would stop the join for good."""
    limit = TopicSettings().max_message_bytes + OUTPUT_MARGIN_BYTES
    for case in ENVELOPE:
        [letter] = read_run([of(case)], MAX_FUTURE_MS, MAX_FUTURE_MS).dead
        key, value, headers = letter.outgoing(limit)
        assert batch_bytes(key, value, headers) <= limit
        if batch_bytes(case.key, case.value, case.headers_read) <= TopicSettings().max_message_bytes:
            # What fits into a source fits whole: ours add less than the 64 KiB that the topic has beyond its sources.
            assert (key, value) == (case.key, case.value)
        else:
            assert dict(headers)["reason"] == b"too_large"
            assert value is None


@pytest.mark.parametrize("codec", CODECS)
def test_the_corpus_as_it_lies_in_the_log(codec):
    """In batches of any client's, compressed too, header names and all: every record gets the verdict that it gets alone."""
    for start in range(0, len(CORPUS), 10):
        cases = CORPUS[start : start + 10]
        body = raw_records([(case.key, case.value, case.headers) for case in cases])
        batch = raw_batch(body, len(cases), codec, base=start, time_ms=TIME_MS)
        tp = TopicPartition("impressions", 0)
        read = list(fetcher.PartitionRecords(tp, fetcher.MemoryRecords(batch), [], start, None, None, True, 1))
        assert [(each.key, each.value, each.headers) for each in read] == [
            (case.key, case.value, case.headers_read) for case in cases
        ]
        events = read_run(read, MAX_FUTURE_MS, MAX_FUTURE_MS)
        assert columns(events) == columns(slow(read))
        assert [(letter.offset, letter.reason) for letter in events.dead] == [
            (offset, case.reason) for offset, case in enumerate(cases, start) if case.judge == "envelope"
        ]


def test_a_batch_that_cannot_be_read_is_one_dead_letter():
    batch = raw_batch(b"\x01\x02\x03", 7, "zstd", base=3, time_ms=TIME_MS)
    records = list(
        fetcher.PartitionRecords(TopicPartition("clicks", 1), fetcher.MemoryRecords(batch), [], 3, None, None, True, 1)
    )
    events = read_run(records, MAX_FUTURE_MS, MAX_FUTURE_MS)
    assert len(events) == 0
    [letter] = events.dead
    assert (letter.reason, letter.topic, letter.partition, letter.offset) == ("unreadable", "clicks", 1, 3)
    assert "offsets 3 to 9 can't be read" in letter.message


@pytest.mark.parametrize(
    ("time", "unit"),
    [(TIME_MS // 1_000, "seconds"), (TIME_MS * 1_000, "microseconds"), (TIME_MS * 1_000_000, "nanoseconds"), (7, None)],
)
def test_a_time_in_another_unit_is_named(time, unit):
    [letter] = read_run([record(0, b"a", envelope("a", time=str(time)))], MAX_FUTURE_MS, MAX_FUTURE_MS).dead
    assert (letter.reason, letter.path) == ("out_of_range", "$.timestamp")
    assert f"found {time}" in letter.message
    assert ("looks like" in letter.message) == (unit is not None)
    assert unit is None or f"found {time}, which looks like {unit}" in letter.message


def test_how_old_an_event_may_be_is_judged_by_its_arrival():
    """So that a replay decides the same; a log of 39 years ago can be replayed, among events of today too."""

    def verdicts(age_ms: int) -> list[str]:
        old = record(0, b"a", envelope("a", time=str(TIME_MS - age_ms)))
        return [letter.reason for letter in read_run([neighbour(1), old, neighbour(2)], MAX_FUTURE_MS, MAX_FUTURE_MS).dead]

    assert verdicts(MAX_AGE_MS) == []
    assert verdicts(MAX_AGE_MS + 1) == ["out_of_range"]


def test_the_headers_of_a_dead_letter():
    letter = DeadLetter.of(record(7, b"k", b"v", (("trace", b"1"),)), "wrong_type", "$." + "p" * 9_999, "\ud800" + "m" * 9_999)
    assert letter.out_headers() == [
        ("reason", b"wrong_type"),
        ("error", b"?" + b"m" * (MAX_TEXT - 1)),
        ("path", b"$." + b"p" * (MAX_TEXT - 2)),
        ("source_topic", b"impressions"),
        ("source_partition", b"0"),
        ("source_offset", b"7"),
        ("trace", b"1"),
    ]
