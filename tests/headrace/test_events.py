"""Events are refused before they are sent, by the same rules as the pipeline's, with a message that says what to do."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import json
import math
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import headrace.events
from headrace import InvalidEvent
from headrace.events import encode_click, encode_impression, encode_request
from model.features_reference import decode_impression
from model.schema import FeatureSchema, FieldSpec
from stream.join.events import read_run
from stream.records.times import MAX_AGE_MS

T = 1_700_000_000_000


def test_impression_has_the_fields_of_the_contract() -> None:
    key, value = encode_impression("imp-é", T, {"u": "7", "n": 1, "x": 0.5, "tags": ["a", "b"], "none": None}, 0.25, 3, 0)
    assert key == "imp-é".encode()
    assert json.loads(value) == {
        "impression_id": "imp-é",
        "timestamp": T,
        "features": {"u": "7", "n": 1, "x": 0.5, "tags": ["a", "b"], "none": None},
        "score": 0.25,
        "model_version": 3,
        "delta": 0,
    }
    assert b"delta" not in encode_impression("i", T, {}, 0.25, 3)[1]
    assert json.loads(encode_impression("i", T, {}, propensity=0.125)[1])["propensity"] == 0.125
    for wrong in (0, 1.5, True):
        with pytest.raises(InvalidEvent) as refused:
            encode_impression("i", T, {}, propensity=wrong)
        assert refused.value.path == "$.propensity"


def test_click_and_request_have_the_fields_of_the_contract() -> None:
    assert encode_click("i", T) == (b"i", b'{"impression_id":"i","timestamp":1700000000000}')
    key, value = encode_request("r", {"u": "1"}, [("a", {"x": 1}), ("b", {})], T)
    assert key == b"r"
    assert json.loads(value) == {
        "request_id": "r",
        "context": {"u": "1"},
        "candidates": [{"id": "a", "features": {"x": 1}}, {"id": "b", "features": {}}],
        "deadline_ms": T,
    }
    assert json.loads(encode_request("r", {}, [("a", {})], timestamp_ms=T)[1])["timestamp"] == T


@pytest.mark.parametrize(
    ("arguments", "path", "message"),
    [
        (("", T, {}), "$.impression_id", "expected a non-empty string, found '' (str). For a number, pass str(number)."),
        ((7, T, {}), "$.impression_id", "expected a non-empty string, found 7 (int)"),
        (("a\ud800", T, {}), "$.impression_id", "text that UTF-8 can hold"),
        (("i", 1.5, {}), "$.timestamp", "milliseconds since 1970-01-01 UTC as an integer"),
        (("i", -1, {}), "$.timestamp", "found -1 (int). For a datetime, pass int(when.timestamp() * 1000)."),
        (("i", True, {}), "$.timestamp", "found True (bool)"),
        (("i", 10**15, {}), "$.timestamp", "before the year 10000"),
        (("i", T, None), "$.features", "a mapping of names to values, found None"),
        (("i", T, {3: "x"}), "$.features", "names that are non-empty strings, found 3"),
        (("i", T, {"f": math.nan}), "$.features.f", "a finite number, found nan (float). Pass None for a missing value."),
        (("i", T, {"f": math.inf}), "$.features.f", "a finite number"),
        (("i", T, {"f": {"a": 1}}), "$.features.f", "Features are flat: convert it before sending."),
        (("i", T, {"f": True}), "$.features.f", "a string, a number, a list of strings or None, found True"),
        (("i", T, {"f": b"x"}), "$.features.f", "found b'x' (bytes)"),
        (("i", T, {"f": 1 << 64}), "$.features.f", "an integer of at most 64 bits"),
        (("i", T, {"f": ["a", 1]}), "$.features.f[1]", "a string, found 1 (int). Lists hold strings only."),
        (("i", T, {"f": ["\udfff"]}), "$.features.f[0]", "half of a surrogate pair"),
        (("i", T, {}, 1.5), "$.score", "a probability between 0 and 1, found 1.5"),
        (("i", T, {}, math.nan), "$.score", "a probability between 0 and 1, found nan"),
        (("i", T, {}, 0.5, -1), "$.model_version", "a version number, 0 or more, found -1"),
        (
            ("i", T, {}, 0.5, 3, -1),
            "$.delta",
            "a number of deltas, 0 or more, found -1 (int). Take it from the answer as it is, 0 where it has none.",
        ),
        (("i", T, {}, 0.5, 3, 1.0), "$.delta", "a number of deltas, 0 or more, found 1.0 (float)"),
        (("i", T, {}, 0.5, 3, True), "$.delta", "found True (bool)"),
        (("i", T, {}, 0.5, 3, "2"), "$.delta", "found '2' (str)"),
        (("i", T, {}, 0.5, 3, 1 << 63), "$.delta", "a number of deltas, 0 or more"),
    ],
)
def test_bad_impressions_are_refused_with_a_path(arguments: tuple[Any, ...], path: str, message: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        encode_impression(*arguments)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: expected ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("", {}, [("a", {})]), "$.request_id"),
        (("r", [], [("a", {})]), "$.context"),
        (("r", {}, []), "$.candidates"),
        (("r", {}, ["a"]), "$.candidates[0]"),
        (("r", {}, [("a", {}), ("", {})]), "$.candidates[1].id"),
        (("r", {}, [("a", {"f": math.nan})]), "$.candidates[0].features.f"),
        (("r", {}, [("a", {})], "soon"), "$.deadline_ms"),
        (("r", {}, [("a", {})], None, 1_700_000_000), "$.timestamp"),
    ],
)
def test_bad_requests_are_refused_with_a_path(arguments: tuple[Any, ...], path: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        encode_request(*arguments)
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("time", "advice"),
    [
        (1_700_000_000, "This looks like seconds: multiply by 1000, and pass an integer."),
        (1_700_000_000.25, "This looks like seconds: multiply by 1000, and pass an integer."),
        (1_700_000_000_000_000, "This looks like microseconds: divide by 1000, and pass an integer."),
        (1_700_000_000_000_000_000, "This looks like nanoseconds: divide by 1,000,000, and pass an integer."),
        (0, "Events older than that are never joined."),
        (1e300, "For a datetime, pass"),
        (math.nan, "For a datetime, pass"),
    ],
)
def test_a_time_in_another_unit_is_refused_and_the_unit_named(time: Any, advice: str) -> None:
    for encode in (
        lambda: encode_impression("i", time, {}),
        lambda: encode_click("i", time),
        lambda: encode_request("r", {}, [("a", {})], time),
    ):
        with pytest.raises(InvalidEvent) as caught:
            encode()
        assert "expected milliseconds since 1970-01-01 UTC" in str(caught.value)
        assert advice in str(caught.value)


def test_client_and_join_have_one_rule_of_how_old_an_event_may_be() -> None:
    assert headrace.events._MAX_AGE_MS == MAX_AGE_MS
    oldest = headrace.events.now_ms() - MAX_AGE_MS + 60_000
    assert encode_click("i", oldest)[0] == b"i"
    with pytest.raises(InvalidEvent):
        encode_click("i", oldest - 120_000)


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 3


class Mixed(str, enum.Enum):  # noqa: UP042 - the older way to write a StrEnum
    BLUE = "blue"


class Plain(enum.Enum):
    GREEN = "green"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.1), 0.10000000149011612),
        (np.float16(0.1), 0.0999755859375),
        (np.int64(-(1 << 63)), -(1 << 63)),
        (np.uint64((1 << 64) - 1), (1 << 64) - 1),
        (np.int8(3), 3),
        (np.str_("é"), "é"),
        (np.array(2.5), 2.5),
        (["a", np.str_("b")], ["a", "b"]),
        (("a", Colour.RED), ["a", "red"]),
        (Colour.RED, "red"),
        (Mixed.BLUE, "blue"),
        (Level.LOW, 3),
    ],
)
def test_numpy_scalars_and_enums_are_taken_at_exactly_their_value(given: Any, sent: Any) -> None:
    _, value = encode_impression("i", T, {"f": given})
    found = json.loads(value)["features"]["f"]
    assert (found, type(found)) == (sent, type(sent))


@pytest.mark.parametrize(
    ("given", "path", "advice"),
    [
        (np.bool_(True), "$.features.f", "For a yes or no, pass 1 and 0, or two strings."),
        (np.float64("nan"), "$.features.f", "Pass None for a missing value."),
        (np.longdouble(0.1), "$.features.f", "Features are flat"),
        (np.complex128(1), "$.features.f", "Features are flat"),
        (np.timedelta64(5, "s"), "$.features.f", "Features are flat"),
        (np.datetime64("2024-05-01", "ns"), "$.features.f", "Features are flat"),
        (np.bytes_(b"x"), "$.features.f", "Features are flat"),
        (np.zeros((2, 2)), "$.features.f", "found array([[0., 0.], [0., 0.]]) (ndarray). For an array of strings"),
        (np.array(["a"]), "$.features.f", "For an array of strings, pass array.tolist()."),
        ([np.int64(1)], "$.features.f[0]", "Lists hold strings only."),
        ({"a"}, "$.features.f", "For a set of strings, pass sorted(value)."),
        (decimal.Decimal("1.5"), "$.features.f", "Pass float(value), or str(value) for a category."),
        (dt.datetime(2024, 1, 1), "$.features.f", "Pass when.timestamp() for a number, or when.isoformat() for a category."),
        (dt.date(2024, 1, 1), "$.features.f", "Pass when.isoformat() for a category."),
        (uuid.UUID(int=1), "$.features.f", "Pass str(value)."),
        (b"a", "$.features.f", "Pass value.decode()."),
        ((x for x in "ab"), "$.features.f", "For strings, pass list(value)."),
        (Plain.GREEN, "$.features.f", "Features are flat"),
    ],
)
def test_what_would_lose_something_is_refused_with_what_to_pass(given: Any, path: str, advice: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        encode_impression("i", T, {"f": given})
    assert caught.value.path == path
    assert advice in str(caught.value) and "\n" not in str(caught.value)


def test_numpy_scalars_are_ids_times_scores_and_versions() -> None:
    assert encode_impression(np.str_("i"), np.int64(T), {}, np.float32(0.5), np.int64(7), np.int64(2)) == encode_impression(
        "i", T, {}, 0.5, 7, 2
    )
    assert encode_impression(Mixed.BLUE, T, {})[0] == b"blue"
    for wrong in (np.float64(T), np.datetime64("2024-05-01"), dt.datetime.now(), str(T)):
        with pytest.raises(InvalidEvent, match=r"\$.timestamp: expected milliseconds"):
            encode_impression("i", wrong, {})
    with pytest.raises(InvalidEvent, match=r"This looks like seconds: multiply by 1000"):
        encode_impression("i", np.int32(1_700_000_000), {})
    with pytest.raises(InvalidEvent, match=r"\$.score: expected a probability"):
        encode_impression("i", T, {}, np.bool_(True))
    with pytest.raises(InvalidEvent, match=r"\$.model_version: expected a version number"):
        encode_impression("i", T, {}, 0.5, np.float32(1))


def test_two_names_of_one_text_are_refused() -> None:
    class Name(str):
        __hash__ = object.__hash__

    with pytest.raises(InvalidEvent, match=r"\$.features: expected names that differ"):
        encode_impression("i", T, {"a": 1, Name("a"): 2})


def test_a_long_value_is_not_shown_in_full() -> None:
    with pytest.raises(InvalidEvent) as caught:
        encode_impression("i", T, {"f": {"secret": "x" * 500}})
    assert len(str(caught.value)) < 300


_text = st.text(min_size=1, max_size=5)
_values = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.integers(-(1 << 65), 1 << 65),
    st.floats(),
    st.booleans(),
    st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=3),
    st.dictionaries(_text, st.integers(), max_size=1),
)


class _Record:
    """As much of a Kafka record as the join reads."""

    topic, partition, offset, headers = "impressions", 0, 0, ()

    def __init__(self, key: bytes, value: bytes) -> None:
        self.key, self.value, self.timestamp = key, value, T


@given(name=st.text(max_size=5), when=st.integers(T - 10**13, T + 10**6) | st.integers(-5, 10**10), value=_values)
def test_what_the_client_takes_the_pipeline_takes(name: str, when: int, value: Any) -> None:
    try:
        key, payload = encode_impression(name, when, {"f": value})
    except InvalidEvent:
        return
    events = read_run([_Record(key, payload)], max_future_ms=10**9, max_watermark_future_ms=0)
    assert events.times_ms == [when]
    assert not events.dead
    kind = "list" if isinstance(value, list) else "numeric" if isinstance(value, float) else "categorical"
    schema = FeatureSchema(fields=(FieldSpec.model_validate({"name": "f", "kind": kind}),))
    decode_impression(payload, schema)  # raises for what the trainer would dead-letter


@pytest.mark.parametrize("huge", [10**5_000, -(10**5_000)], ids=["above", "below"])
def test_a_number_that_python_refuses_to_write_is_refused_in_our_words(huge: int) -> None:
    for arguments in (("i", 1_700_000_000_000, {"x": huge}), ("i", huge, {}), (huge, 1_700_000_000_000, {})):
        with pytest.raises(InvalidEvent, match="found one that can't be written"):
            encode_impression(*arguments)


def test_a_missing_value_of_numpys_masked_arrays_is_no_zero() -> None:
    with pytest.raises(InvalidEvent, match=r"\$\.features\.x: expected .* found masked \(MaskedConstant\)"):
        encode_impression("i", 1_700_000_000_000, {"x": np.ma.masked})
