"""The share of requests that a candidate gets: which they are, what their answers say, and what its failures cost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

from headrace.scores import decode_answer
from model.hashing import hash_bytes
from model.predictor import Predictor
from model.requests import RequestDecoder
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.canary import Mode
from stream.scorer.answers import Answers, answer_requests
from stream.scorer.serving import Served, WeightsState
from stream.scorer.trial import Trial, in_share
from tests.stream.scorer.factory import MAX_BYTES, record, records, request, served, weights

NAMES = [f"r{index}" for index in range(60)]
CHAMPION, CANDIDATE = served(7), served(9, created_at_ms=3_000)
SHARE = 0.3
CHOSEN = {name for name, chosen in zip(NAMES, in_share(NAMES, SHARE).tolist(), strict=True) if chosen}
ROOT = Path(__file__).resolve().parents[3]


def answered(mode: Mode, candidate: Served = CANDIDATE, share: float = SHARE, *, max_bytes: int = MAX_BYTES) -> Answers:
    return answer_requests(
        records(NAMES),
        CHAMPION,
        trial=Trial(mode, share, candidate),
        worker="w",
        max_candidates=10,
        max_bytes=max_bytes,
        now_ms=lambda: 5_000,
    )


def values(answers: Answers) -> dict[str, Any]:
    return {(found := json.loads(value or b""))["request_id"]: found for _, value, _ in answers.records}


def test_the_share_is_that_of_a_documented_hash_and_a_larger_share_contains_a_smaller_one() -> None:
    names = [f"request-{index}" for index in range(2_000)]
    for share in (0.0, 0.01, 0.05, 0.5, 1.0):
        expected = [(hash_bytes(name.encode(), "canary") % 2**64) / 2**64 < share for name in names]
        assert in_share(names, share).tolist() == expected
    small, large = in_share(names, 0.05), in_share(names, 0.2)
    assert abs(small.mean() - 0.05) < 0.02 and not (small & ~large).any()
    assert in_share([], 0.5).tolist() == [] and in_share(names, 1.0).all()


def test_a_canary_answers_its_share_and_says_so() -> None:
    answers = answered("canary")
    found = values(answers)
    assert {name for name, value in found.items() if value["model_version"] == 9} == CHOSEN != set()
    for name, value in found.items():
        score, age = (0.009, 2_000) if name in CHOSEN else (0.007, 4_000)
        assert ([each["score"] for each in value["scores"]], value["snapshot_age_ms"]) == ([score] * 3, age)
        assert "shadow_version" not in value
    assert (answers.by_candidate, answers.not_by_candidate) == (len(CHOSEN), 0)
    assert answers.outcomes == {"scored": len(NAMES)} and answers.candidates == 3 * len(NAMES)


def test_a_shadow_scores_its_share_beside() -> None:
    answers = answered("shadow")
    for name, value in values(answers).items():
        assert value["model_version"] == 7 and [each["score"] for each in value["scores"]] == [0.007] * 3
        shadows = [each.get("shadow") for each in value["scores"]]
        assert (value.get("shadow_version"), shadows) == ((9, [0.009] * 3) if name in CHOSEN else (None, [None] * 3))


def test_the_champions_scores_are_those_without_a_trial() -> None:
    alone = answer_requests(records(NAMES), CHAMPION, worker="w", max_candidates=10, max_bytes=MAX_BYTES, now_ms=lambda: 5_000)
    for mode in ("shadow", "canary"):
        assert [values(answered(mode))[name] for name in set(NAMES) - CHOSEN] == [  # type: ignore[arg-type]
            values(alone)[name] for name in set(NAMES) - CHOSEN
        ]


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_candidate_that_fails_costs_nothing(mode: Mode) -> None:
    class Broken:
        def predict(self, batch: object) -> None:
            raise RuntimeError("damaged")

    broken: Any = Broken()
    not_finite = weights(9)
    not_finite["bias"].fill_(float("nan"))
    for candidate in (Served(WeightsState(9, 1), CHAMPION.decoder, broken), served(9, not_finite)):
        answers = answered(mode, candidate, share=1.0)
        assert all(value["model_version"] == 7 and "error" not in value for value in values(answers).values())
        assert all("shadow" not in score for value in values(answers).values() for score in value["scores"])
        assert (answers.by_candidate, answers.not_by_candidate) == (0, len(NAMES))


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_champion_that_gives_no_number_is_an_error_only_where_it_answers(mode: Mode) -> None:
    broken = weights(7)
    broken["bias"].fill_(float("nan"))
    answers = answer_requests(
        records(NAMES),
        served(7, broken),
        trial=Trial(mode, SHARE, CANDIDATE),
        worker="w",
        max_candidates=10,
        max_bytes=MAX_BYTES,
    )
    fine = {name for name, value in values(answers).items() if "error" not in value}
    assert fine == (CHOSEN if mode == "canary" else set())


def test_a_candidate_with_other_features_reads_the_requests_by_its_own_schema() -> None:
    schema = FeatureSchema(fields=(FieldSpec(name="price", kind="categorical"),), embedding_dim=2)
    settings = ModelSettings(hidden=(4,), initial_rows=16, row_history=False, cross_layers=0)
    from model.learner import Learner

    serving = Learner(schema, settings, device="cpu").serving_state()
    predictor = Predictor.of(schema, settings, serving, device="cpu")
    other = Served(WeightsState(9, 1_000), RequestDecoder(schema), predictor)
    # `price` is a number for the champion, so 1.5 is fine; a category for the candidate, which takes no fraction.
    batch = [record(request(name), name.encode()) for name in NAMES[:4]]
    fraction = {"request_id": "x", "candidates": [{"id": "c0", "features": {"price": 1.5}}]}
    batch.append(record(json.dumps(fraction).encode(), b"x"))
    answers = answer_requests(
        batch, CHAMPION, trial=Trial("canary", 1.0, other), worker="w", max_candidates=10, max_bytes=MAX_BYTES
    )
    found = values(answers)
    assert [found[name]["model_version"] for name in NAMES[:4]] == [9] * 4
    alone = predictor.predict(other.decoder.requests([batch[0].value]).batch)
    assert [each["score"] for each in found["r0"]["scores"]] == pytest.approx(alone.tolist(), abs=1e-7)
    assert found["x"]["model_version"] == 7 and answers.not_by_candidate == 1


def test_bad_requests_between_good_ones_change_nothing() -> None:
    batch: list[Any] = []
    for index, name in enumerate(NAMES):
        batch.append(record(request(name, candidates=index % 4), name.encode()))
        batch.append(record(b"{" if index % 2 else request(f"late{index}", deadline_ms=1), f"late{index}".encode()))
    answers = answer_requests(
        batch, CHAMPION, trial=Trial("canary", SHARE, CANDIDATE), worker="w", max_candidates=10, max_bytes=MAX_BYTES
    )
    found = values(answers)
    for index, name in enumerate(NAMES):
        assert len(found[name]["scores"]) == index % 4
        assert found[name]["model_version"] == (9 if name in CHOSEN else 7)
    assert len(found) == 2 * len(NAMES)


def test_scores_beside_are_left_out_of_an_answer_that_would_be_too_large() -> None:
    listed = [{"id": "x" * 500} for _ in range(10)]
    value = json.dumps({"request_id": "r", "candidates": listed}).encode()

    def answer(max_bytes: int) -> dict[str, Any]:
        answers = answer_requests(
            [record(value, b"r")],
            CHAMPION,
            trial=Trial("shadow", 1.0, CANDIDATE),
            worker="w",
            max_candidates=10,
            max_bytes=max_bytes,
        )
        return values(answers)["r"]  # type: ignore[no-any-return]

    assert answer(MAX_BYTES)["shadow_version"] == 9
    sizes = [size for size in range(5_900, 6_300, 10) if answer(size)["scores"]]
    assert "shadow_version" not in answer(sizes[0]) and "shadow" not in answer(sizes[0])["scores"][0]


def test_answers_are_what_asyncapi_and_the_client_say() -> None:
    contract = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())
    schemas = {"components": contract["components"]}
    for key, value, headers in answered("shadow").records:
        document = json.loads(value or b"")
        jsonschema.validate(document, {"$ref": "#/components/schemas/scoreAnswer", **schemas})
        read = decode_answer(SimpleNamespace(topic="scores", partition=0, offset=0, key=key, value=value, headers=headers))
        beside = (9, 0.009) if read.request_id in CHOSEN else (None, None)
        assert (read.shadow_version, read.scores[0].shadow) == beside
        if not read.shadow_version:
            assert b"shadow" not in (value or b"")
