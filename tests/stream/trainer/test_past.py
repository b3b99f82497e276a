"""Examples that the weights know from history: none counts twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from state.history import History
from state.manifest import Manifest
from stream.trainer.batching import BatchCutter
from stream.trainer.evaluation import Evaluation
from stream.trainer.past import Past
from stream.trainer.training import Training
from tests.stream.trainer.factory import FIRST_MS, columns, metrics
from tests.stream.trainer.fakes import FakeLearner


def past(until: int) -> Past:
    return Past(History(source="log", examples=3, until_ms=FIRST_MS + until))


def test_what_is_at_or_before_the_cut_off_is_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    learner, counted, known = FakeLearner(), metrics(), past(9)
    training = Training(learner, BatchCutter(4, {0: 0}), Evaluation(100), counted, max_batch_age_s=1e9, past=known)
    for first in (0, 8, 16):
        training.add(columns(range(first, first + 8)))
    while training.step(0.0):
        pass
    assert learner.batches == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21]]
    assert training.positions == {0: 22}
    assert counted.past_examples._value.get() == known.skipped == 10
    assert "skipped 10 examples that were learned from log" in caplog.text


def test_a_correction_of_an_old_impression_is_skipped_too() -> None:
    """It comes among newer examples, and the label that history has is the final one."""
    run = columns(range(6))
    late = replace(run, impression_ms=np.array([12, 3, 13, 14, 9, 15]) + FIRST_MS, corrects=np.arange(6) == 1)
    found = past(9).cut(late)
    assert found.offsets.tolist() == [0, 2, 3, 5]
    assert found.after == 6 and found.corrects is not None and not found.corrects.any()
    newer = columns(range(20, 24))
    assert past(9).cut(newer) is newer


def test_the_shadow_scores_of_what_stays_stay_beside_it() -> None:
    run = replace(columns(range(4)), shadow_scores=np.arange(4, dtype=np.float32), shadow_versions=np.arange(4))
    found = past(1).cut(run)
    assert found.shadow_scores is not None and found.shadow_scores.tolist() == [2, 3]
    assert found.shadow_versions is not None and found.shadow_versions.tolist() == [2, 3]


def test_manifests_of_other_releases_can_be_read() -> None:
    history = History(source="log", examples=3, until_ms=9, fingerprint="f")
    manifest = Manifest(version=1, history=history)
    assert Manifest.decode(manifest.encode(), where="m").history == history
    before = manifest.encode().replace(b'"history"', b'"something_newer"')
    assert Manifest.decode(before, where="m").history is None
    assert Past.of(None) is None
