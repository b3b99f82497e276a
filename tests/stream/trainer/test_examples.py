"""A run becomes columns; a record that can't be used becomes a dead letter, and its neighbours stay."""

from __future__ import annotations

import numpy as np
import pytest

from model.hashing import hash_bytes
from state.held_click import HeldClick
from stream.join.plan import Plan
from stream.join.sampling import Sampling
from stream.records.dead_letter import REASONS
from stream.records.example import CORRECTION, FIRST, Example
from stream.trainer.examples import ExampleDecoder, hash_ids
from tests.stream.join.written import written
from tests.stream.trainer.factory import ARRIVED_MS, FIRST_MS, SCHEMA, record, run, value

BAD = [
    (dict(label=None), "missing_field", "headers.label"),
    (dict(label=b"2"), "wrong_type", "headers.label"),
    (dict(label=b""), "wrong_type", "headers.label"),
    (dict(label=b"01"), "wrong_type", "headers.label"),
    (dict(weight=None), "missing_field", "headers.weight"),
    (dict(weight=b"heavy"), "wrong_type", "headers.weight"),
    (dict(weight=b"-1"), "out_of_range", "headers.weight"),
    (dict(weight=b"nan"), "out_of_range", "headers.weight"),
    (dict(weight=b"1e39"), "out_of_range", "headers.weight"),
    (dict(weight=b"1e20"), "out_of_range", "headers.weight"),
    (dict(weight=b"10001"), "out_of_range", "headers.weight"),
    (dict(weight=b"inf"), "out_of_range", "headers.weight"),
    (dict(rate=b"1e-40"), "out_of_range", "headers.rate"),
    (dict(rate=b"9e-5"), "out_of_range", "headers.rate"),
    (dict(kind=b"guess"), "wrong_type", "headers.kind"),
    (dict(kind=b""), "wrong_type", "headers.kind"),
    (dict(impression_ms=b"253402300800000"), "out_of_range", "headers.impression_ms"),
    (dict(impression_ms=b"9" * 18), "out_of_range", "headers.impression_ms"),
    (dict(rate=b"some"), "wrong_type", "headers.rate"),
    (dict(rate=b"0"), "out_of_range", "headers.rate"),
    (dict(rate=b"1.5"), "out_of_range", "headers.rate"),
    (dict(rate=b"nan"), "out_of_range", "headers.rate"),
    (dict(impression_ms=None), "missing_field", "headers.impression_ms"),
    (dict(impression_ms=b"-5"), "wrong_type", "headers.impression_ms"),
    (dict(impression_ms=b""), "wrong_type", "headers.impression_ms"),
    (dict(impression_ms=b"9" * 30), "out_of_range", "headers.impression_ms"),
    (dict(payload=b"{"), "malformed_json", "$"),
    (dict(payload=value(3, features={"user": {"a": 1}})), "nested", "$.features.user"),
    (dict(payload=value(3, features={"user": ["a"]})), "wrong_type", "$.features.user"),
]


def test_columns_of_a_run():
    records = [
        record(10),
        record(11, value(11, score=0.25, model_version=12, delta=3), weight=b"2.5"),
        record(13, label=b"1"),
    ]
    decoded = ExampleDecoder(SCHEMA).decode(run(records, before=9, after=15))
    assert (decoded.partition, decoded.after, len(decoded)) == (0, 15, 3)
    assert decoded.offsets.tolist() == [10, 11, 13]
    assert decoded.labels.tolist() == [0, 0, 1]
    assert decoded.weights.tolist() == [1, 2.5, 1]
    assert decoded.impression_ms.tolist() == [FIRST_MS + 10, FIRST_MS + 11, FIRST_MS + 13]
    assert np.array_equal(decoded.served, np.array([np.nan, 0.25, np.nan], np.float32), equal_nan=True)
    assert decoded.versions.tolist() == [-1, 12, -1]
    assert decoded.deltas.tolist() == [-1, 3, -1]
    assert decoded.id_hashes.tolist() == [hash_bytes(b"x%d" % offset, "impression id") for offset in (10, 11, 13)]
    assert decoded.letters == []
    assert (decoded.rates, decoded.corrects, decoded.arrived_ms) == (None, None, None)


def test_rate_and_kind_of_a_run_and_what_was_left_out():
    """As the join writes them; its own bookkeeping is no example."""
    examples = [
        Example(b"x0", value(0), FIRST_MS, 7, -1, FIRST),
        Example(b"x1", b"{", FIRST_MS, 8, -1, FIRST),
        Example(b"x2", value(2), FIRST_MS, 9, FIRST_MS + 5, CORRECTION, FIRST_MS + 8),
        Example(b"x3", value(3), FIRST_MS, 10, FIRST_MS + 6, FIRST),
    ]
    plan = Plan(examples=examples, left_out=[1, 2], held={(3, 3): HeldClick(4)})
    records = []
    for offset, (key, payload, headers) in enumerate(written(plan, 0.25)):
        records.append(record(offset, payload=payload or b"", only=headers))
        records[-1].key = key
    decoded = ExampleDecoder(SCHEMA).decode(run(records))
    assert decoded.offsets.tolist() == [2, 4, 5]
    assert decoded.labels.tolist() == [0, 1, 1]
    assert decoded.rates is not None
    assert decoded.corrects is not None
    assert decoded.rates.tolist() == [0.25] * 3
    assert decoded.corrects.tolist() == [False, True, False]
    assert decoded.arrived_ms is not None
    assert decoded.arrived_ms.tolist() == [-1, FIRST_MS + 8, -1]
    assert [letter.offset for letter in decoded.letters] == [3]


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize(("fault", "reason", "path"), BAD)
def test_a_bad_record_is_set_aside_with_its_reason(fault, reason, path, many):
    offsets = range(40) if many else range(3)
    records = [record(offset, **(fault if offset == 1 else {})) for offset in offsets]
    decoded = ExampleDecoder(SCHEMA).decode(run(records))
    assert decoded.offsets.tolist() == [offset for offset in offsets if offset != 1]
    good = ExampleDecoder(SCHEMA).decode(run([record(offset) for offset in offsets if offset != 1]))
    assert np.array_equal(decoded.batch.keys, good.batch.keys)
    [letter] = decoded.letters
    assert (letter.reason, letter.path) == (reason, path)
    assert (letter.topic, letter.partition, letter.offset, letter.value) == ("examples", 0, 1, records[1].value)
    assert letter.reason in REASONS
    names = [name for name, _ in letter.out_headers()]
    assert len(names) == len(set(names))  # else readers couldn't tell whose offset it is
    assert dict(letter.out_headers())["source_offset"] == b"1"
    assert dict(letter.out_headers())["original.source_offset"] == b"1"
    assert letter.message


def test_examples_of_0_1_0_under_fnw_are_a_first_negative_and_its_correction():
    written = [
        record(0, label=b"0", policy=b"fnw"),
        record(1, label=b"1", policy=b"fnw", kind=b"correction", rate=b"0.5"),
        record(2, label=b"0", kind=b"correction"),  # by a job of the user's own
    ]
    decoded = ExampleDecoder(SCHEMA).decode(run(written))
    assert decoded.letters == []
    assert decoded.labels.tolist() == [0, 1, 0]
    assert decoded.corrects is not None
    assert decoded.corrects.tolist() == [False, True, True]


def test_records_that_are_odd_in_other_ways_break_nothing():
    names = [("\udcff\udcfe", b"x"), ("", b""), ("weight", None)]
    headers = [[*dict(record(offset).headers).items()] for offset in range(4)]
    odd = [
        record(0, only=[*headers[0], *names[:2]]),
        record(1, only=[*headers[1], names[2]]),  # the last one counts
        record(2, only=[]),
        record(3),
        record(4, b"{" * 5_000),
        record(5),
    ]
    odd[3].key = None
    odd[5].value = None
    decoded = ExampleDecoder(SCHEMA).decode(run(odd))
    assert decoded.offsets.tolist() == [0]
    assert [each.offset for each in decoded.records] == [0]
    assert [(letter.offset, letter.reason, letter.path) for letter in decoded.letters] == [
        (1, "missing_field", "headers.weight"),
        (2, "missing_field", "headers.label"),
        (3, "missing_field", "key"),
        (4, "malformed_json", "$"),
        (5, "malformed_json", "$"),
    ]


def test_no_example_moves_a_watermark_beyond_its_arrival():
    late = record(1, impression_ms=b"253402300799999")
    decoded = ExampleDecoder(SCHEMA).decode(run([record(0), late]))
    assert decoded.impression_ms.tolist() == [FIRST_MS, 253_402_300_799_999]
    assert decoded.reached_ms.tolist() == [FIRST_MS, ARRIVED_MS]


def test_a_run_of_bad_records_only_and_an_empty_one():
    decoded = ExampleDecoder(SCHEMA).decode(run([record(0, b"{"), record(1, label=None)]))
    assert len(decoded) == 0
    assert [letter.offset for letter in decoded.letters] == [0, 1]
    empty = ExampleDecoder(SCHEMA).decode(run([], before=5, after=7))
    assert (len(empty), empty.after, empty.letters) == (0, 7, [])


def test_a_sample_by_hash_of_the_id_is_even_and_knows_nothing_of_the_negatives_left_out():
    ids = [b"i-%d" % number for number in range(40_000)]
    sampled = hash_ids(ids) % 16 == 0
    kept = np.array([Sampling(0.25).keeps(each) for each in ids])
    assert sampled.mean() == pytest.approx(1 / 16, rel=0.06)  # 3 standard deviations
    assert kept[sampled].mean() == pytest.approx(0.25, abs=0.026)
    assert hash_ids([]).tolist() == []
    assert hash_ids([b"", None, b"\xff"])[0] == hash_ids([None])[0]
