"""Admission and eviction of a learner: which keys have rows, what those without read, and that a restart changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import FeatureBatch
from model.errors import SnapshotMismatch, UpdateNotFinite
from model.features import FeatureDecoder
from model.learner import Learner
from model.predictor import Predictor
from model.schema import FeatureSchema, FieldSpec
from model.table_settings import TableSettings
from tests.model.made_features import impression
from tests.model.test_learner import SCHEMA, SETTINGS, assert_same, snapshot
from tests.model.test_learner_state import BATCH, LABELS

HOUR_MS = 3_600_000
START_MS = 1_700_000_000_000
PLAIN = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="item")), embedding_dim=4)
EVERYTHING = {"admit_after": 2, "evict_after_ms": 3 * HOUR_MS, "evict_below": 0.7, "half_life_ms": 2 * HOUR_MS, "max_rows": 55}


def learner_of(schema: FeatureSchema = PLAIN, **table: Any) -> Learner:
    return Learner(schema, SETTINGS, table=TableSettings(admit_memory_mb=1, **table), device="cpu")


def batch_of(users: list[int], items: list[int]) -> FeatureBatch:
    keys = np.stack([np.array(users, np.int64), np.array(items, np.int64)], axis=1)
    return FeatureBatch(keys, np.empty(0, np.int64), np.zeros(1, np.int64), lists=0)


def show(learner: Learner, users: list[int], items: list[int], hours: float = 0, corrects: bool = False) -> np.ndarray:
    """Impressions of users and items, clicked by odd users, at an hour."""
    labels = np.array(users) % 2
    times = np.full(len(users), START_MS + hours * HOUR_MS)
    return learner.learn(batch_of(users, items), labels, None, np.full(len(users), corrects), times)


def keys_of(learner: Learner) -> set[int]:
    return set(learner.serving_state()["keys"].tolist())


def test_a_value_gets_a_row_with_the_impression_that_the_setting_names() -> None:
    learner = learner_of(admit_after=3)
    for _ in range(2):
        show(learner, [1, 2, 1], [100, 101, 102])  # user 1 comes twice in a batch
    assert keys_of(learner) == {1}
    show(learner, [9], [100], corrects=True)  # a correction is no impression
    assert keys_of(learner) == {1}
    show(learner, [9], [100])
    assert keys_of(learner) == {1, 100}
    (users, items) = learner.table.fields
    assert (users.field, users.rows, users.admitted, users.refused) == ("user", 1, 1, 6)
    assert (items.field, items.rows, items.admitted, items.refused) == ("item", 1, 1, 7)


def test_values_of_crosses_get_rows_later_than_others() -> None:
    cross = FieldSpec(name="both", kind="cross", of=("user", "item"))
    schema = FeatureSchema(fields=(*PLAIN.fields, cross), embedding_dim=4)
    learner = learner_of(schema, admit_crosses_after=3)

    def show_crosses(keys: list[list[int]]) -> None:
        learner.learn(FeatureBatch(np.array(keys), np.empty(0, np.int64), np.zeros(1, np.int64), lists=0), [1.0] * len(keys))

    show_crosses([[1, 100, 7], [2, 100, 8]])
    assert keys_of(learner) == {1, 2, 100}
    show_crosses([[1, 100, 7], [1, 100, 7], [2, 100, 8]])
    assert keys_of(learner) == {1, 2, 100, 7}
    assert [each.refused for each in learner.table.fields] == [0, 0, 3]
    show_crosses([[8, 101, 8]])  # a key that occurs as two fields gets its row as the one that admits it first
    assert keys_of(learner) == {1, 2, 100, 101, 7, 8}


def test_a_batch_that_could_not_be_learned_is_no_impression() -> None:
    """Training learns its halves, and their halves, so its values come again and again."""
    learner = learner_of(admit_after=3)
    batch = batch_of([1, 2], [101, 102])
    for _ in range(3):
        with pytest.raises(UpdateNotFinite):
            learner.learn(batch, np.ones(2), np.full(2, 1e30))
    for _ in range(2):
        show(learner, [1, 2], [101, 102])
    assert learner.rows == 0
    show(learner, [1, 2], [101, 102])
    assert learner.rows == 4


def test_a_value_without_a_row_reads_the_average_and_its_label_changes_only_what_all_share() -> None:
    """The others learn as if the value had a row that begins at the average."""
    settings = SETTINGS.model_copy(update={"init_std": 1e-30})
    batch, labels = BATCH.slice(0, 40), LABELS[:40]
    times, corrects = np.arange(40) * 1000.0, np.arange(40) % 3 == 0
    plain, choosy = (Learner(SCHEMA, settings, table=TableSettings(admit_after=n), device="cpu") for n in (1, 9))
    for _ in range(3):
        plain.learn(batch, labels, None, corrects, times)
    choosy.restore(plain.serving_state(), plain.trainer_state())
    stranger = batch.take(np.arange(40))
    stranger.keys[:5, 0] = -77  # a user that nobody has seen, in five impressions of which two are corrections
    stranger.keys[5, 1] = -78
    known = keys_of(plain)
    expected = plain.predict(stranger)
    np.testing.assert_array_equal(choosy.learn(stranger, labels, None, corrects, times), expected)
    np.testing.assert_allclose(plain.learn(stranger, labels, None, corrects, times), expected, rtol=1e-5)
    assert keys_of(choosy) == known and keys_of(plain) == known | {-77, -78}
    mine, others = by_key(choosy), by_key(plain)
    for key in known:
        for name, value in mine[key].items():
            torch.testing.assert_close(value, others[key][name], rtol=1e-4, atol=1e-7)
    for name, value in choosy.serving_state().items():
        if name.startswith("mlp"):
            torch.testing.assert_close(value, plain.serving_state()[name], rtol=1e-4, atol=1e-6)


def by_key(learner: Learner) -> dict[int, dict[str, torch.Tensor]]:
    """What there is of each row."""
    state, keys = snapshot(learner), learner.serving_state()["keys"].tolist()
    names = [name for name, value in state.items() if value.dim() and len(value) == len(keys)]
    return {key: {name: state[name][at] for name in names} for at, key in enumerate(keys)}


def test_rows_that_no_impression_has_used_for_long_go_and_are_tombstones() -> None:
    learner = learner_of(evict_after_ms=10 * HOUR_MS)
    show(learner, [1, 2, 3], [101, 102, 103])
    replica = Predictor.of(PLAIN, SETTINGS, learner.serving_state(), device="cpu")
    learner.take_delta()
    for hours in range(1, 10):
        show(learner, [1], [101], hours)
    assert learner.rows == 6
    show(learner, [1], [101], 10)
    assert learner.rows == 6  # exactly ten hours old
    show(learner, [1], [101], 10.1)
    assert keys_of(learner) == {1, 101}
    delta = learner.take_delta()
    assert set(delta.gone.tolist()) == {2, 3, 102, 103}
    replica.apply(replica.prepare(delta))
    assert replica.digest == learner.digest
    asked = batch_of([2, 55, 1], [102, 66, 101])
    for scores in (learner.predict(asked), replica.predict(asked)):
        assert scores[0] == scores[1] != scores[2]  # as for values that nobody has seen
    assert [each.evicted for each in learner.table.fields] == [2, 2]


def test_what_scorers_never_had_is_no_tombstone_however_long_no_delta_is_taken() -> None:
    learner = learner_of(max_rows=20, half_life_ms=HOUR_MS)
    show(learner, [1, 2], [101, 102])
    learner.take_delta()
    for step in range(1, 200):
        show(learner, [3 * step, 3 * step + 1, 3 * step + 2], [1000, 1000, 1000], step)
        assert learner.touched <= 2 * 20 + 4
    assert sum(each.evicted for each in learner.table.fields) > 500
    assert set(learner.take_delta().gone.tolist()) == {1, 2, 101, 102}


def test_one_wrong_time_far_ahead_evicts_nothing() -> None:
    learner = learner_of(evict_after_ms=10 * HOUR_MS)
    show(learner, [1, 2], [101, 102])
    show(learner, [1], [101], 24 * 365)
    assert learner.rows == 4


def test_rows_of_few_uses_go_before_rows_of_many() -> None:
    learner = learner_of(evict_below=0.6, half_life_ms=10 * HOUR_MS)
    for _ in range(4):
        show(learner, [1], [101])
    show(learner, [2], [102])
    left = []
    for hours in range(1, 40):
        show(learner, [3], [103], hours)
        left.append(keys_of(learner) - {3, 103})
    # A single use is below 0.6 after 7.4 hours, four are after 27.4.
    assert left[6] == {1, 2, 101, 102} and left[7] == {1, 101}
    assert left[26] == {1, 101} and left[27] == set()


def test_the_table_is_never_larger_than_the_setting_and_the_least_used_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.eviction._SEEN_AT_LEAST", 64)
    learner = learner_of(max_rows=300, half_life_ms=100 * HOUR_MS)
    regulars, rng = list(range(1, 11)), np.random.default_rng(0)
    for step in range(300):
        users = [int(rng.choice(regulars)), 1000 + 2 * step, 1001 + 2 * step]
        show(learner, users, [50, 50, 50], step)
        assert learner.rows <= 300
    assert set(regulars) <= keys_of(learner)
    newest = {1000 + number for number in range(600 - 100, 600)}
    assert len(keys_of(learner) & newest) > 90
    (users, _) = learner.table.fields
    assert users.rows == learner.rows - 1 and users.admitted - users.evicted == users.rows


def test_a_value_that_finds_no_room_is_refused() -> None:
    learner = learner_of(max_rows=3)
    show(learner, [1, 2, 3, 4, 5], [101, 101, 101, 101, 101])
    assert learner.rows == 3
    fields = learner.table.fields
    assert sum(each.admitted for each in fields) == 3 and sum(each.refused for each in fields) in (3, 7)  # 7: item 101 too


@pytest.mark.parametrize("options", [{}, {"max_rows": 10**6, "evict_after_ms": 1000 * HOUR_MS}])
def test_a_table_from_which_nothing_goes_learns_as_ever(options: dict[str, Any]) -> None:
    plain, other = learner_of(SCHEMA), learner_of(SCHEMA, **options)
    for learner in (plain, other):
        run(learner, 0, 300)
    expected = snapshot(plain)
    assert not any(name.startswith(("table.", "upkeep.eviction", "upkeep.sketch")) for name in expected)
    found = snapshot(other)
    assert_same({name: found[name] for name in expected}, expected)


def run(learner: Learner, start: int, stop: int) -> list[float]:
    """Batches with late clicks in which time goes on; an hour and a half a batch."""
    scores: list[float] = []
    for at in range(start, stop, 20):
        corrects = np.arange(20) % 4 == 1
        labels = np.where(corrects, 1, LABELS[at : at + 20])
        times = START_MS + 0.04 * HOUR_MS * np.arange(at, at + 20)
        scores += learner.learn(BATCH.slice(at, at + 20), labels, None, corrects, times).tolist()
    return scores


@settings(deadline=None, max_examples=25)
@given(stop=st.integers(1, 29), rows_per_piece=st.integers(1, 60), part=st.sets(st.sampled_from(sorted(EVERYTHING))))
def test_a_restored_learner_goes_on_as_if_it_had_never_stopped(stop: int, rows_per_piece: int, part: set[str]) -> None:
    options = {name: EVERYTHING[name] for name in part | {"half_life_ms"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.eviction._SEEN_AT_LEAST", 25)
        patch.setattr("model.eviction._SEEN_FOR_AN_ELEMENT", 0)
        straight, stopped, resumed = (learner_of(SCHEMA, **options) for _ in range(3))
        first = 20 * stop
        scores = run(straight, 0, 600)
        assert run(stopped, 0, first) == scores[:first]
        with stopped.freeze() as frozen:
            resumed.begin_restore(frozen.rows, frozen.small)
            for piece in frozen.pieces(rows_per_piece):
                resumed.restore_rows(piece.serving, piece.trainer)
            resumed.finish_restore(frozen.dense, frozen.small)
        assert_same(snapshot(resumed), snapshot(stopped))
        assert run(resumed, first, 600) == scores[first:]
        assert_same(snapshot(resumed), snapshot(straight))


def test_everything_at_once_evicts_and_refuses() -> None:
    """What the test before this one plays is worth playing."""
    learner = learner_of(SCHEMA, **EVERYTHING)
    run(learner, 0, 600)
    fields = learner.table.fields
    assert sum(each.evicted for each in fields) > 40 and sum(each.refused for each in fields) > 100
    assert sum(each.rows for each in fields) == learner.rows <= 55


def test_rows_of_a_model_that_had_no_eviction_begin_to_age_when_it_is_switched_on() -> None:
    plain = learner_of()
    show(plain, [1, 2], [101, 102])
    learner = learner_of(evict_after_ms=10 * HOUR_MS)
    learner.restore(plain.serving_state(), plain.trainer_state())
    assert [each.rows for each in learner.table.fields] == [0, 0]  # nobody knows the fields of their rows
    for hours in range(100, 111):
        show(learner, [1], [101], hours)
    assert learner.rows == 4 and [each.rows for each in learner.table.fields] == [1, 1]
    show(learner, [1], [101], 111)
    assert keys_of(learner) == {1, 101}


def test_counts_follow_the_names_of_fields() -> None:
    wide = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="new"), FieldSpec(name="item")), embedding_dim=4)
    before, after = learner_of(), learner_of(wide)
    show(before, [1, 2], [101, 101])
    parts = before.trainer_state().items()
    after._upkeep.restore({name.removeprefix("upkeep."): value for name, value in parts if name.startswith("upkeep.")})
    found = [(each.field, each.rows, each.admitted) for each in after.table.fields]
    assert found == [("user", 2, 2), ("new", 0, 0), ("item", 1, 1)]


def test_a_cross_with_a_list_is_counted_under_its_own_name() -> None:
    """Batches have it among the lists, whatever comes after it in the schema."""
    a, tags = FieldSpec(name="a"), FieldSpec(name="tags", kind="list")
    schema = FeatureSchema(fields=(a, FieldSpec(name="x", kind="cross", of=("a", "tags")), tags, FieldSpec(name="b")))
    learner = learner_of(schema)
    events = [impression({"a": "a", "tags": ["s", "t", "u"], "b": each}) for each in ("v", "w")]
    learner.learn(FeatureDecoder(schema).impressions(events).batch, np.ones(2))
    assert {each.field: each.rows for each in learner.table.fields} == {"a": 1, "b": 2, "tags": 3, "x": 3}


def test_a_damaged_list_of_free_rows_is_rejected() -> None:
    learner = learner_of()
    show(learner, [1, 2], [101, 102])
    learner.evict(torch.tensor([2]))
    serving, trainer = learner.serving_state(), learner.trainer_state()
    assert trainer["table.free"].tolist() == [2]
    for wrong in ([9], [0], [1, 1]):
        damaged = {**trainer, "table.free": torch.tensor(wrong, dtype=torch.int32)}
        with pytest.raises(SnapshotMismatch, match="expected different rows from 1 to"):
            learner_of().restore(serving, damaged)
    other = learner_of()
    with learner.freeze() as frozen:
        other.begin_restore(frozen.rows)
        for piece in frozen.pieces(9):
            other.restore_rows(piece.serving, piece.trainer)
        with pytest.raises(SnapshotMismatch, match="expected 0 free rows, as begin_restore was given, found others"):
            other.finish_restore(frozen.dense, frozen.small)
