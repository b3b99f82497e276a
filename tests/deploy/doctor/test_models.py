"""The doctor's checks of models and scorers, over readings that are made up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import pytest

from deploy.doctor.examination import examine
from deploy.doctor.finding import Finding
from deploy.doctor.readings import Challenger, LogReading, Readings
from state.registry import Champion, RegistryState, VersionRecord
from state.rewinds import Rewind, Rewinds
from state.settings import SnapshotSettings
from state.tracks import Track
from stream.records.heartbeat import Heartbeat, ShadowBeat
from tests.deploy.doctor.test_doctor import NOW, healthy, only
from tests.judged import judged

MINUTE = 60_000


def registry(champion: int | None = 40, versions: int = 40, *, age_ms: int = 5_000, **alias: Any) -> RegistryState:
    """Versions five seconds and a thousand examples apart, the newest announced `age_ms` ago."""
    announced = {number: NOW - age_ms - 5_000 * (versions - number) for number in range(1, versions + 1)}
    return RegistryState(
        versions={
            number: VersionRecord(
                version=number, announced_at_ms=at_ms, examples_seen=1_000 * number, who="trainer@t", gate=f"gate of {number}"
            )
            for number, at_ms in announced.items()
        },
        champion=Champion(version=champion, at_ms=announced.get(champion or 0, 0), **alias),
    )


def with_metrics(**metrics: float) -> Readings:
    state = registry()
    state.versions[40] = msgspec.structs.replace(state.versions[40], metrics=metrics)
    return healthy(registry=state)


def beat(**changed: Any) -> Heartbeat:
    fields: dict[str, Any] = dict(worker="s1", version=40, since_ms=0, host="h1", registry_offset=9, at_ms=NOW)
    return Heartbeat(**(fields | changed))


def check_of(readings: Readings) -> list[str]:
    return [finding.check for finding in examine(readings)]


def challenger(counted_ms: int) -> Challenger:
    track = Track(name="wide", number=1, share=0.05, share_at_ms=NOW - 60 * MINUTE)
    return Challenger(track, counted_ms)


def test_a_challenger_that_nobody_counts_or_scores() -> None:
    ready = beat(shadows=(ShadowBeat("wide", 100_000_001, 3, 200),))
    assert examine(healthy(registry=registry(), scorers=[ready], challengers=[challenger(NOW - 6_000)])) == []
    for counted_ms, words in ((0, "never, for 0.05"), (NOW - 5 * MINUTE, "last at")):
        found = only(healthy(registry=registry(), scorers=[ready], challengers=[challenger(counted_ms)]))
        assert (found.check, found.what) == ("challengers", "track wide") and found.found.startswith(words)
        assert "headrace run trainer --track wide" in found.cure
    without = beat(shadows=(ShadowBeat("wide", problem="expected room, found none"),))
    found = only(healthy(registry=registry(), scorers=[without], challengers=[challenger(NOW)]))
    assert found.found == "its share isn't scored here: expected room, found none" and "scorer.spare_mb" in found.cure


def test_a_healthy_model() -> None:
    assert examine(healthy(registry=registry(), scorers=[beat()])) == []


def test_a_champion_that_versions_pass_by() -> None:
    found = only(healthy(registry=registry(champion=20)))
    assert (found.check, found.what) == ("champion", "champion 20")
    assert found.found.endswith("20 versions have been announced since, with 20,000 more examples. The newest, 40: gate of 40")
    assert "headrace snapshot promote 40" in found.cure
    assert check_of(healthy(registry=registry(champion=21))) == []
    # Few versions, long ago.
    slow = registry(champion=38)
    slow.champion = msgspec.structs.replace(slow.champion, at_ms=NOW - 11 * MINUTE)
    assert check_of(healthy(registry=slow)) == ["champion"]


def test_a_champion_that_nothing_should_replace() -> None:
    """Nothing new was learned, somebody holds it, or promotion is by hand: that is no fault."""
    still = registry(champion=1)
    still.versions = {each: msgspec.structs.replace(record, examples_seen=7) for each, record in still.versions.items()}
    assert check_of(healthy(registry=still)) == []
    held = registry(champion=1, hold=True, hold_at_ms=NOW - 59 * MINUTE, hold_who="me", hold_reason="a sale")
    assert check_of(healthy(registry=held)) == []
    by_hand = SnapshotSettings(auto_promote=False)
    assert check_of(healthy(registry=registry(champion=1), snapshots=by_hand)) == []


def judged_registry(**changed: Any) -> RegistryState:
    """A champion that 39 versions have passed by, with what the gate says of the newest."""
    state = registry(champion=1)
    state.versions[40] = msgspec.structs.replace(state.versions[40], verdict=judged(**changed))
    return state


def test_versions_withheld_for_long() -> None:
    said: dict[str, Any] = dict(
        flow="withheld", reason="worse than version 7's", anchor=7, loss_change=0.071, compared_clicks=600
    )
    found = only(healthy(registry=judged_registry(**said, since_ms=NOW - 31 * MINUTE)))
    assert (found.check, found.what) == ("gate", "champion 1")
    assert found.found.endswith("Z: worse than version 7's; compared with version 7, log loss +7.1% over 600 clicks")
    assert check_of(healthy(registry=judged_registry(**said, since_ms=NOW - 29 * MINUTE))) == [], "it may recover"
    assert check_of(healthy(registry=judged_registry(since_ms=NOW - 31 * MINUTE))) == ["champion"], "versions flow"


def test_a_version_whose_scores_do_not_vary() -> None:
    state = registry()
    state.versions[40] = msgspec.structs.replace(state.versions[40], verdict=judged(problems=("scores don't vary: 1e-9",)))
    found = only(healthy(registry=state))
    assert (found.check, found.what, found.found) == ("versions", "version 40", "scores don't vary: 1e-9")


def test_no_champion_at_all() -> None:
    assert check_of(healthy(registry=registry(champion=None))) == []  # three minutes: the first comes soon
    found = only(healthy(registry=registry(champion=None, versions=200)))
    assert (found.check, found.what) == ("champion", "no champion")
    assert found.found == "200 versions announced, none promoted; the newest, 200: gate of 200"


def test_a_hold_that_was_forgotten() -> None:
    held = registry(hold=True, hold_at_ms=NOW - 61 * MINUTE, hold_who="me@host", hold_reason="a sale")
    found = only(healthy(registry=held))
    assert found.check == "hold" and found.found.endswith("by me@host: a sale") and "headrace snapshot resume" in found.cure


@pytest.mark.parametrize(("value", "count", "found"), [(1.3, 1_000, True), (0.7, 1_000, True), (1.2, 1_000, False)])
def test_served_predictions_out_of_band(value: float, count: int, found: bool) -> None:
    readings = with_metrics(served_calibration=value, served_examples=count)
    assert check_of(readings) == ["calibration"] * found
    assert check_of(with_metrics(served_calibration=value, served_examples=999)) == []
    assert check_of(with_metrics(served_calibration=math.nan, served_examples=count)) == []
    if found:
        assert only(readings).found == f"{value:.3g} over the last 1,000 impressions with a score"


def test_served_scores_that_got_worse() -> None:
    found = only(with_metrics(served_alarm=1.0, served_block_ne=1.04, served_history_ne=0.81))
    assert found.check == "served"
    assert found.found == "3 or more in a row that aren't; the newest has a normalised entropy of 1.04, those before 0.81"
    assert check_of(with_metrics(served_alarm=0.0, served_block_ne=0.82, served_history_ne=0.81)) == []


@pytest.mark.parametrize(
    ("age_ms", "up_to", "found"), [(6 * MINUTE, None, True), (4 * MINUTE, None, False), (9 * MINUTE, 39, False)]
)
def test_a_trainer_that_does_not_go_back(age_ms: int, up_to: int | None, found: bool) -> None:
    state = registry()
    asked = Rewind(version=30, who="ann", at_ms=NOW - age_ms, reason="poisoned", operation="one", up_to=up_to)
    state.rewinds = Rewinds(rewinds=(asked,))
    findings = examine(healthy(registry=state))
    assert [each.check for each in findings] == ["rewind"] * found
    if found:
        assert findings[0].found.endswith("when ann asked for it: poisoned")


def test_skew() -> None:
    figures = dict(skew_examples=400, skew_share=0.25, skew_logit_mean=0.31, skew_logit_p99=1.8)
    found = only(with_metrics(**figures))
    assert (found.check, found.what) == ("skew", "score requests against impressions")
    assert found.found.startswith("25.0% of 400 differ by more than 0.02 in the logit, on average by 0.31, 99 %")
    assert check_of(with_metrics(**(figures | dict(skew_examples=99)))) == []
    assert check_of(with_metrics(**(figures | dict(skew_share=0.01)))) == []


def test_scorers_that_do_not_serve_the_champion() -> None:
    def found(**changed: Any) -> Finding:
        return only(healthy(registry=registry(), scorers=[beat(worker="s0"), beat(**changed)]))

    fallback = found(version=38, fallback_of=40, fallback_reason="a broken file")
    assert (fallback.check, fallback.what, fallback.expected) == ("scorers", "scorer s1 on h1", "the champion, version 40")
    assert fallback.found == "it answers with version 38, since it can't read the champion: a broken file"
    assert "headrace snapshot verify 40" in fallback.cure
    without = found(version=-1, fallback_of=40, fallback_reason="no such store")
    assert without.found.startswith("it has no version and takes no requests, since it can't read the champion: no such store")
    assert found(stale=True).found.startswith("it has read the registry only up to offset 9")
    without = found(version=40, candidate_problem="expected room for 151 MB")
    assert without.found == "the champion answers its share: expected room for 151 MB"
    behind = found(version=40, delta=7, problem="wrong_digest: expected another")
    assert behind.found == "it answers with version 40 and 7 deltas, and goes no further: wrong_digest: expected another"


def silent(age_ms: int, **changed: Any) -> Readings:
    """Examples arrived half of `age_ms` after the newest version, which knows of none of them."""
    fields: dict[str, Any] = dict(
        registry=registry(age_ms=age_ms),
        logs=dict(healthy().logs) | {("examples", 0): LogReading(0, 300, 300)},
        arrivals=dict(healthy().arrivals) | {("examples", 0, 200): NOW - age_ms // 2},
        snapshots=SnapshotSettings(interval_ms=5_000),
    )
    return healthy(**(fields | changed))


def test_a_trainer_that_publishes_nothing() -> None:
    found = only(silent(10 * MINUTE))
    assert (found.check, found.what) == ("publishing", "trainer, newest version 40")
    assert found.found == "the last one was announced 10 m ago, by trainer@t"
    assert check_of(silent(50_000)) == []
    assert check_of(silent(10 * MINUTE, arrivals=healthy().arrivals)) == [], "nothing came since"
    assert check_of(silent(10 * MINUTE, members={"join": 1, "trainer": 0, "scorer": 1})) == ["lag"], "none runs"


def test_a_trainer_is_as_far_as_its_newest_delta() -> None:
    """With a version a minute, everything since the last one would look as if it waited."""
    waiting = healthy(
        trainer={0: 100, 1: 200},
        arrivals=dict(healthy().arrivals) | {("examples", 0, 100): NOW - 5 * MINUTE, ("examples", 0, 150): NOW - 4 * MINUTE},
    )
    assert check_of(waiting) == ["lag"]
    assert check_of(dataclasses.replace(waiting, learned={0: 200, 1: 200})) == []
    assert check_of(dataclasses.replace(waiting, learned={0: 150, 1: 200})) == ["lag"]


def test_a_trainer_with_rare_versions_is_not_behind() -> None:
    rare = SnapshotSettings(interval_ms=5 * MINUTE)
    assert check_of(silent(8 * MINUTE, snapshots=rare)) == []
    assert check_of(silent(60 * MINUTE, snapshots=rare)) == ["publishing"]
