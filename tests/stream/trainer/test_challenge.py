"""What a challenger's trainer counts: pairs of its own track only, each once, with corrections taken back."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from model.errors import ModelError
from model.metrics import auc, calibration, log_loss, normalised_entropy
from state.comparison import Comparison
from state.registry import RegistryState
from state.tracks import MAIN, NUMBERS, Serving, Track, Turn
from stream.trainer import challenge as module
from stream.trainer.challenge import ChallengeWatch
from stream.trainer.challenge_metrics import ChallengeMetrics
from stream.trainer.columns import ExampleColumns
from tests.stream.trainer.factory import columns

RNG = np.random.default_rng(11)
WIDE = Track(name="wide", number=1)
NAN = float("nan")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRESS_S", 0.0)


def registry(share: float = 0.1, *, operation: str = "share", serving: str = MAIN, turn: str = "") -> RegistryState:
    state = RegistryState()
    state.tracks["wide"] = Track(name="wide", number=1, share=share, share_operation=operation)
    turns = (Turn(track=serving, previous="x", who="me", at_ms=1, reason="why", operation=turn),) if turn else ()
    state.serving = Serving(track=serving, turns=turns)
    return state


def watch(prometheus: CollectorRegistry | None = None, **changed: Any) -> ChallengeWatch:
    made = ChallengeWatch(WIDE, ChallengeMetrics(prometheus or CollectorRegistry()))
    made.follow(registry(**changed))
    return made


def batch(
    labels: Any, mine: Any, theirs: Any, *, ids: Any = None, version: int = NUMBERS + 4, corrects: Any = None, rates: Any = None
) -> ExampleColumns:
    rows = len(labels)
    hashed = np.arange(rows) if ids is None else np.asarray(ids)
    return ExampleColumns(
        batch=columns(range(rows)).batch,
        labels=np.asarray(labels, np.float32),
        weights=None,
        impression_ms=1_000 + hashed.astype(np.int64),
        reached_ms=np.zeros(rows, np.int64),
        records=(),
        served=np.asarray(theirs, np.float32),
        versions=np.full(rows, 3),
        deltas=np.zeros(rows, np.int64),
        id_hashes=hashed.astype(np.int64) * 7_919 + 12_345,
        rates=None if rates is None else np.asarray(rates),
        corrects=None if corrects is None else np.asarray(corrects),
        shadow_scores=np.asarray(mine, np.float32),
        shadow_versions=np.full(rows, version),
    )


def drawn(rows: int = 4_000) -> tuple[Any, Any, Any]:
    """Labels, scores of a challenger that knows their chances, and scores that are a little off."""
    chance = RNG.uniform(0.02, 0.6, rows)
    labels = (RNG.uniform(size=rows) < chance).astype(np.float32)
    return labels, chance.astype(np.float32), np.clip(chance * RNG.uniform(0.5, 1.6, rows), 0.01, 0.95).astype(np.float32)


def observe(watched: ChallengeWatch, *batches: ExampleColumns) -> Comparison:
    for each in batches:
        watched.observe(each, each.served)
    return watched.comparison(5)


def test_the_figures_are_those_of_the_metrics() -> None:
    labels, mine, theirs = drawn()
    parts = [slice(start, start + 500) for start in range(0, len(labels), 500)]
    found = observe(watch(), *(batch(labels[part], mine[part], theirs[part], ids=np.arange(4_000)[part]) for part in parts))
    assert (found.impressions, found.clicks, found.against) == (4_000, labels.sum(), MAIN)
    assert (found.since_ms, found.version, found.at_ms) == (1_000, NUMBERS + 4, 5)
    for side, scores in ((found.track, mine), (found.serving, theirs)):
        assert side.log_loss == pytest.approx(log_loss(scores, labels), rel=1e-5)
        assert side.normalised_entropy == pytest.approx(normalised_entropy(scores, labels), rel=1e-5)
        assert side.calibration == pytest.approx(calibration(scores, labels), rel=1e-5)
        assert side.auc == pytest.approx(auc(scores, labels), abs=1e-3)
    assert found.change is not None and found.error is not None
    assert found.change == pytest.approx(found.track.log_loss / found.serving.log_loss - 1, abs=0.01)  # type: ignore[operator]
    assert found.change + 1.96 * found.error < 0, "the better one is seen to be better"


def test_only_what_this_track_has_scored_counts() -> None:
    labels, mine, theirs = drawn(200)
    missing, unserved = mine.copy(), theirs.copy()
    missing[:50], unserved[50:70] = NAN, NAN
    found = observe(
        watch(),
        batch(labels, missing, unserved),
        batch(labels, mine, theirs, version=7),  # a version of `main` on trial
        batch(labels, mine, theirs, version=2 * NUMBERS + 1),  # another challenger
    )
    assert found.impressions == 130


def test_a_correction_takes_back_what_was_counted() -> None:
    labels, mine, theirs = drawn(1_500)
    late = np.flatnonzero(labels > 0.5)[::3]
    early = labels.copy()
    early[late] = 0
    settled = observe(watch(), batch(labels, mine, theirs))
    first = batch(early, mine, theirs)
    corrections = batch(np.ones(len(late)), mine[late], theirs[late], ids=late, corrects=np.ones(len(late), bool))
    found = observe(watch(), first, corrections)
    assert found.clicks == settled.clicks and found.impressions == settled.impressions
    for one, two in ((found.track, settled.track), (found.serving, settled.serving)):
        assert one.log_loss == pytest.approx(two.log_loss) and one.auc == pytest.approx(two.auc)
    # A correction whose first label is forgotten, or was left out, adds its click only.
    alone = observe(watch(), corrections)
    assert (alone.impressions, alone.clicks) == (len(late), len(late))


def test_a_sampled_negative_weighs_more() -> None:
    found = observe(watch(), batch([1, 0, 0], [0.5, 0.2, 0.2], [0.5, 0.3, 0.3], rates=[1.0, 0.1, 0.1]))
    assert (found.impressions, found.clicks) == (21, 1)


def test_a_restart_goes_on_with_what_was_counted() -> None:
    labels, mine, theirs = drawn(1_000)
    whole = observe(watch(), batch(labels, mine, theirs))
    before = watch()
    observe(before, batch(labels[:600], mine[:600], theirs[:600]))
    saved = before.state()
    after = ChallengeWatch(WIDE, ChallengeMetrics(CollectorRegistry()))
    after.restore(saved)
    after.follow(registry())
    found = observe(after, batch(labels[600:], mine[600:], theirs[600:], ids=np.arange(600, 1_000)))
    assert (found.impressions, found.clicks, found.since_ms) == (whole.impressions, whole.clicks, whole.since_ms)
    assert found.track.log_loss == pytest.approx(whole.track.log_loss) and found.serving.auc == pytest.approx(whole.serving.auc)
    with pytest.raises(ModelError, match="bins"):
        after.restore({name: tensor for name, tensor in saved.items() if name != "bins"})


@pytest.mark.parametrize(
    ("changed", "against"),
    [({"operation": "other"}, MAIN), ({"serving": "deep", "turn": "t"}, "deep"), ({"turn": "t"}, MAIN)],
    ids=["another share", "another track serves", "the same track serves again"],
)
def test_a_change_begins_the_comparison_anew(changed: dict[str, Any], against: str) -> None:
    watched = watch()
    observe(watched, batch([1, 0], [0.5, 0.2], [0.4, 0.3]))
    watched.follow(registry(**changed))
    found = observe(watched, batch([1], [0.5], [0.4], ids=[9]))
    assert (found.impressions, found.against) == (1, against)


@pytest.mark.parametrize("state", [registry(0.0), registry(serving="wide", turn="t"), RegistryState()])
def test_without_a_share_nothing_is_counted_saved_or_written(state: RegistryState) -> None:
    prometheus = CollectorRegistry()
    watched = watch(prometheus)
    observe(watched, batch([1, 0], [0.5, 0.2], [0.4, 0.3]))
    watched.follow(state)
    watched.observe(batch([1, 0], [0.5, 0.2], [0.4, 0.3]), np.zeros(2, np.float32))
    assert watched.state() == {}
    written: list[Comparison] = []
    asyncio.run(watched.report(_writer(written), state))
    assert not written
    assert prometheus.get_sample_value("headrace_trainer_challenge_clicks") == 0
    serves = prometheus.get_sample_value("headrace_trainer_track_serves", {"track": "wide"})
    assert serves == (1 if state.serving.track == "wide" else 0)


def test_the_figures_are_entered_in_the_tracks_own_registry() -> None:
    prometheus, written = CollectorRegistry(), list[Comparison]()
    watched = watch(prometheus)
    labels, mine, theirs = drawn(2_000)
    for start in range(0, 2_000, 200):
        part = slice(start, start + 200)
        observe(watched, batch(labels[part], mine[part], theirs[part], ids=np.arange(2_000)[part]))
    asyncio.run(watched.report(_writer(written), registry(), now_ms=77))
    (found,) = written
    assert (found.at_ms, found.clicks, found.of) == (77, labels.sum(), "share/")
    assert prometheus.get_sample_value("headrace_trainer_challenge_clicks") == labels.sum()
    change = prometheus.get_sample_value("headrace_trainer_challenge_loss_change")
    assert change == pytest.approx(found.change) and not math.isnan(change or NAN)


def _writer(written: list[Comparison]) -> Any:
    """Stands in for the writer of the track's registry."""

    async def note_comparison(comparison: Comparison) -> None:
        written.append(comparison)

    return SimpleNamespace(note_comparison=note_comparison)
