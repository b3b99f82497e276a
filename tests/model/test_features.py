"""Both paths of the decoder accept the same records and give the same keys, on a fixed corpus and on hypothesis' records."""

from __future__ import annotations

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
from model.hashing import number_key
from model.schema import FeatureSchema
from tests.model.made_features import (
    SCHEMA,
    finite,
    impression,
    raw,
    rows_of,
    values,
)

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
    raw('{"user":"a"}', ',"score":0.5,"model_version":3,"delta":0'),
    raw('{"user":"a"}', ',"delta":240'),
    raw('{"user":"a"}', ',"model_version":3,"delta":null'),
    raw('{"user":"a"}', ',"model_version":3,"delta":4.0'),
    raw('{"user":"a"}', ',"delta":9223372036854775807'),
    raw('{"delta":-0.5}'),
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
    (raw("{}", ',"model_version":3,"delta":-1'), "wrong_type", "$.delta"),
    (raw("{}", ',"delta":1.5'), "wrong_type", "$.delta"),
    (raw("{}", ',"delta":"7"'), "wrong_type", "$.delta"),
    (raw("{}", ',"delta":true'), "wrong_type", "$.delta"),
    (raw("{}", ',"delta":[0]'), "wrong_type", "$.delta"),
    (raw("{}", ',"delta":{"a":1}'), "nested", "$.delta"),
    (raw("{}", ',"delta":9223372036854775808'), "wrong_type", "$.delta"),
]


CORPUS: list[bytes | None] = [*GOOD, *(payload for payload, _, _ in BAD)]


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
        expected_keys, expected_scales, expected_lists = reference.reference_row(expected.values, SCHEMA, 0)
        assert keys == expected_keys
        assert scales == expected_scales
        assert lists == expected_lists
    served = [e.served_score for _, e in good]
    assert np.array_equal(decoded.served_score, np.array(served, np.float32), equal_nan=True)
    assert decoded.served_version.tolist() == [e.served_version for _, e in good]
    assert decoded.served_delta.tolist() == [e.served_delta for _, e in good]


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
    assert (
        rows_of(fast.batch)[1][::2]
        == reference.reference_row(reference.decode_impression(payload, SCHEMA).values, SCHEMA, 0)[::2]
    )


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
    expected = reference.reference_row(reference.decode_impression(bytes(mangled), SCHEMA).values, SCHEMA, 0)
    assert rows_of(fast.batch)[1][::2] == expected[::2]


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
