"""The quick decoder of score requests and the model's decoder accept the same requests and give the same keys."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model import requests as module
from model.clock import LATEST_MS
from model.features import DecodedRequests, FeatureDecoder
from model.requests import RequestDecoder
from model.schema import FeatureSchema, FieldSpec

SCHEMA = FeatureSchema(
    fields=(
        FieldSpec(name="user"),
        FieldSpec(name="item", space="things"),
        FieldSpec(name="price", kind="numeric"),
        FieldSpec(name="size", kind="numeric", buckets="linear", width=0.5),
        FieldSpec(name="age", kind="numeric", buckets="scaled"),
        FieldSpec(name="tags", kind="list", space="things"),
    )
)


def same(left: DecodedRequests, right: DecodedRequests) -> None:
    for name in ("keys", "list_keys", "list_offsets", "scales"):
        np.testing.assert_array_equal(getattr(left.batch, name), getattr(right.batch, name), name)
        assert getattr(left.batch, name).dtype == getattr(right.batch, name).dtype
    for name in ("offsets", "deadlines_ms", "rows"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)
    for name in ("request_ids", "candidate_ids", "bad"):
        assert getattr(left, name) == getattr(right, name)


def both(*payloads: bytes) -> DecodedRequests:
    quick = RequestDecoder(SCHEMA).requests(payloads)
    same(quick, FeatureDecoder(SCHEMA).requests(payloads))
    return quick


def is_quick(*payloads: bytes) -> bool:
    try:
        RequestDecoder(SCHEMA)._few(payloads)
    except Exception:
        return False
    return True


def request(context: str = "{}", features: str = "{}", rest: str = "") -> bytes:
    candidates = f'[{{"id":"a","features":{features}}},{{"id":"b"}}]'
    return f'{{"request_id":"r","context":{context},"candidates":{candidates}{rest}}}'.encode()


_text = st.text(max_size=40)
_scalar = st.one_of(
    _text,
    st.integers(-(1 << 70), 1 << 70),
    st.integers(-5, 5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
)
_odd_scalar = _scalar | st.sampled_from([float("inf"), float("-inf"), float("nan")])
_value = st.one_of(
    _scalar, st.lists(_text, max_size=3), st.lists(_scalar, max_size=2), st.dictionaries(_text, _scalar, max_size=1)
)
_good = {
    "user": st.one_of(_text, st.integers(-(1 << 63), (1 << 63) - 1)),
    "item": st.one_of(_text, st.integers(0, 20)),
    "price": st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-1000, 1 << 53)),
    "size": st.one_of(st.floats(-1e6, 1e6), st.integers(-9, 9)),
    "age": st.floats(0, 200),
    "tags": st.lists(_text, max_size=4),
    "unused": _value,
}
_features = st.fixed_dictionaries({}, optional={name: st.one_of(st.none(), value) for name, value in _good.items()})
_odd_features = st.one_of(_features, st.dictionaries(st.sampled_from([*_good]), _value | _odd_scalar, max_size=4), _value)


def _requests(features: st.SearchStrategy[Any], odd: bool) -> st.SearchStrategy[dict[str, Any]]:
    candidate = st.fixed_dictionaries({"id": _odd_scalar if odd else _text}, optional={"features": st.none() | features})
    return st.fixed_dictionaries(
        {"request_id": _odd_scalar if odd else _text, "candidates": st.lists(candidate, max_size=5)},
        optional={
            "context": st.none() | features,
            "deadline_ms": _odd_scalar if odd else st.none() | st.integers(0, (1 << 63) - 1),
            "timestamp": _odd_scalar if odd else st.none() | st.integers(0, LATEST_MS),
            "more": _value,
        },
    )


def _encoded(requests: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(each).encode() for each in requests]


@given(st.lists(_requests(_features, odd=False), min_size=1, max_size=4).map(_encoded))
def test_good_requests_are_read_the_quick_way(payloads: list[bytes]) -> None:
    assert is_quick(*payloads)
    assert not both(*payloads).bad


@given(st.lists(_requests(_odd_features, odd=True), min_size=1, max_size=3).map(_encoded))
def test_odd_requests_get_the_same_verdict(payloads: list[bytes]) -> None:
    both(*payloads)


_PIECES = [b"", b'"', b"\\", b"\xff", b"\xed\xa0\x80", b"{", b"]", b",", b"0", b"NaN", b"\n", b"\x00", b" "]


@given(st.data())
def test_damaged_bytes_get_the_same_verdict(data: st.DataObject) -> None:
    payload = data.draw(_requests(_features, odd=False).map(lambda each: json.dumps(each, ensure_ascii=False).encode()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload)))
        piece = data.draw(st.sampled_from(_PIECES))
        payload = payload[:at] + piece + payload[at + data.draw(st.integers(0, 2)) :]
    both(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"request_id":"r"}',
        b'{"request_id":"r","candidates":null}',
        b'{"request_id":"r","candidates":{}}',
        b'{"request_id":"r","candidates":[null]}',
        b'{"request_id":null,"candidates":[]}',
        b'{"request_id":"a","candidates":[{"id":"x"}],"candidates":[],"request_id":"b"}',
        b'\xef\xbb\xbf{"request_id":"r","candidates":[]}',
        b' \r\n{"request_id":"r" ,"candidates":[ ]}\n',
        b'{"request_id":"\\u0000\\ud83c\\udfac","candidates":[]}',
        b'{"request_id":"\\ud800","candidates":[]}',
        b'{"request_id":"r","candidates":[{"id":"\\udc00"}]}',
        request('{"user":"\\ud800"}'),
        request('{"unused":"\\ud800"}'),
        request('{"unused":"?"}').replace(b"?", b"\xff"),
        request(rest=',"x":"?"').replace(b"?", b"\xff"),
        request(features='{"price":1e999}'),
        request(features='{"price":-1e999}'),
        request(features='{"unused":1e999}'),
        request(features='{"price":NaN}'),
        request(features='{"unused":[Infinity]}'),
        request(features='{"price":123456789012345678901234567890}'),
        request(features='{"price":9007199254740993}'),
        request(features='{"price":18446744073709551617}'),
        request(features='{"price":true}'),
        request(features='{"price":"1"}'),
        request(features='{"user":17}'),
        request(features='{"user":17.0}'),
        request(features='{"user":17.5}'),
        request(features='{"user":-0}'),
        request(features='{"user":-0.0}'),
        request(features='{"user":1e3}'),
        request(features='{"user":9223372036854775808}'),
        request(features='{"user":18446744073709551615}'),
        request(features='{"user":18446744073709551616}'),
        request(features='{"user":-9223372036854775809}'),
        request(features='{"user":true}'),
        request(features='{"user":["a"]}'),
        request(features='{"tags":[]}'),
        request(features='{"tags":[null]}'),
        request(features='{"tags":["a",1]}'),
        request(features='{"tags":"a"}'),
        request('{"tags":["a","b"]}', '{"tags":null}'),
        request('{"user":"a","price":2}', '{"user":null,"price":3}'),
        request("[]"),
        request("null", "null"),
        request(rest=',"deadline_ms":17.0'),
        request(rest=',"deadline_ms":-1'),
        request(rest=',"deadline_ms":true'),
        request(rest=',"deadline_ms":9223372036854775807'),
        request(rest=',"deadline_ms":9223372036854775808'),
        request(rest=',"deadline_ms":null'),
        request(rest=',"x":' + "[" * 300 + "]" * 300),
        request(rest=',"x":' + "[" * 990 + "]" * 990),
        request(rest=',"x":' + "[" * 5_000 + "]" * 5_000),
        request('{"unused":' + '{"a":' * 2_000 + "1" + "}" * 2_000 + "}"),
        b"[" * 100_000,
    ],
)
def test_the_same_verdict_alone_and_beside_a_good_one(payload: bytes) -> None:
    both(payload)
    both(request('{"user":"u"}', '{"item":3}'), payload, request(rest=',"deadline_ms":5'))


def test_the_same_verdict_where_nesting_becomes_too_deep() -> None:
    for depth in range(850, 1_000, 3):
        both(request(rest=',"x":' + "[" * depth + "]" * depth))
        both(request('{"unused":' + '{"a":' * depth + "1" + "}" * depth + "}"))


@example(["1" * 200])
@given(st.lists(_text, max_size=30))
def test_words_of_any_length_have_the_model_s_keys(words: list[str]) -> None:
    candidates = [{"id": word, "features": {"item": word}} for word in words]
    both(json.dumps({"request_id": "r", "candidates": candidates}).encode())


def test_no_requests_and_large_ones_go_to_the_model_s_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    both()
    payload = request('{"user":"u"}')
    monkeypatch.setattr(RequestDecoder, "_few", lambda *_: pytest.fail("too large"))
    monkeypatch.setattr(module, "FEW_BYTES", len(payload) - 1)
    both(payload)
