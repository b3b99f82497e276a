"""The trainer's side of a shadow or canary: which examples count for whom, what a restart keeps, and what is entered when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from state.canary import Canary, Mode, Progress, Thresholds
from state.canary_evidence import Evidence
from state.registry import Champion, Move, RegistryState, VersionRecord
from stream.trainer import canary as module
from stream.trainer.batching import BatchCutter
from stream.trainer.bookkeeping import from_json
from stream.trainer.canary import CanaryWatch
from stream.trainer.canary_metrics import CanaryMetrics
from stream.trainer.columns import ExampleColumns
from stream.trainer.examples import ExampleDecoder
from tests.stream.trainer.factory import SCHEMA, columns, record, run, value

RNG = np.random.default_rng(5)
NAN = float("nan")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRESS_S", 0.0)


def registry(mode: Mode = "canary", operation: str = "op", *, hold: str = "", before: str = "", **limits: Any) -> RegistryState:
    state = RegistryState(
        {number: VersionRecord(version=number) for number in (3, 4)},
        Champion(version=3, hold=bool(hold), hold_operation=hold, hold_reason="sale"),
    )
    state.canary = Canary(
        mode=mode,
        version=4,
        share=0.05,
        at_ms=1_000,
        operation=operation,
        thresholds=Thresholds(**limits),
        hold_operation=before,
    )
    return state


def batch(
    labels: Sequence[float],
    ids: Sequence[int] | None = None,
    *,
    served: Sequence[float] | None = None,
    versions: Sequence[int] | None = None,
    deltas: Sequence[int] | None = None,
    shadows: Sequence[float] | None = None,
    corrects: Sequence[bool] | None = None,
    times_ms: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
) -> ExampleColumns:
    rows = len(labels)
    hashed = np.arange(rows) if ids is None else np.asarray(ids)
    return ExampleColumns(
        batch=columns(range(rows)).batch,
        labels=np.asarray(labels, np.float32),
        weights=None,
        impression_ms=np.zeros(rows, np.int64) if times_ms is None else np.asarray(times_ms, np.int64),
        reached_ms=np.zeros(rows, np.int64),
        records=(),
        served=np.full(rows, 0.1, np.float32) if served is None else np.asarray(served, np.float32),
        versions=np.full(rows, 3) if versions is None else np.asarray(versions, np.int64),
        deltas=np.zeros(rows, np.int64) if deltas is None else np.asarray(deltas, np.int64),
        id_hashes=hashed.astype(np.int64) * 7_919 + 12_345,
        rates=None if rates is None else np.asarray(rates),
        corrects=None if corrects is None else np.asarray(corrects),
        shadow_scores=None if shadows is None else np.asarray(shadows, np.float32),
        shadow_versions=None if shadows is None else np.where(np.isnan(np.asarray(shadows)), -1, 4),
    )


def watch(state: RegistryState) -> CanaryWatch:
    made = CanaryWatch(CanaryMetrics(CollectorRegistry()))
    made.follow(state)
    return made


def learn(it: CanaryWatch, examples: ExampleColumns, live: float = 0.1) -> None:
    it.observe(examples, np.full(len(examples), live, np.float32))


def evidence(it: CanaryWatch) -> Evidence:
    found: Evidence = from_json(it.state()["evidence"], Evidence)
    return found


class Writer:
    """What is entered in the registry."""

    def __init__(self) -> None:
        self.noted: list[Progress] = []
        self.ended: list[tuple[str, str, str]] = []

    async def note_canary(self, of: str, progress: Progress) -> None:
        assert of == "op"
        self.noted.append(progress)

    async def end_canary(self, outcome: str, reason: str, *, of: str = "") -> None:
        self.ended.append((outcome, reason, of))


def test_without_a_trial_nothing_is_gathered() -> None:
    it = watch(RegistryState())
    learn(it, batch([1, 0], versions=[4, 3]))
    assert evidence(it) == Evidence()


def test_a_canarys_sides_are_told_apart_by_the_version_that_answered() -> None:
    it = watch(registry())
    learn(it, batch([0, 1], versions=[3, 3]))  # before the candidate's first example: of another time
    learn(
        it,
        batch(
            [1, 0, 0, 1, 0, 0],
            range(10, 16),
            versions=[4, 4, 3, 3, 4, -1],
            deltas=[0, -1, 0, 8, 5, 0],  # the candidate never follows deltas
            served=[0.2, 0.2, 0.1, 0.1, 0.1, 0.1],
            times_ms=[50, 60, 70, 80, 90, 90],
        ),
    )
    learn(it, batch([1, 1], [20, 21], versions=[3, 3], times_ms=[40, 55], served=[0.1, NAN]))
    found = evidence(it)
    assert (found.candidate.weight, found.candidate.clicks) == (2, 1) and found.from_ms == 50
    assert (found.champion.weight, found.champion.clicks) == (3, 1)
    assert found.candidate.predicted == pytest.approx(0.4) and found.champion.predicted == pytest.approx(0.3)


def test_a_version_that_was_champion_counts_from_when_the_canary_began() -> None:
    state = registry()
    state.versions[4] = VersionRecord(version=4, champion_at_ms=(1,))
    it = watch(state)
    learn(it, batch([1, 1, 0], versions=[4, 4, 3], times_ms=[999, 1_000, 1_001]))
    assert (evidence(it).candidate.weight, evidence(it).champion.weight) == (1, 1)


def test_a_shadow_counts_what_both_have_scored() -> None:
    it = watch(registry("shadow"))
    learn(it, batch([1, 0], versions=[4, 3]))  # no score beside
    learn(it, batch([1, 0, 0, 0], [5, 6, 7, 8], served=[0.3, 0.3, 0.3, NAN], shadows=[0.6, 0.1, NAN, 0.1]))
    found = evidence(it)
    assert (found.candidate.weight, found.champion.weight, found.candidate.clicks) == (2, 2, 1)
    assert found.candidate.predicted == pytest.approx(0.7) and found.champion.predicted == pytest.approx(0.6)


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_correction_takes_back_what_was_counted(mode: Mode) -> None:
    rows, state = 200, registry(mode)
    scores = RNG.uniform(0.1, 0.9, rows)
    given: dict[str, Any] = {"served": scores, "times_ms": [5] * rows}
    given |= {"shadows": scores**2} if mode == "shadow" else {"versions": RNG.choice([3, 4], rows)}
    last = RNG.integers(0, 2, rows).astype(float)
    late = RNG.random(rows) < 0.4
    straight, corrected = watch(state), watch(state)
    learn(straight, batch(last, **given))
    learn(corrected, batch(np.where(late, 0, last), **given))
    at = np.flatnonzero(late & (last > 0))
    again = {name: np.asarray(each)[at] for name, each in given.items()}
    # By the time of the correction, the model in training has learned the impression as a negative.
    learn(corrected, batch(np.ones(len(at)), at, corrects=[True] * len(at), **again), live=0.01)
    one, two = evidence(straight), evidence(corrected)
    assert len(at) > 10 and one.candidate.clicks > 0
    for side in ("candidate", "champion"):
        for name in ("weight", "clicks", "predicted", "loss"):
            assert getattr(getattr(two, side), name) == pytest.approx(getattr(getattr(one, side), name), rel=1e-5)
    assert two.open.candidate.clicked.d == pytest.approx(one.open.candidate.clicked.d, rel=1e-4)


def test_a_correction_whose_first_label_was_left_out_of_the_stream_adds_its_click() -> None:
    it = watch(registry("shadow"))
    learn(it, batch([0, 1], [1, 2], served=[0.2] * 2, shadows=[0.2] * 2, corrects=[False, True], rates=[0.1, 0.1]))
    found = evidence(it).candidate
    assert (found.weight, found.clicks) == (pytest.approx(11), 1), "a negative at rate 0.1 stands for ten"


def test_a_restart_goes_on_and_another_trial_begins_anew() -> None:
    state = registry("shadow")
    whole, before = watch(state), watch(state)
    parts = [
        batch(RNG.integers(0, 2, 300), range(n, n + 300), served=RNG.random(300), shadows=RNG.random(300)) for n in (0, 300)
    ]
    for part in parts:
        learn(whole, part)
    learn(before, parts[0])
    after = CanaryWatch(CanaryMetrics(CollectorRegistry()))
    after.restore(before.state())
    after.follow(state)
    learn(after, parts[1])
    one, two = evidence(whole), evidence(after)
    assert two.candidate.weight == 600 and two.candidate.loss == pytest.approx(one.candidate.loss)
    assert (two.clicks, two.difference().change) == (one.clicks, pytest.approx(one.difference().change))
    after.follow(registry("shadow", "next"))
    assert evidence(after) == Evidence(of="next", mode="shadow")


async def test_the_trial_ends_by_its_evidence() -> None:
    for shift, outcome in ((0.0, "promoted"), (3.0, "taken_back")):
        state, writer = registry("shadow", clicks=100), Writer()
        it = watch(state)
        await it.conduct(writer, state, 2_000)  # type: ignore[arg-type]
        assert [progress.verdict for progress in writer.noted] == ["0 clicks, 100 more clicks are needed"]
        assert not writer.ended
        truth = RNG.normal(-1, 1, 2_000)
        labels = RNG.random(2_000) < 1 / (1 + np.exp(-truth))
        served, shadows = (1 / (1 + np.exp(-each)) for each in (truth, truth + shift))
        learn(it, batch(labels.astype(float), served=served, shadows=shadows))
        await it.conduct(writer, state, 2_000)  # type: ignore[arg-type]
        ((ended, reason, of),) = writer.ended
        assert (ended, of) == (outcome, "op") and "clicks" in reason
        assert writer.noted[-1].candidate.examples == 2_000 and writer.noted[-1].at_ms == 2_000


async def test_time_is_over_and_what_else_ends_a_trial() -> None:
    state, writer = registry(limit_ms=5_000), Writer()
    it = watch(state)
    await it.conduct(writer, state, 5_999)  # type: ignore[arg-type]
    assert not writer.ended
    await it.conduct(writer, state, 6_000)  # type: ignore[arg-type]
    assert writer.ended[0][0] == "undecided"
    writer, state = Writer(), registry()
    move = Move(version=3, previous=4, who="", at_ms=1_001, reason="", how="rollback", operation="")
    state.champion = Champion(version=3, moves=(move,))
    await it.conduct(writer, state, 2_000)  # type: ignore[arg-type]
    assert writer.ended == [("stopped", "the champion was rolled back", "op")] and not writer.noted
    writer = Writer()
    await it.conduct(writer, RegistryState(), 2_000)  # type: ignore[arg-type]
    assert not writer.ended and not writer.noted


@pytest.mark.parametrize(("before", "ends"), [("a hold", True), ("", False), ("another hold", False)])
async def test_a_hold_set_during_the_trial_makes_the_promotion_wait(before: str, ends: bool) -> None:
    state, writer = registry("shadow", clicks=50, hold="a hold", before=before), Writer()
    it = watch(state)
    labels = (RNG.random(1_000) < 0.5).astype(float)
    learn(it, batch(labels, served=[0.5] * 1_000, shadows=[0.5] * 1_000))
    await it.conduct(writer, state, 2_000)  # type: ignore[arg-type]
    assert [outcome for outcome, _, _ in writer.ended] == (["promoted"] if ends else [])
    assert ends or writer.noted[-1].verdict.endswith("not promoted while auto-promotion is held (sale)")


async def test_progress_is_written_when_there_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    state, writer = registry(), Writer()
    it = watch(state)
    await it.conduct(writer, state, 2_000)  # type: ignore[arg-type]
    state.canary = Canary(
        **{name: getattr(state.canary, name) for name in state.canary.__struct_fields__} | {"progress": writer.noted[0]}
    )
    await it.conduct(writer, state, 3_000)  # type: ignore[arg-type]
    assert len(writer.noted) == 1
    learn(it, batch([1], versions=[4]))
    monkeypatch.setattr(module, "PROGRESS_S", 1e9)
    await it.conduct(writer, state, 4_000)  # type: ignore[arg-type]
    assert len(writer.noted) == 1, "too soon"
    monkeypatch.setattr(module, "PROGRESS_S", 0.0)
    await it.conduct(writer, state, 5_000)  # type: ignore[arg-type]
    assert len(writer.noted) == 2


def test_scores_beside_come_from_the_impressions_to_the_batch() -> None:
    records = [
        record(0, value(0, score=0.5, model_version=3, delta=2, shadow_score=0.25, shadow_version=4)),
        record(1, value(1, score=0.5, model_version=3)),
        record(2, json.dumps({"features": {}, "shadow_score": 2}).encode()),
    ]
    decoder = ExampleDecoder(SCHEMA)
    decoded = decoder.decode(run(records))
    assert [letter.path for letter in decoded.letters] == ["$.shadow_score"]
    cutter = BatchCutter(10, {0: 0})
    cutter.add(decoded)
    cutter.add(decoder.decode(run([record(3, value(3))])))  # without any
    cut = cutter.cut()
    assert cut.shadow_scores is not None and cut.shadow_scores.dtype == np.float32 and cut.shadow_versions is not None
    assert np.array_equal(cut.shadow_scores, np.array([0.25, np.nan, np.nan], np.float32), equal_nan=True)
    assert cut.shadow_versions.tolist() == [4, -1, -1] and cut.slice(1, 3).shadow_versions.tolist() == [-1, -1]
    assert decoder.decode(run([record(3, value(3))])).shadow_scores is None
