"""Served scores are computed again from the impressions' features: alike where both sides agree, and found where they don't."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.errors import SnapshotError
from state.manifest import Manifest
from state.registry import RegistryState, VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.scorer.answers import answer_requests
from stream.scorer.serving import load_version
from stream.trainer import skew as module
from stream.trainer.batching import BatchCutter
from stream.trainer.columns import ExampleColumns
from stream.trainer.examples import ExampleDecoder
from stream.trainer.skew import RELOAD_S, Skew, SkewCheck, load_reference
from tests.stream.scorer.factory import record as request_record
from tests.stream.trainer.factory import metrics, record, run

SCHEMA = FeatureSchema(
    fields=(
        FieldSpec(name="user"),
        FieldSpec(name="item"),
        FieldSpec(name="price", kind="numeric"),
        FieldSpec(name="wait_s", kind="numeric", buckets="scaled"),
        FieldSpec(name="tags", kind="list"),
    ),
    embedding_dim=4,
)
MODEL = ModelSettings(hidden=(8,), initial_rows=16, init_std=0.5, row_history=False, cross_layers=0)
Features = dict[str, Any]


def features(index: int) -> Features:
    return {
        "user": f"u{index % 23}",
        "item": f"i{index * 7 % 31}",
        "price": 5 + index % 19,
        "wait_s": 0.5 * (index % 11),
        "tags": [f"t{index % 3}", f"t{index % 5}"],
    }


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    """Versions 1 and 2, of different weights, learned from a tenth of the negatives."""
    found = SnapshotStore(SnapshotSettings(url=str(tmp_path / "snapshots")))
    learner = Learner(SCHEMA, MODEL, device="cpu")
    learner.negative_rate = 0.1
    decoder = ExampleDecoder(SCHEMA)
    for version in (1, 2):
        for _ in range(3):
            learned = examples(decoder, [features(index) for index in range(300)], {})
            learner.learn(learned.batch, (np.arange(300) % 23 < 8).astype(np.float32))
        manifest = Manifest(
            version=version,
            created_at_ms=version,
            negative_rate=0.1,
            schema_hash=SCHEMA.fingerprint(),
            features=SCHEMA.model_dump(mode="json"),
            model=MODEL.model_dump(mode="json"),
        )
        found.write(manifest, learner.serving_state(), None)
    return found


def examples(
    decoder: ExampleDecoder,
    shown: list[Features],
    answers: dict[int, tuple[float, int]],
    deltas: Callable[[int], int | None] = lambda index: 0,
) -> ExampleColumns:
    """Impressions as they come to the trainer; `answers` are the score and version of some of them, `deltas` their `delta`."""
    records = []
    for index, each in enumerate(shown):
        event: dict[str, Any] = {"impression_id": f"x{index}", "timestamp": 1_700_000_000_000, "features": each}
        if index in answers:
            event["score"], event["model_version"] = answers[index]
            if (delta := deltas(index)) is not None:
                event["delta"] = delta
        records.append(record(index, json.dumps(event).encode()))
    cutter = BatchCutter(len(records), {0: 0})
    cutter.add(decoder.decode(run(records)))
    return cutter.cut()


def asked(store: SnapshotStore, version: int, sent: list[Features]) -> dict[int, tuple[float, int]]:
    """What a scorer answers to requests with these features, a candidate each; user and tags stand in the context."""
    served = load_version(store, version, device="cpu")
    requests = []
    for index, each in enumerate(sent):
        context = {name: each[name] for name in ("user", "tags") if name in each}
        own = {name: value for name, value in each.items() if name not in context}
        request = {"request_id": f"r{index}", "context": context, "candidates": [{"id": "c", "features": own}]}
        requests.append(request_record(json.dumps(request).encode(), f"r{index}".encode(), index))
    answers = answer_requests(requests, served, worker="w", max_candidates=9, max_bytes=1 << 20)
    found = {}
    for key, value, _ in answers.records:
        answer = msgspec.json.decode(value or b"")
        assert key is not None
        found[int(key[1:])] = (answer["scores"][0]["score"], answer["model_version"])
    return found


def check_of(store: SnapshotStore) -> SkewCheck:
    return SkewCheck(lambda version: load_reference(store, version, SCHEMA), scored_by, metrics())


def scored_by(version: int, delta: int) -> int | None:
    """Version 1 is no point of a chain, version 2 is one, others aren't known."""
    versions = {1: VersionRecord(version=1), 2: VersionRecord(version=2, chain="deepfm/1/0", sequence=40)}
    return RegistryState(versions=versions).version_that_scored(version, delta)


def observe(check: SkewCheck, batch: ExampleColumns) -> None:
    check._since_s -= 60  # it may take all of them
    check.observe(batch, np.zeros(len(batch), np.float32))


def compared(store: SnapshotStore, change: Callable[[Features], Features]) -> Skew:
    """Impressions carry `features`, the scoring service sends what `change` makes of them."""
    shown = [features(index) for index in range(190)]
    answers = asked(store, 2, [change(each) for each in shown])
    check = check_of(store)
    observe(check, examples(ExampleDecoder(SCHEMA), shown, answers))
    check.check(1_000.0)
    found = check.figures()
    assert found is not None and found.examples == len(shown)
    return found


def test_the_same_features_give_the_same_logits(store: SnapshotStore) -> None:
    found = compared(store, lambda each: each)
    assert found.mean < 1e-3 and found.p99 < 1e-3 and found.share == 0


@pytest.mark.parametrize(
    ("cause", "change"),
    [
        ("another unit", lambda each: {**each, "price": each["price"] * 100}),
        ("seconds and milliseconds", lambda each: {**each, "wait_s": each["wait_s"] * 1_000}),
        ("a default", lambda each: {**each, "item": "unknown"}),
        ("left out", lambda each: {name: value for name, value in each.items() if name != "tags"}),
        ("an id as another type", lambda each: {**each, "user": each["user"].upper()}),
    ],
)
def test_a_feature_that_is_sent_otherwise_is_found(store: SnapshotStore, cause: str, change: Any) -> None:
    found = compared(store, change)
    assert found.share > 0.2 and found.p99 > module.BOUND, cause


def test_a_feature_that_differs_now_and_then_is_found_by_its_share(store: SnapshotStore) -> None:
    found = compared(store, lambda each: {**each, "item": "unknown"} if each["price"] == 5 else each)
    assert 0.01 < found.share < 0.1 and found.mean < 0.1


def test_what_was_not_served_and_corrections_are_not_compared(store: SnapshotStore) -> None:
    shown = [features(index) for index in range(10)]
    check = check_of(store)
    unscored = examples(ExampleDecoder(SCHEMA), shown, {})
    observe(check, unscored)
    scored = examples(ExampleDecoder(SCHEMA), shown, asked(store, 1, shown))
    corrected = replace(scored, corrects=np.ones(10, np.bool_))
    observe(check, corrected)
    check.check(1_000.0)
    assert check.figures() is None and check.manifest_metrics() == {}


@pytest.mark.parametrize(
    ("version", "delta", "compared"),
    [
        (2, 0, 10),
        (2, 1, 0),
        (2, 240, 0),
        (2, None, 0),
        (1, 0, 10),
        (1, None, 10),
        (1, 3, 0),  # `delta` counts, whatever the registry says
    ],
)
def test_only_scores_that_a_version_itself_gave_are_compared(
    store: SnapshotStore, version: int, delta: int | None, compared: int
) -> None:
    shown = [features(index) for index in range(10)]
    check = check_of(store)
    observe(check, examples(ExampleDecoder(SCHEMA), shown, asked(store, version, shown), lambda index: delta))
    check.check(1_000.0)
    found = check.figures()
    assert (0 if found is None else found.examples) == compared
    assert found is None or found.p99 < 1e-3


def test_weights_that_deltas_have_changed_are_no_skew(store: SnapshotStore) -> None:
    """Half of the answers came from weights beyond the version, which is announced as theirs: what they say isn't compared."""
    shown = [features(index) for index in range(190)]
    before, beyond = (asked(store, version, shown) for version in (1, 2))
    answers = {index: (before[index][0], 1) if index % 2 else (beyond[index][0], 1) for index in range(190)}
    check = check_of(store)
    observe(check, examples(ExampleDecoder(SCHEMA), shown, answers, lambda index: 0 if index % 2 else 5))
    check.check(1_000.0)
    found = check.figures()
    assert found is not None and (found.examples, found.share) == (95, 0) and found.p99 < 1e-3


def test_the_sample_is_drawn_from_rows_that_can_be_compared(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One impression in 16 comes from the version itself: the others take nothing of the 100 rows a second."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    shown = [features(index) for index in range(128)]
    batch = examples(ExampleDecoder(SCHEMA), shown, dict.fromkeys(range(128), (0.5, 2)), lambda index: index % 16)
    check = check_of(store)
    for _ in range(2_000):  # four seconds of 500 batches each
        clock.now += 0.002
        check.observe(batch, np.zeros(128, np.float32))
    assert 0.9 * 4 * module.ROWS_S < check._rows <= 4 * module.ROWS_S


def test_one_version_is_read_at_a_time_and_the_one_that_is_served_follows(store: SnapshotStore) -> None:
    asked_for: list[int] = []

    def load(version: int) -> Any:
        asked_for.append(version)
        return load_reference(store, version, SCHEMA)

    check = SkewCheck(load, scored_by, metrics())
    shown = [features(index) for index in range(40)]
    decoder = ExampleDecoder(SCHEMA)
    first, second = (examples(decoder, shown, asked(store, version, shown)) for version in (1, 2))
    observe(check, first)
    check.check(1_000.0)
    for later in (1.0, RELOAD_S - 1):
        observe(check, second)
        check.check(1_000.0 + later)
    found = check.figures()
    assert asked_for == [1] and found is not None and found.examples == 40, "rows of the other version wait"
    check.check(1_000.0 + RELOAD_S)
    found = check.figures()
    assert asked_for == [1, 2] and found is not None and found.examples == 120 and found.p99 < 1e-3
    assert check.manifest_metrics()["skew_examples"] == 120 and check.manifest_metrics()["skew_share"] == 0


def test_a_version_that_takes_long_to_read_is_read_seldom(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    asked_for: list[int] = []

    def load(version: int) -> Any:
        asked_for.append(version)
        clock.now += 3.0
        return load_reference(store, version, SCHEMA)

    check = SkewCheck(load, scored_by, metrics())
    shown = [features(index) for index in range(40)]
    decoder = ExampleDecoder(SCHEMA)
    first, second = (examples(decoder, shown, asked(store, version, shown)) for version in (1, 2))
    observe(check, first)
    check.check(1_000.0)
    observe(check, second)
    check.check(1_000.0 + 3 * 100 - 1)
    assert asked_for == [1]
    check.check(1_000.0 + 3 * 100)
    assert asked_for == [1, 2]


def test_a_version_that_cannot_be_read_is_passed_over(store: SnapshotStore, caplog: pytest.LogCaptureFixture) -> None:
    shown = [features(index) for index in range(40)]
    answers = {index: (0.5, 9 if index < 30 else 1) for index in range(40)}
    check = check_of(store)
    batch = examples(ExampleDecoder(SCHEMA), shown, answers)
    observe(check, batch)
    check.check(1_000.0)
    assert "scores of version 9 can't be computed again: version 9: expected a whole version" in caplog.text
    check.check(1_000.0 + RELOAD_S)
    found = check.figures()
    assert found is not None and found.examples == 10 and found.share > 0.5


def test_a_reference_is_what_was_announced_of_this_schema_and_not_too_large(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = VersionRecord(version=1, created_at_ms=1)
    assert load_reference(store, 1, SCHEMA, announced=announced).negative_rate == 0.1
    with pytest.raises(SnapshotError, match="expected the one announced"):
        load_reference(store, 1, SCHEMA, announced=msgspec.structs.replace(announced, created_at_ms=5))
    with pytest.raises(
        SnapshotError, match=r"expected the trainer's feature schema or a part of it, found another: .* is gone"
    ):
        load_reference(store, 1, FeatureSchema(fields=SCHEMA.fields[:2], embedding_dim=4))
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(SnapshotError, match="expected at most 10 bytes of weights, found"):
        load_reference(store, 1, SCHEMA)


def test_what_waits_is_bounded_and_old_differences_are_forgotten(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 100)
    monkeypatch.setattr(module, "WINDOW", 150)
    shown = [features(index) for index in range(60)]
    batch = examples(ExampleDecoder(SCHEMA), shown, asked(store, 1, shown))
    check = check_of(store)
    for _ in range(5):
        observe(check, batch)
    assert check._rows == 60, "what would go beyond the bound makes the oldest fall out"
    for turn in range(5):
        observe(check, batch)
        check.check(1_000.0 + turn)
        found = check.figures()
        assert found is not None and found.examples <= 150 + 60
    check.check(1_000.0 + 10_000)
    assert check.figures() is None


def test_training_pays_for_few_rows_at_any_speed(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full speed most batches are passed over after a look at the clock."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    shown = [features(index) for index in range(128)]
    batch = examples(ExampleDecoder(SCHEMA), shown, dict.fromkeys(range(128), (0.5, 1)))
    check = check_of(store)
    for _ in range(2_000):  # four seconds of 500 batches each
        clock.now += 0.002
        check.observe(batch, np.zeros(128, np.float32))
    assert 0.9 * 4 * module.ROWS_S < check._rows <= 4 * module.ROWS_S


def test_an_answer_between_two_versions_is_compared_with_the_later_one_where_it_is_that_very_point(
    store: SnapshotStore,
) -> None:
    """A scorer that follows the chain is past version 1 by the time version 2 is announced, and answers with both steps."""
    versions = {number: VersionRecord(version=number, chain="deepfm/1/0", sequence=240 * number) for number in (1, 2)}
    state = RegistryState(versions=versions)
    check = SkewCheck(lambda version: load_reference(store, version, SCHEMA), state.version_that_scored, metrics())
    shown = [features(index) for index in range(40)]
    answers = {index: (score, 1) for index, (score, _) in asked(store, 2, shown).items()}  # by the weights of version 2
    observe(check, examples(ExampleDecoder(SCHEMA), shown, answers, lambda index: 240 if index < 30 else 239))
    check.check(1_000.0)
    found = check.figures()
    assert found is not None and found.examples == 30 and found.p99 < 1e-3


def test_which_version_scored() -> None:
    on = {number: VersionRecord(version=number, chain="deepfm/1/0", sequence=10 * number) for number in (1, 2)}
    other = {3: VersionRecord(version=3, chain="deepfm/2/0", sequence=30), 4: VersionRecord(version=4)}
    state = RegistryState(versions=on | other)
    asked_for = {
        (1, 0): 1,
        (1, 10): 2,
        (1, 9): None,
        (1, 20): None,
        (1, -1): None,
        (4, -1): 4,
        (4, 3): None,
        (9, 0): 9,
        (9, -1): None,
    }
    assert {each: state.version_that_scored(*each) for each in asked_for} == asked_for
