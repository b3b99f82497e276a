"""Requests to answers: every request gets one, in its own order, or an error that says why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from model.features import FeatureDecoder
from model.learner import Learner
from stream.records.answer import ANSWER_REASONS
from stream.records.dead_letter import REASONS
from stream.scorer import scored_rows as module
from stream.scorer.answers import Answers, answer_requests
from stream.scorer.serving import Served
from tests.stream.scorer.factory import MAX_BYTES, MODEL, SCHEMA, record, records, request, served, weights

ROOT = Path(__file__).resolve().parents[3]
NOW_MS = 5_000
VERSION_7 = served(7)


def answered(
    batch: list[Any], version: Served | None = VERSION_7, *, stale: bool = False, max_bytes: int = MAX_BYTES
) -> Answers:
    return answer_requests(
        batch, version, worker="host-1", max_candidates=10, max_bytes=max_bytes, stale=stale, now_ms=lambda: NOW_MS
    )


def values(answers: Answers) -> list[dict[str, Any]]:
    return [json.loads(value or b"") for _, value, _ in answers.records]


def error_of(value: bytes | None, key: bytes | None = b"r", **more: Any) -> dict[str, Any]:
    """The one answer to one request, which must be an error."""
    answers = answered([record(value, key)], **more)
    (found,) = values(answers)
    assert found["scores"] == [] and not answers.dead
    assert answers.outcomes == {found["error"]["reason"]: 1}
    return found


def test_scores_come_in_the_order_of_the_candidates() -> None:
    answers = answered(records(["a", "b"], candidates=3))
    assert values(answers) == [
        {
            "request_id": name,
            "scores": [{"id": f"c{index}", "score": 0.007} for index in range(3)],
            "model_version": 7,
            "snapshot_age_ms": 4_000,
        }
        for name in ("a", "b")
    ]
    assert [key for key, _, _ in answers.records] == [b"a", b"b"]
    assert answers.candidates == 6 and answers.outcomes == {"scored": 2} and not answers.dead


def test_each_candidate_has_its_own_score() -> None:
    """Also with other requests refused before and between: rows and requests stay together."""
    learner = Learner(SCHEMA, MODEL, device="cpu")
    names = [f"r{index}" for index in range(12)]
    mixed = [
        record(request(name, candidates=1 + index % 4, context={"user": f"u{index}"}), name.encode())
        for index, name in enumerate(names)
    ]
    known = FeatureDecoder(SCHEMA).requests([each.value for each in mixed]).batch
    learner.learn(known, np.zeros(len(known), np.float32))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (serving := learner.serving_state()).items():
        if name != "keys":
            tensor.normal_(generator=generator)
    version = served(3, serving)
    for place in (1, 2, 6):
        mixed[place] = record(request(names[place], deadline_ms=1), names[place].encode())
    mixed[8] = record(b"{", b"r8")
    together = {found["request_id"]: found for found in values(answered(mixed, version))}
    assert sorted(together) == sorted(names)
    distinct = set()
    for each in mixed:
        (alone,) = values(answered([each], version))
        other = together[alone["request_id"]]
        assert [score["id"] for score in alone["scores"]] == [score["id"] for score in other["scores"]]
        for mine, theirs in zip(alone["scores"], other["scores"], strict=True):
            assert mine["score"] == pytest.approx(theirs["score"], abs=2e-7)
            distinct.add(mine["score"])
    assert len(distinct) > 10


def test_no_candidates_is_an_answer_without_scores() -> None:
    answers = answered(records(["a"], candidates=0))
    assert values(answers)[0]["scores"] == [] and answers.outcomes == {"scored": 1}


@pytest.mark.parametrize(
    ("value", "reason", "path"),
    [
        (None, "empty_value", "$"),
        (b"", "empty_value", "$"),
        (b"{", "malformed_json", "$"),
        (b"[]", "wrong_type", "$"),
        (b'{"request_id":"\xff","candidates":[]}', "bad_utf8", "$"),
        (b'{"candidates":[]}', "missing_field", "$"),
        (b'{"request_id":"r"}', "missing_field", "$"),
        (b'{"request_id":1,"candidates":[]}', "wrong_type", "$.request_id"),
        (b'{"request_id":"","candidates":[]}', "missing_field", "$.request_id"),
        (b'{"request_id":"r","candidates":[{}]}', "missing_field", "$.candidates[0]"),
        (
            b'{"request_id":"r","candidates":[{"id":"a","features":{"price":1e999}}]}',
            "not_finite",
            "$.candidates[0].features.price",
        ),
        (
            b'{"request_id":"r","candidates":[{"id":"a","features":{"price":NaN}}]}',
            "not_finite",
            "$.candidates[0].features.price",
        ),
        (b'{"request_id":"r","context":{"user":{"a":1}},"candidates":[]}', "nested", "$.context.user"),
        (request("r", deadline_ms="soon"), "wrong_type", "$.deadline_ms"),
        (request("other"), "id_mismatch", "$.request_id"),
        (request("r", candidates=11), "too_many_candidates", "$.candidates"),
        (request("r", deadline_ms=NOW_MS - 1), "deadline_exceeded", "$.deadline_ms"),
    ],
)
def test_what_cannot_be_scored_is_answered_with_the_reason(value: bytes | None, reason: str, path: str) -> None:
    found = error_of(value)
    assert (found["error"]["reason"], found["error"]["path"]) == (reason, path)
    assert found["request_id"] == "r" and found["model_version"] == 7 and found["snapshot_age_ms"] == 4_000
    assert found["error"]["message"]


def test_messages_say_what_was_expected_and_found() -> None:
    assert error_of(request("other"))["error"]["message"] == "expected the record's key to be 'other', found b'r'"
    assert error_of(request("r", candidates=11))["error"]["message"] == "expected at most 10 candidates, found 11"
    assert error_of(request("r", deadline_ms=7))["error"]["message"] == "expected to be scored by 7, it is 5000"
    assert error_of(request("r"), version=None)["error"]["message"] == (
        "expected a version to score with, found none. Does a trainer run, can scorers read the store? `headrace doctor`"
    )


def test_limits_are_inclusive() -> None:
    answers = answered(records(["a"], candidates=10, deadline_ms=NOW_MS))
    assert answers.outcomes == {"scored": 1}


def test_without_a_key_the_answer_goes_to_the_id_in_the_value() -> None:
    found = error_of(request("named"), key=None)
    assert (found["request_id"], found["error"]["reason"]) == ("named", "id_mismatch")
    assert found["error"]["message"] == "expected the record's key to be 'named', found no key"
    for unreadable in (b"", b"\xff"):
        assert error_of(b'{"request_id":"named"}', key=unreadable)["request_id"] == "named"


@pytest.mark.parametrize("version", [None, VERSION_7], ids=["no model", "a model"])
@pytest.mark.parametrize("value", [None, b"", b"{", b"\xff", b"{}", b'{"request_id":7}', b'{"request_id":""}', b"[" * 100_000])
@pytest.mark.parametrize("key", [None, b"", b"\xff"])
def test_nobody_to_answer_is_a_dead_letter(version: Served | None, value: bytes | None, key: bytes | None) -> None:
    received = record(value, key)
    answers = answered([received], version)
    (letter,) = answers.dead
    assert letter.reason in REASONS and not answers.records
    assert (letter.key, letter.value, letter.topic) == (key, value, "score-requests")
    assert answers.outcomes == {"dead_letter": 1}


def test_before_the_first_version_every_request_is_told_so() -> None:
    answers = answered([*records(["a"]), record(b"{", b"b")], None)
    assert [found["error"]["reason"] for found in values(answers)] == ["no_model", "no_model"]
    assert [(found["model_version"], found["snapshot_age_ms"]) for found in values(answers)] == [(None, None)] * 2


def test_stale_is_said_only_when_it_is_so() -> None:
    assert values(answered(records(["a"]), stale=True))[0]["stale"] is True
    assert "stale" not in values(answered(records(["a"])))[0]


def test_weights_that_give_no_number_are_an_error_not_null() -> None:
    broken = weights(7)
    broken["bias"].fill_(float("nan"))
    found = error_of(request("r"), version=served(7, broken))
    assert (found["error"]["reason"], found["error"]["path"]) == ("score_not_finite", "$.candidates[0]")
    assert "headrace snapshot rollback" in found["error"]["message"]


def test_an_answer_larger_than_the_topic_takes_is_an_error() -> None:
    """A record that the broker refuses would be sent again and again, by every scorer that comes."""
    long = [{"id": "x" * 500} for _ in range(10)]
    value = json.dumps({"request_id": "r", "candidates": long}).encode()
    assert answered([record(value, b"r")]).outcomes == {"scored": 1}
    found = error_of(value, max_bytes=5_000)
    assert found["error"]["reason"] == "answer_too_large" and "at most 5000 bytes" in found["error"]["message"]


def test_an_id_too_long_to_answer_under_is_a_dead_letter() -> None:
    name = "i" * 5_000
    answers = answered(records([name]), max_bytes=6_000)
    (letter,) = answers.dead
    assert letter.reason == "out_of_range" and "5000 characters" in letter.message and not answers.records


def test_errors_quote_no_more_than_a_little_of_the_request() -> None:
    value = b'{"request_id":"r","candidates":[],"' + b"k" * 100_000 + b'":NaN}'
    error = error_of(value)["error"]
    assert error["reason"] == "not_finite" and len(error["path"]) == 300 and len(error["message"]) <= 300


def test_many_rows_go_through_the_model_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = values(answered(records(["a", "b", "c"], candidates=7)))
    monkeypatch.setattr(module, "PASS_ROWS", 4)
    assert values(answered(records(["a", "b", "c"], candidates=7))) == whole


_good = st.integers(0, 5).map(lambda count: ("good", count))
_kinds = st.one_of(_good, st.sampled_from([("late", 1), ("crowded", 11), ("broken", 0), ("stranger", 1), ("nameless", 0)]))


@given(st.lists(_kinds, max_size=25))
def test_each_request_ends_in_one_place(kinds: list[tuple[str, int]]) -> None:
    batch, scored = [], {}
    for index, (kind, count) in enumerate(kinds):
        name = f"r{index}"
        more = {"deadline_ms": 1} if kind == "late" else {}
        value: bytes = b"{" if kind in ("broken", "nameless") else request(name, candidates=count, **more)
        batch.append(record(value, None if kind == "nameless" else b"s%d" % index if kind == "stranger" else name.encode()))
        if kind == "good":
            scored[name] = count
    answers = answered(batch)
    found = values(answers)
    assert {value["request_id"]: len(value["scores"]) for value in found if "error" not in value} == scored
    assert len({value["request_id"] for value in found}) == len(found)
    assert len(answers.records) + len(answers.dead) == len(batch) == sum(answers.outcomes.values())
    assert answers.candidates == sum(scored.values())


def test_answers_are_what_asyncapi_says() -> None:
    contract = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())
    schemas = {"components": contract["components"]}
    batch = [*records(["a"]), record(b"{", b"b"), record(request("c", deadline_ms=1), b"c")]
    for answers in (answered(batch, stale=True), answered(batch, None)):
        for key, value, headers in answers.records:
            document = msgspec.json.decode(value or b"")
            jsonschema.validate(document, {"$ref": "#/components/schemas/scoreAnswer", **schemas})
            told = {name: content.decode() for name, content in headers}
            jsonschema.validate(told, contract["components"]["messages"]["scoreAnswer"]["headers"])
            assert told["ce_id"].encode() == key and told["ce_source"] == "/headrace/scorer/host-1"
            assert told["ce_time"] == "1970-01-01T00:00:05.000Z"


def test_every_reason_is_documented() -> None:
    page = (ROOT / "docs" / "scoring.md").read_text()
    table = dict(
        re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", page.split("| reason | what it says |")[1].split("\n\n")[0], re.MULTILINE)
    )
    assert ANSWER_REASONS.items() <= table.items()
    assert set(table) - set(ANSWER_REASONS) <= REASONS.keys()


def test_an_answer_says_how_many_deltas_its_weights_have() -> None:
    version = served(7, created_at_ms=1_000)
    version.state = version.state._replace(delta=12, captured_at_ms=4_000)
    answers = answer_requests(records(["a"]), version, worker="w", max_candidates=9, max_bytes=MAX_BYTES, now_ms=lambda: 4_250)
    (_, value, _), *_ = answers.records
    told = json.loads(value or b"")
    assert (told["model_version"], told["delta"], told["snapshot_age_ms"]) == (7, 12, 250)
    whole = answer_requests(records(["a"]), served(7), worker="w", max_candidates=9, max_bytes=MAX_BYTES)
    assert "delta" not in json.loads(whole.records[0][1] or b"")
