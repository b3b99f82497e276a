"""The shares of tracks beside the one that serves: which requests they score, and what their failures cost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model.hashing import hash_bytes
from state.canary import Mode
from state.tracks import NUMBERS, Interval
from stream.scorer.answers import Answers, ShadowCount, answer_requests
from stream.scorer.trial import Shadow, Trial, in_share, positions
from tests.stream.scorer.factory import MAX_BYTES, records, served

NAMES = [f"r{index}" for index in range(80)]
CHAMPION, CANDIDATE = served(7), served(9)
AT = {name: (hash_bytes(name.encode(), "track") % 2**64) / 2**64 for name in NAMES}


def shadow(track: str, number: int, start: float, stop: float) -> Shadow:
    made = served(100)
    made.state = made.state._replace(version=number)
    return Shadow(track, Interval(start, stop), made)


WIDE, DEEP = shadow("wide", NUMBERS + 1, 0.0, 0.3), shadow("deep", 2 * NUMBERS + 1, 0.3, 0.5)


def answered(*shadows: Shadow, trial: Trial | None = None, max_bytes: int = MAX_BYTES) -> Answers:
    return answer_requests(
        records(NAMES),
        CHAMPION,
        trial=trial,
        shadows=shadows,
        worker="w",
        max_candidates=10,
        max_bytes=max_bytes,
        now_ms=lambda: 5_000,
    )


def values(answers: Answers) -> dict[str, Any]:
    return {(found := json.loads(value or b""))["request_id"]: found for _, value, _ in answers.records}


def test_requests_are_chosen_by_a_documented_hash() -> None:
    assert positions(NAMES, "track").tolist() == pytest.approx([AT[name] for name in NAMES])
    assert positions([], "track").tolist() == []
    one, two = in_share(NAMES, 0.3), positions(NAMES, "track") < 0.3
    assert (one != two).any(), "a trial of a version gets other requests than a track"


def test_each_track_scores_its_interval_and_the_champion_answers() -> None:
    answers = answered(WIDE, DEEP)
    found = values(answers)
    for name in NAMES:
        beside = NUMBERS + 1 if AT[name] < 0.3 else 2 * NUMBERS + 1 if AT[name] < 0.5 else None
        assert found[name]["model_version"] == 7 and found[name].get("shadow_version") == beside
        assert all(("shadow" in score) == (beside is not None) and score["score"] < 0.01 for score in found[name]["scores"])
        assert all(score.get("shadow", 0.1) == pytest.approx(0.1) for score in found[name]["scores"])
    assert answers.by_shadow == {
        "wide": ShadowCount(sum(at < 0.3 for at in AT.values()), 0),
        "deep": ShadowCount(sum(0.3 <= at < 0.5 for at in AT.values()), 0),
    }
    assert answers.by_champion == answers.candidates and not answers.by_candidate


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_version_on_trial_goes_first(mode: Mode) -> None:
    found = values(answered(WIDE, trial=Trial(mode, 0.4, CANDIDATE)))
    for name, tried in zip(NAMES, in_share(NAMES, 0.4).tolist(), strict=True):
        answer = found[name]
        if tried:
            assert (answer["model_version"], answer.get("shadow_version")) == ((7, 9) if mode == "shadow" else (9, None))
        else:
            assert answer.get("shadow_version") == (NUMBERS + 1 if AT[name] < 0.3 else None)


def test_a_challenger_that_fails_costs_nothing() -> None:
    class Broken:
        def predict(self, batch: object) -> None:
            raise RuntimeError("damaged")

    broken = shadow("wide", NUMBERS + 1, 0.0, 0.3)
    damaged: Any = Broken()
    broken.served.predictor = damaged
    answers = answered(broken, DEEP)
    assert all("error" not in each for each in values(answers).values())
    assert answers.by_shadow["wide"].scored == 0 < answers.by_shadow["wide"].missed and answers.by_shadow["deep"].missed == 0


def test_what_is_noted_beside_never_makes_an_answer_too_large() -> None:
    whole = max(len(value or b"") for _, value, _ in answered().records)
    small = values(answered(WIDE, max_bytes=whole + 900))
    assert all("error" not in each for each in small.values())
