"""Both paths of the decoder accept the same records and give the same keys, on a fixed corpus and on hypothesis' records."""

from __future__ import annotations

import bisect
import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import features_reference as reference
from model.arrow_json import Doubt
from model.batch import FeatureBatch
from model.errors import FeatureError, ModelError
from model.features import FeatureDecoder
from model.hashing import hash_bytes, missing_key, number_key
from model.schema import FeatureSchema, FieldSpec

SCHEMA = FeatureSchema(
    fields=(
        FieldSpec(name="user"),
        FieldSpec(name="tags", kind="list"),
        FieldSpec(name="item", space="user"),
        FieldSpec(name="price", kind="numeric"),
        FieldSpec(name="age", kind="numeric", buckets="linear", width=5),
        FieldSpec(name="dwell", kind="numeric", buckets="scaled"),
        FieldSpec(name="words", kind="list", space="tags"),
    )
)


def impression(features: Any, **envelope: Any) -> bytes:
    return json.dumps({"impression_id": "i", "timestamp": 1, "features": features, **envelope}).encode()


def raw(features: str, rest: str = "") -> bytes:
    return f'{{"impression_id":"i","timestamp":1,"features":{features}{rest}}}'.encode()


GOOD = [
    raw('{"user":"u1","item":"i9","price":1.5,"age":33,"dwell":-2,"tags":["a","b"],"words":["a"]}'),
    raw('{"user":17,"item":"17","price":-3}'),
    raw("{}"),
    raw('{"user":null,"tags":null,"price":null,"dwell":null}'),
    raw('{"tags":[],"words":[""]}'),
    raw('{"user":1.0,"item":-0,"price":-0.0}'),
    raw('{"user":1e2,"price":1e2,"age":-0.5}'),
    raw('{"user":9223372036854775807,"item":-9223372036854775808}'),
    raw('{"user":18446744073709551615}'),
    raw('{"price":1e308,"age":-1e308,"dwell":1e308}'),
    raw('{"price":5e-324,"age":1e-999}'),
    raw('{"price":123456789012345678901234567890}'),
    raw('{"user":"Zoë 🎬","tags":["\\ud83c\\udfac","\\u0000","x\\ny"]}'),
    raw('{"us\\u0065r":"escaped name"}'),
    raw('{"user":"twice","user":"last wins"}'),
    raw('{"user":"a"}', ',"features":{"user":"b"}'),
    raw('{"user":"a","extra":{"deep":[1,{"x":[]}]},"big":1e999,"more":[null,true]}'),
    raw('{"user":"NaN","item":"Infinity"}'),
    raw('{"user":"a"}', ',"score":0.25,"model_version":12'),
    raw('{"user":"a"}', ',"score":null,"model_version":null'),
    raw('{"user":"a"}', ',"score":1,"model_version":3.0'),
    raw('{"user":"\\ud800"}').replace(b"user", b"other"),
    b'\n{\n\t"features": {\r\n "user": "pretty"}\n}\n',
    b'  {"features": {"user": "spaces"}}  ',
    raw('{"user":"' + "long" * 5000 + '"}'),
    raw('{"other":' + "[" * 300 + "]" * 300 + "}"),
    raw('{"other":' + "9" * 6000 + "}"),
]

BAD = [
    (b"", "malformed_json", "$"),
    (None, "malformed_json", "$"),
    (b"   ", "malformed_json", "$"),
    (b"{", "malformed_json", "$"),
    (b'{"features":{}', "malformed_json", "$"),
    (b'{"features":{},}', "malformed_json", "$"),
    (b'{"features":{}}{"features":{}}', "malformed_json", "$"),
    (b'{"features":{}} x', "malformed_json", "$"),
    (b'{"features":{"user":"}', "malformed_json", "$"),
    (b"{'features':{}}", "malformed_json", "$"),
    (b'\xef\xbb\xbf{"features":{}}', "malformed_json", "$"),
    (raw('{"price":01}'), "malformed_json", "$"),
    (raw('{"price":1.}'), "malformed_json", "$"),
    (raw('{"other":+1}'), "malformed_json", "$"),
    (raw('{"other":.5}'), "malformed_json", "$"),
    (raw('{"other":tru}'), "malformed_json", "$"),
    (raw('{"other":1e}'), "malformed_json", "$"),
    (raw('{"user":"a\tb"}'), "malformed_json", "$"),
    (raw('{"other":"a\nb"}'), "malformed_json", "$"),
    (raw('{"user":"a\x00b"}'), "malformed_json", "$"),
    (raw('{"user":"\\x"}'), "malformed_json", "$"),
    (raw('{"other":' + "[" * 100_000 + "]" * 100_000 + "}"), "malformed_json", "$"),
    (raw('{"user":"a"}').replace(b'"a"', b'"\xff"'), "bad_utf8", "$"),
    (raw('{"user":"a"}').replace(b'"a"', b'"\xed\xa0\x80"'), "bad_utf8", "$"),
    (raw('{"other":"a"}').replace(b'"a"', b'"\xc3"'), "bad_utf8", "$"),
    (raw('{"user":"\\ud800"}'), "bad_utf8", "$.features.user"),
    (raw('{"tags":["ok","\\udc00"]}'), "bad_utf8", "$.features.tags[1]"),
    (b"[]", "wrong_type", "$"),
    (b"null", "wrong_type", "$"),
    (b'"text"', "wrong_type", "$"),
    (b"{}", "missing_field", "$"),
    (b'{"features":null}', "missing_field", "$"),
    (b'{"features":[]}', "wrong_type", "$.features"),
    (b'{"features":"x"}', "wrong_type", "$.features"),
    (raw('{"user":true}'), "wrong_type", "$.features.user"),
    (raw('{"user":1.5}'), "wrong_type", "$.features.user"),
    (raw('{"user":1e300}'), "wrong_type", "$.features.user"),
    (raw('{"user":18446744073709551616}'), "wrong_type", "$.features.user"),
    (raw('{"user":1e999}'), "not_finite", "$.features.user"),
    (raw('{"user":["a"]}'), "wrong_type", "$.features.user"),
    (raw('{"user":{"a":1}}'), "nested", "$.features.user"),
    (raw('{"price":"1.5"}'), "wrong_type", "$.features.price"),
    (raw('{"price":false}'), "wrong_type", "$.features.price"),
    (raw('{"price":[1]}'), "wrong_type", "$.features.price"),
    (raw('{"price":{}}'), "nested", "$.features.price"),
    (raw('{"price":1e999}'), "not_finite", "$.features.price"),
    (raw('{"price":-1e999}'), "not_finite", "$.features.price"),
    (raw('{"price":NaN}'), "not_finite", "$.features.price"),
    (raw('{"tags":[Infinity]}'), "not_finite", "$.features.tags[0]"),
    (raw('{"other":{"x":-Infinity}}'), "not_finite", "$.features.other.x"),
    (raw("{}", ',"other":NaN'), "not_finite", "$.other"),
    (raw('{"tags":"a"}'), "wrong_type", "$.features.tags"),
    (raw('{"tags":[1]}'), "wrong_type", "$.features.tags[0]"),
    (raw('{"tags":["a",null]}'), "wrong_type", "$.features.tags[1]"),
    (raw('{"tags":[["a"]]}'), "wrong_type", "$.features.tags[0]"),
    (raw('{"tags":[{}]}'), "nested", "$.features.tags[0]"),
    (raw("{}", ',"score":1.5'), "out_of_range", "$.score"),
    (raw("{}", ',"score":"0.5"'), "wrong_type", "$.score"),
    (raw("{}", ',"score":1e999'), "not_finite", "$.score"),
    (raw("{}", ',"model_version":-1'), "wrong_type", "$.model_version"),
    (raw("{}", ',"model_version":1.5'), "wrong_type", "$.model_version"),
    (raw("{}", ',"model_version":"7"'), "wrong_type", "$.model_version"),
]

CORPUS: list[bytes | None] = [*GOOD, *(payload for payload, _, _ in BAD)]


# The keys that a row must have, computed value by value.


def reference_row(values: list[reference.Value]) -> tuple[list[int], list[float], list[list[int]]]:
    keys, scales, lists = [], [], []
    for value, field in zip(values, SCHEMA.fields, strict=True):
        space = field.hash_space
        if field.kind == "list":
            lists.append([hash_bytes(v.encode(), space) for v in value or []] or [missing_key(space)])
            continue
        scale = 1.0
        if value is None:
            keys.append(missing_key(space))
        elif isinstance(value, str):
            keys.append(hash_bytes(value.encode(), space))
        elif field.buckets == "scaled":
            keys.append(number_key(0, space))
            scale = math.copysign(math.log1p(abs(value)), value)
        else:
            keys.append(number_key(reference_bucket(value, field), space))
        scales.append(scale)
    return keys, scales, lists


def reference_bucket(x: float, field: FieldSpec) -> int:
    if field.buckets == "linear":
        return max(-(1 << 62), min(1 << 62, math.floor(x / field.width)))
    mantissa, exponent = math.frexp(1 + abs(x))
    edges = [2 ** (step / field.per_octave) for step in range(field.per_octave)]
    bucket = (exponent - 1) * field.per_octave + bisect.bisect_right(edges, 2 * mantissa) - 1
    return ~bucket if x < 0 else bucket


def rows_of(batch: FeatureBatch) -> list[tuple[list[int], list[float], list[list[int]]]]:
    rows = []
    for row in range(len(batch)):
        bounds = batch.list_offsets[row * batch.lists : (row + 1) * batch.lists + 1]
        lists = [batch.list_keys[a:b].tolist() for a, b in pairwise(bounds)]
        assert batch.scales is not None
        rows.append((batch.keys[row].tolist(), batch.scales[row].tolist(), lists))
    return rows


def assert_decoded_as_the_reference_says(payloads: list[bytes | None]) -> None:
    decoded = FeatureDecoder(SCHEMA).impressions(payloads)
    good, bad = [], []
    for index, payload in enumerate(payloads):
        try:
            good.append((index, reference.decode_impression(payload, SCHEMA)))
        except FeatureError as error:
            bad.append((index, error.reason, error.path, str(error)))
    assert [(b.index, b.reason, b.path, b.message) for b in decoded.bad] == bad
    assert decoded.rows.tolist() == [index for index, _ in good]
    found = rows_of(decoded.batch)
    for (keys, scales, lists), (_, expected) in zip(found, good, strict=True):
        expected_keys, expected_scales, expected_lists = reference_row(expected.values)
        assert keys == expected_keys
        assert scales == pytest.approx(expected_scales, rel=1e-6)
        assert lists == expected_lists
    served = [e.served_score for _, e in good]
    assert np.array_equal(decoded.served_score, np.array(served, np.float32), equal_nan=True)
    assert decoded.served_version.tolist() == [e.served_version for _, e in good]


@pytest.mark.parametrize(("payload", "reason", "path"), BAD)
def test_bad_impressions(payload: bytes | None, reason: str, path: str) -> None:
    (bad,) = FeatureDecoder(SCHEMA).impressions([payload]).bad
    assert (bad.index, bad.reason, bad.path) == (0, reason, path)
    assert f"at `{path}`" in bad.message


@pytest.mark.parametrize("payload", GOOD)
def test_good_impressions(payload: bytes) -> None:
    decoded = FeatureDecoder(SCHEMA).impressions([payload])
    assert not decoded.bad
    assert len(decoded.batch) == 1


@pytest.mark.parametrize("payload", CORPUS)
def test_the_fast_path_never_accepts_more(payload: bytes | None) -> None:
    # Between good records, so that a record that swallows or adds one is noticed.
    neighbour = raw('{"user":"n"}')
    decoder = FeatureDecoder(SCHEMA)
    try:
        fast = decoder._fast_impressions([neighbour, payload or b"", neighbour])
    except Doubt:
        return
    assert rows_of(fast.batch)[1][::2] == reference_row(reference.decode_impression(payload, SCHEMA).values)[::2]


def test_the_fast_path_takes_ordinary_records() -> None:
    decoder = FeatureDecoder(SCHEMA)
    assert len(decoder._fast_impressions([GOOD[0], GOOD[2], GOOD[3], GOOD[18]]).batch) == 4


def test_records_that_only_balance_together_are_refused() -> None:
    split = [b'{"features":{"user":"a"}', b"}"], [b'{"features":{}}{"features":{}}', b" "]
    for payloads in split:
        with pytest.raises(Doubt):
            FeatureDecoder(SCHEMA)._fast_impressions(payloads)


def test_the_whole_corpus_at_once() -> None:
    assert_decoded_as_the_reference_says(CORPUS * 3)


def test_one_bad_record_among_many() -> None:
    payloads: list[bytes | None] = [impression({"user": i, "price": i / 7}) for i in range(500)]
    for bad, _, _ in BAD[::7]:
        payloads[321] = bad
        assert_decoded_as_the_reference_says(payloads)


def test_a_field_that_changes_its_type_along_the_run() -> None:
    payloads: list[bytes | None] = [impression({"user": i if i // 100 % 2 else str(i)}) for i in range(600)]
    assert_decoded_as_the_reference_says(payloads)


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 3.0, 2.0**53])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=12)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
finite = st.fixed_dictionaries(
    {},
    optional={
        "user": st.none() | st.text(max_size=20) | st.integers(-(2**63), 2**63 - 1),
        "item": st.integers(0, 5),
        "tags": st.none() | st.lists(st.text(max_size=5), max_size=4),
        "words": st.lists(st.sampled_from(["a", "b"]), max_size=3),
        "price": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30),
        "age": st.floats(-1e3, 1e3),
        "dwell": st.floats(-1e3, 1e3) | st.integers(-5, 5),
    },
)
likely = st.tuples(finite, st.just({}) | st.fixed_dictionaries({"other": values})).map(lambda parts: parts[0] | parts[1])
odd = st.dictionaries(st.sampled_from(["user", "item", "tags", "price", "dwell", "x"]), values)


@settings(max_examples=60, deadline=None)
@given(st.lists(likely, min_size=12, max_size=30), st.lists(odd, max_size=3))
def test_any_features(features: list[Any], odd_ones: list[Any]) -> None:
    assert_decoded_as_the_reference_says([impression(f) for f in features + odd_ones + features])


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([p for p in CORPUS if p and len(p) < 500]), st.data())
def test_mangled_records(payload: bytes, data: st.DataObject) -> None:
    mangled = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mangled)))
        piece = st.binary(max_size=2) | st.sampled_from([b"{", b"}", b"[", b'"', b"\\", b"\n", b",", b"NaN", b"0", b"e9"])
        mangled[at : at + data.draw(st.integers(0, 2))] = data.draw(piece)
    neighbour = raw('{"user":"n"}')
    payloads = [neighbour, bytes(mangled), neighbour]
    try:
        fast = FeatureDecoder(SCHEMA)._fast_impressions(payloads)
    except Doubt:
        return
    expected = reference_row(reference.decode_impression(bytes(mangled), SCHEMA).values)
    assert rows_of(fast.batch)[1][::2] == expected[::2]


# Buckets


@pytest.mark.parametrize(
    ("price", "bucket"), [(0, 0), (0.18, 0), (0.19, 1), (1, 4), (3, 8), (7, 12), (-0.1, -1), (-1, -5), (1e308, 4092)]
)
def test_log_buckets(price: float, bucket: int) -> None:
    batch = FeatureDecoder(SCHEMA).impressions([impression({"price": price})]).batch
    assert batch.keys[0, 2] == number_key(bucket, "price")


@pytest.mark.parametrize(("age", "bucket"), [(0, 0), (4.99, 0), (5, 1), (-0.1, -1), (1e308, 1 << 62)])
def test_linear_buckets(age: float, bucket: int) -> None:
    batch = FeatureDecoder(SCHEMA).impressions([impression({"age": age})]).batch
    assert batch.keys[0, 3] == number_key(bucket, "age")


def test_integers_and_their_strings_share_a_row_and_so_do_fields_of_one_space() -> None:
    batch = (
        FeatureDecoder(SCHEMA).impressions([impression({"user": 7, "item": "7"}), impression({"user": "7", "item": 7.0})]).batch
    )
    assert len(np.unique(batch.keys[:, :2])) == 1


# Score requests


def request(**parts: Any) -> bytes:
    return json.dumps({"request_id": "r", "candidates": [], **parts}).encode()


def test_a_candidates_feature_wins_over_the_contexts() -> None:
    context = {"user": "u", "price": 2, "dwell": 3, "tags": ["c"], "words": ["w"]}
    own = {"item": 5, "price": 9, "dwell": None, "tags": ["x", "y"], "words": None}
    payload = request(context=context, candidates=[{"id": "a", "features": own}, {"id": "b"}], deadline_ms=77)
    for payloads in ([payload], [payload] * 40):
        decoded = FeatureDecoder(SCHEMA).requests(payloads)
        assert not decoded.bad
        assert decoded.request_ids[0] == "r"
        assert decoded.candidate_ids[0] == ["a", "b"]
        assert decoded.deadlines_ms.tolist() == [77] * len(payloads)
        assert decoded.offsets.tolist() == list(range(0, 2 * len(payloads) + 1, 2))
        merged = {**context, "item": 5, "price": 9, "tags": ["x", "y"]}
        expected = FeatureDecoder(SCHEMA).impressions([impression(merged), impression(context)]).batch
        assert rows_of(decoded.batch)[:2] == rows_of(expected)
        assert rows_of(decoded.batch)[-2:] == rows_of(expected)


BAD_REQUESTS = [
    (b"", "malformed_json", "$"),
    (b'{"candidates":[]}', "missing_field", "$"),
    (b'{"request_id":"r"}', "missing_field", "$"),
    (request(request_id=7), "wrong_type", "$.request_id"),
    (request(candidates={}), "nested", "$.candidates"),
    (request(candidates=[None]), "wrong_type", "$.candidates[0]"),
    (request(candidates=[{"features": {}}]), "missing_field", "$.candidates[0]"),
    (request(candidates=[{"id": 5}]), "wrong_type", "$.candidates[0].id"),
    (request(candidates=[{"id": "a"}, {"id": "b", "features": []}]), "wrong_type", "$.candidates[1].features"),
    (request(candidates=[{"id": "a", "features": {"price": "x"}}]), "wrong_type", "$.candidates[0].features.price"),
    (request(candidates=[{"id": "a", "features": {"tags": [3]}}]), "wrong_type", "$.candidates[0].features.tags[0]"),
    (request(context=[]), "wrong_type", "$.context"),
    (request(context={"user": {}}), "nested", "$.context.user"),
    (request(context={"price": math.inf}), "not_finite", "$.context.price"),
    (request(deadline_ms="soon"), "wrong_type", "$.deadline_ms"),
    (request(deadline_ms=-1), "wrong_type", "$.deadline_ms"),
]


@pytest.mark.parametrize(("payload", "reason", "path"), BAD_REQUESTS)
def test_bad_requests(payload: bytes, reason: str, path: str) -> None:
    good = request(request_id="good", candidates=[{"id": "a", "features": {"user": 1}}], context={"item": "x"})
    for before, after in ((0, 0), (30, 7)):
        decoded = FeatureDecoder(SCHEMA).requests([good] * before + [payload] + [good] * after)
        (bad,) = decoded.bad
        assert (bad.index, bad.reason, bad.path) == (before, reason, path)
        assert decoded.rows.tolist() == [i for i in range(before + 1 + after) if i != before]
        assert len(decoded.batch) == decoded.offsets[-1] == before + after


requests = st.fixed_dictionaries(
    {
        "request_id": st.text(max_size=5),
        "candidates": st.lists(st.fixed_dictionaries({"id": st.text(max_size=3)}, optional={"features": finite}), max_size=4),
    },
    optional={"context": st.none() | finite, "deadline_ms": st.none() | st.integers(0, 2**50)},
)


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=9, max_size=20))
def test_any_requests(records: list[Any]) -> None:
    payloads = [json.dumps(record).encode() for record in records]
    decoded = FeatureDecoder(SCHEMA).requests(payloads)
    expected = [reference.decode_request(payload, SCHEMA) for payload in payloads]
    assert not decoded.bad
    assert decoded.request_ids == [e.request_id for e in expected]
    assert decoded.candidate_ids == [e.candidate_ids for e in expected]
    assert decoded.deadlines_ms.tolist() == [e.deadline_ms for e in expected]
    rows = [reference_row(values) for e in expected for values in e.candidates]
    assert [row[::2] for row in rows_of(decoded.batch)] == [row[::2] for row in rows]


# Batches


@settings(deadline=None)
@given(st.lists(finite, max_size=12), st.data())
def test_slices_takes_and_joins(features: list[Any], data: st.DataObject) -> None:
    batch = FeatureDecoder(SCHEMA).impressions([impression(f) for f in features]).batch
    rows = rows_of(batch)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 14), st.integers(0, 14))))
    assert rows_of(batch.slice(start, stop)) == rows[start:stop]
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)) if rows else []
    assert rows_of(batch.take(index)) == [rows[i] for i in index]
    joined = FeatureBatch.concat([batch.slice(start, stop), batch.take(index), batch])
    assert rows_of(joined) == rows[start:stop] + [rows[i] for i in index] + rows


def test_nothing_to_decode() -> None:
    decoder = FeatureDecoder(SCHEMA)
    assert len(decoder.impressions([]).batch) == 0
    assert decoder.requests([]).offsets.tolist() == [0]
    with pytest.raises(ModelError, match=r"features.fields is empty: name at least one"):
        FeatureDecoder(FeatureSchema())
    with pytest.raises(ValueError, match="expected at least one batch"):
        FeatureBatch.concat([])
