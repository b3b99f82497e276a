"""What `headrace model compare` shows, from registries and heartbeats that are made up."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploy.cli.model_tracks_view import compared_json, print_compared
from state.comparison import Comparison, ServedSide
from state.gate_report import GateReport
from state.registry import Champion, RegistryState, TrainerLease, VersionRecord
from state.tracks import MAIN, NUMBERS, Serving, Track, Turn
from stream.errors import RegistryError
from stream.records.heartbeat import Heartbeat, ShadowBeat
from stream.registry.track_operations import TracksSeen

NOW = 1_700_000_000_000


def registry(version: int, comparison: Comparison | None = None, **verdict: Any) -> RegistryState:
    record = VersionRecord(version=version, created_at_ms=NOW - 8_000, verdict=GateReport(line=1, **verdict))
    state = RegistryState({version: record}, Champion(version=version), TrainerLease(epoch=1, who="trainer@t"))
    state.comparison = comparison or Comparison()
    return state


def compared(**changed: Any) -> Comparison:
    return Comparison(
        of="op/",
        against=MAIN,
        since_ms=NOW - 60_000,
        at_ms=NOW - 2_000,
        impressions=61_204.0,
        clicks=1_903.0,
        track=ServedSide(log_loss=0.1334, normalised_entropy=0.8619, auc=0.7351, calibration=0.9987),
        serving=ServedSide(log_loss=0.1342, normalised_entropy=0.8671, auc=0.7322, calibration=1.0012),
        change=-0.006,
        error=0.0015,
        **changed,
    )


def seen(comparison: Comparison | None = None, *, share: float = 0.05, shadow: ShadowBeat | None = None) -> TracksSeen:
    main = registry(41)
    main.tracks["wide"] = Track(
        name="wide",
        number=1,
        share=share,
        share_at_ms=NOW - 90_000,
        share_who="ann",
        share_reason="wider",
        share_operation="op",
    )
    beat = Heartbeat(
        worker="s1",
        version=41,
        since_ms=0,
        host="h",
        registry_offset=9,
        at_ms=NOW,
        weights_age_ms=310,
        shadows=(shadow or ShadowBeat("wide", NUMBERS + 7, 3, 290),),
    )
    return TracksSeen(main, {MAIN: main, "wide": registry(NUMBERS + 7, comparison)}, [beat])


def shown(found: TracksSeen, capsys: pytest.CaptureFixture[str], name: str | None = None) -> tuple[dict[str, Any], str]:
    document = compared_json(found, name, NOW)
    json.dumps(document, allow_nan=False)
    print_compared(document)
    return document, capsys.readouterr().out


def test_both_sides_the_interval_the_ages_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    document, text = shown(seen(compared()), capsys)
    (challenger,) = document["challengers"]
    assert (challenger["verdict"], challenger["ready"], challenger["weights_age_ms"]) == ("better", ["s1"], 290)
    assert challenger["low"] == pytest.approx(-0.00894) and challenger["high"] == pytest.approx(-0.00306)
    assert document["serving"]["weights_age_ms"] == 310 and challenger["newest_age_ms"] == 8_000
    lines = text.splitlines()
    assert lines[0].startswith("main serves; newest version 41, 8") and lines[0].endswith("1 live scorers")
    assert any(line.split()[:5] == ["wide", "0.1334", "0.8619", "0.7351", "0.9987"] for line in lines)
    assert any(line.split()[:5] == ["main", "0.1342", "0.8671", "0.7322", "1.0012"] for line in lines)
    assert "61,204 impressions that both have scored, 1,903 clicks" in text and "ready in 1 of 1 scorers" in text
    assert lines[-1] == ("wide predicts better than main: -0.60 % log loss (95 % interval -0.89 to -0.31 %) over 1,903 clicks.")


def test_figures_of_an_earlier_share_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    document, text = shown(seen(Comparison(of="older/", impressions=9.0)), capsys)
    assert document["challengers"][0]["comparison"] is None and document["challengers"][0]["verdict"] == "nothing"
    assert "No impression that both tracks have scored has its label yet" in text


def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    document, text = shown(seen(share=0.0), capsys)
    assert document["challengers"][0]["verdict"] == "no_share" and "`headrace model shadow wide --share 5%`" in text
    _, text = shown(seen(shadow=ShadowBeat("wide", problem="expected room for 1 MB")), capsys)
    assert "ready in 0 of 1 scorers" in text and "scorer s1: expected room for 1 MB" in text
    found = seen()
    withheld = registry(NUMBERS + 7, flow="withheld", reason="log loss +3 %")
    _, text = shown(TracksSeen(found.main, {MAIN: found.main, "wide": withheld}, []), capsys)
    assert "its gate withholds its versions: log loss +3 %" in text
    _, text = shown(TracksSeen(found.main, {MAIN: found.main}, []), capsys)
    assert "no version yet" in text


def test_after_a_promotion_the_former_track_is_the_challenger(capsys: pytest.CaptureFixture[str]) -> None:
    found = seen()
    turn = Turn(track="wide", previous=MAIN, who="ann", at_ms=NOW - 5_000, reason="better", operation="t")
    found.main.serving = Serving(track="wide", turns=(turn,))
    document, text = shown(found, capsys)
    assert [each["track"] for each in document["challengers"]] == [MAIN]
    assert text.startswith("wide serves since ") and "(ann: better)" in text.splitlines()[0]
    assert document["serving"]["scorers"] == 0, "the scorer still answers with main"


def test_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(compared_json(seen(), "wide", NOW)["challengers"]) == 1
    for name, words in ((MAIN, "found the track that serves"), ("deep", "found none of that name")):
        with pytest.raises(RegistryError, match=words):
            compared_json(seen(), name, NOW)
    alone = registry(41)
    _, text = shown(TracksSeen(alone, {MAIN: alone}, []), capsys)
    assert "There is no challenger." in text
