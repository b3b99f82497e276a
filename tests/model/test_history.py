"""Row history: counts as an exact reference has them, what is read of them, and who sees which counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.batch import FeatureBatch
from model.distinct import group
from model.errors import SnapshotMismatch
from model.history import BASE, LIMIT, PRIOR_CLICKS, history_inputs, row_numbers
from model.learner import Learner
from model.network import to_elements
from model.predictor import Predictor
from model.rows import ROW_PARTS
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from tests.model.test_learner import SCHEMA, learn, records

SETTINGS = ModelSettings(hidden=(16, 8), initial_rows=16, row_history=True, cross_layers=0)


def learner_of(schema: FeatureSchema = SCHEMA) -> Learner:
    return Learner(schema, SETTINGS, device="cpu")


def keys_of_row(batch: FeatureBatch, row: int) -> list[int]:
    """The keys of an example, as often as it has them."""
    start, stop = batch.list_offsets[row * batch.lists], batch.list_offsets[(row + 1) * batch.lists]
    return [*batch.keys[row].tolist(), *batch.list_keys[start:stop].tolist()]


def counts_of(learner: Learner) -> dict[int, tuple[float, float]]:
    serving = learner.serving_state()
    return {key: (n, c) for key, (n, c) in zip(serving["keys"].tolist(), serving["history"].tolist(), strict=True)}


def counted(learner: Learner) -> tuple[float, float]:
    n, c = learner.serving_state()[BASE].tolist()
    return n, c


def column(*keys: int) -> FeatureBatch:
    """A batch with one field."""
    return FeatureBatch(np.array(keys, np.int64)[:, None], np.empty(0, np.int64), np.zeros(1, np.int64), lists=0)


ONE_FIELD = FeatureSchema(fields=(FieldSpec(name="item"),), embedding_dim=2)


def test_counts_are_those_of_a_slow_reference() -> None:
    """Weights, sampled negatives, fractional labels, corrections both ways, keys that an example has more than once."""
    rng = np.random.default_rng(1)
    batch, labels = records(240)
    labels[::11] = 0.25
    weights = rng.choice([0.5, 1.0, 2.0], 240).astype(np.float32)
    corrects = (rng.random(240) < 0.3) & (np.arange(240) >= 80)
    labels[corrects] = rng.random(corrects.sum()) < 0.9
    learner = learner_of()
    learner.negative_rate = 0.25
    expected: dict[int, list[float]] = {}
    base = [0.0, 0.0]
    for start in range(0, 240, 40):
        part, times_ms = slice(start, start + 40), np.arange(start, start + 40) * 100.0
        learner.learn(batch.slice(start, start + 40), labels[part], weights[part], corrects[part], times_ms)
        for row in range(start, start + 40):
            y, w = float(labels[row]), float(weights[row])
            more = (0.0, w * (2 * y - 1)) if corrects[row] else (w * (y + (1 - y) / 0.25), w * y)
            for counts in (base, *(expected.setdefault(key, [0.0, 0.0]) for key in keys_of_row(batch, row))):
                counts[0] += more[0]
                counts[1] += more[1]
        for counts in (base, *expected.values()):
            counts[1] = max(counts[1], 0.0)
    found = counts_of(learner)
    assert found.keys() == expected.keys()
    for key, counts in expected.items():
        assert found[key] == pytest.approx(counts, rel=1e-5, abs=1e-4)
    assert counted(learner) == pytest.approx(base, rel=1e-5)


def test_lift_is_the_logit_of_a_smoothed_rate_less_that_of_the_base_rate() -> None:
    base = torch.tensor([4000.0, 80.0])
    counts = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 1.0], [1000.0, 20.0], [7000.0, 7000.0]])
    rate = 80 / 4000
    n, c = counts.double().unbind(1)
    smoothed = (c + PRIOR_CLICKS) / (n + PRIOR_CLICKS / rate)
    lift, known = row_numbers(counts, base).double().unbind(1)
    torch.testing.assert_close(lift, torch.logit(smoothed) - np.log(rate / (1 - rate)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(known, torch.log1p(n) / 5, rtol=1e-6, atol=1e-7)
    assert lift[0] == known[0] == 0, "nothing is known of a new row"
    assert lift[1] < 0.5, "one click in one view says little, at a click rate of 2 %"
    assert lift[3] == 0, "a row like all others"


def test_fields_read_their_rows_and_lists_read_means() -> None:
    batch, _ = records(30)
    elements = to_elements(batch, SCHEMA, torch.device("cpu"))
    counts = torch.stack((torch.arange(1.0, len(elements.keys) + 1), torch.arange(len(elements.keys)) % 3), 1)
    base = torch.tensor([100.0, 30.0])
    found = history_inputs(elements, counts, base).view(30, 5, 2)
    numbers = row_numbers(counts, base)
    torch.testing.assert_close(found[:, :3], numbers[: 30 * 3].view(30, 3, 2))
    for row in range(30):
        for which in range(2):
            start, stop = batch.list_offsets[row * 2 + which : row * 2 + which + 2]
            torch.testing.assert_close(found[row, 3 + which], numbers[90 + start : 90 + stop].mean(0))


def test_an_example_never_reads_its_own_label() -> None:
    batch, labels = records(200)
    one, other = learner_of(), learner_of()
    for each in (one, other):
        learn(each, batch.slice(0, 150), labels[:150])
    rest = batch.slice(150, 200)
    np.testing.assert_array_equal(one.learn(rest, labels[150:]), other.learn(rest, 1 - labels[150:]))
    assert not np.array_equal(one.predict(rest), other.predict(rest))


def read(learner: Learner, keys: list[int], labels: list[float], corrects: list[bool], times: list[float]) -> torch.Tensor:
    """What the dense part would read for further labels."""
    history, table, batch = learner._history, learner._table, column(*keys)
    assert history is not None
    gathered = table.gather(group(table.keys.lookup(torch.tensor(keys))))
    elements = to_elements(batch, learner.schema, learner.device)
    back = torch.tensor(corrects)
    return history.read(elements, gathered, torch.tensor(labels), None, back, learner.negative_rate, torch.tensor(times))


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_correction_reads_the_counts_without_what_its_first_label_has_added(label: float) -> None:
    learner = learner_of(ONE_FIELD)
    learner.learn(column(5, 5, 5, 8), np.array([1.0, 0.0, 0.0, 1.0]))
    learner.learn(column(5), np.array([label]))
    n, c = counts_of(learner)[5]
    assert (n, c) == (4.0, 1.0 + label)
    assert learner._history is not None
    found = read(learner, [5, 5], [1 - label, 1.0], [True, False], [1_000.0, 1_001.0])
    expected = row_numbers(torch.tensor([[3.0, 1.0], [4.0, 1.0 + label]]), learner._history.base)
    torch.testing.assert_close(found, expected)
    found = read(learner, [5, 5], [1 - label, label], [True, False], [1_000.0, 1_000.0])
    torch.testing.assert_close(found, expected[[1, 1]])  # its first label is in the same batch, not in the counts
    learner.learn(column(5), np.array([1 - label]), corrects=np.array([True]))
    assert counts_of(learner)[5] == (4.0, 2.0 - label), "the impression is counted already, and what it was is taken back"
    assert counted(learner) == (5.0, 3.0 - label)


def test_a_key_that_an_example_has_several_times_is_taken_back_as_often() -> None:
    """Else its count would show which examples are corrections."""
    schema = FeatureSchema(
        fields=(
            FieldSpec(name="item"),
            FieldSpec(name="last", space="item"),
            FieldSpec(name="seen", kind="list", space="item"),
        ),
        embedding_dim=2,
    )
    learner = learner_of(schema)
    assert learner._history is not None
    example = FeatureBatch(np.array([[5, 5]]), np.array([5, 6, 5]), np.array([0, 3]), lists=1)
    learner.learn(example, np.array([1.0]))
    before = counts_of(learner)
    assert before == {5: (4.0, 4.0), 6: (1.0, 1.0)}
    learner.learn(example, np.array([0.0]))
    elements = to_elements(example, schema, learner.device)
    gathered = learner._table.gather(group(learner._table.keys.lookup(elements.keys)))
    one = torch.ones(1)
    read = [learner._history.read(elements, gathered, one, None, back, 1.0) for back in (one.bool(), None)]
    own, shared = row_numbers(torch.tensor([before[5], before[6]]), learner._history.base)
    expected = torch.cat((own, own, (2 * own + shared) / 3))
    torch.testing.assert_close(read[0][0], expected)
    assert not torch.allclose(read[1][0], expected), "a first label of such an example reads all counts"


def test_a_key_without_a_row_reads_nothing_and_counts_nothing() -> None:
    learner = learner_of(ONE_FIELD)
    learner.learn(column(5, 5, 8), np.array([1.0, 0.0, 0.0]))
    history, table = learner._history, learner._table
    assert history is not None
    elements = to_elements(column(5, 77, 8), ONE_FIELD, learner.device)
    gathered, labels, own = table.gather(group(table.keys.lookup(torch.tensor([5, 8])))), torch.ones(3), torch.tensor([0, 2])
    back = torch.tensor([False, True, False])
    found = history.read(elements, gathered, labels, None, back, 1.0, None, own)
    expected = row_numbers(torch.tensor([[2.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), history.base)
    torch.testing.assert_close(found, expected)
    history.keep()
    assert counts_of(learner) == {5: (3.0, 2.0), 8: (2.0, 1.0)}
    assert counted(learner) == (5.0, 4.0), "among all examples it counts"


def test_the_past_of_a_row_that_is_seen_too_often_counts_half() -> None:
    """Without it, float32 would stop counting at 2^24, while clicks go on: each such row would seem to be clicked always."""
    learner = learner_of(ONE_FIELD)
    labels, weights = np.tile([1.0, 0.0, 0.0, 0.0], 256), np.full(1024, 512.0)
    found = []
    for _ in range(40):
        learner.learn(column(*[7] * 1024), labels, weights)
        found.append(counts_of(learner)[7])
        assert counted(learner) == found[-1]
    examples = [n for n, _ in found]
    assert max(examples) == LIMIT and examples[-1] < 40 * 1024 * 512 and min(examples[2:]) >= LIMIT / 2
    assert all(c == n / 4 for n, c in found)
    numbers = row_numbers(torch.tensor([[LIMIT, LIMIT / 8], [LIMIT / 2, LIMIT / 16]]), torch.tensor([LIMIT, LIMIT / 4]))
    torch.testing.assert_close(numbers[0], numbers[1], atol=1e-3, rtol=0)  # the model doesn't notice
    learner.learn(column(8), np.ones(1), np.array([1e9]))
    assert counts_of(learner)[8] == (LIMIT / 2, LIMIT / 2), "one example of any weight"


def test_a_key_that_was_evicted_begins_anew() -> None:
    learner = learner_of(ONE_FIELD)
    learner.learn(column(5, 5, 6), np.array([1.0, 1.0, 0.0]))
    learner.evict(torch.tensor([5]))
    learner.learn(column(5, 9), np.array([0.0, 1.0]))
    assert counts_of(learner) == {6: (1.0, 0.0), 5: (1.0, 0.0), 9: (1.0, 1.0)}


def test_a_row_whose_history_alone_changes_is_in_the_delta() -> None:
    """Scores that are 1 in float32 leave no slope, so weights stay, bit for bit."""
    learner = learner_of(ONE_FIELD)
    learner.learn(column(1, 2, 3), np.array([1.0, 0.0, 1.0]))
    serving = learner.serving_state()
    serving["bias"] += 60.0
    learner.restore(serving, learner.trainer_state())
    predictor = Predictor.of(ONE_FIELD, SETTINGS, learner.serving_state(), device="cpu")
    assert learner.learn(column(2, 3, 3), np.ones(3)).tolist() == [1.0] * 3
    delta = learner.take_delta()
    assert sorted(delta.rows.keys.tolist()) == [2, 3]
    after = learner.serving_state()
    assert torch.equal(after["embedding"], serving["embedding"]) and torch.equal(after["first_order"], serving["first_order"])
    assert counts_of(learner) == {1: (1.0, 1.0), 2: (2.0, 1.0), 3: (3.0, 3.0)}
    before = predictor.digest
    predictor.apply(predictor.prepare(delta))
    assert predictor.digest == learner.digest != before


@pytest.mark.parametrize("model", [{}, {"cross_layers": 2}, {"name": "lr"}, {"name": "pnn", "first_order": "ftrl"}])
def test_scorers_have_the_history_at_the_moment_of_the_weights(model: dict[str, Any]) -> None:
    """A predictor that follows deltas scores as the learner does, bit for bit, and a model that was kept as at its moment."""
    batch, labels = records(400)
    settings = SETTINGS.model_copy(update=model)
    learner = Learner(SCHEMA, settings, device="cpu")
    predictor = Predictor.of(SCHEMA, settings, learner.serving_state(), device="cpu")
    kept, then = None, None
    for start in range(0, 300, 20):
        corrects = np.arange(20) % 4 == 1
        learner.learn(batch.slice(start, start + 20), labels[start : start + 20], None, corrects, np.full(20, 500.0 * start))
        if start == 100:
            kept, then = learner.keep(), Predictor.of(SCHEMA, settings, learner.serving_state(), device="cpu")
        predictor.apply(predictor.prepare(learner.take_delta()))
        np.testing.assert_array_equal(predictor.predict(batch), learner.predict(batch))
    assert kept is not None and then is not None
    np.testing.assert_array_equal(kept.predict(batch), then.predict(batch))
    assert not np.array_equal(kept.predict(batch), learner.predict(batch))
    assert [*predictor.scrub()][-1] is True
    predictor._rows._columns["history"][20, 0] += 1
    assert [*predictor.scrub()][-1] is False, "the digest covers the counts"


def test_weights_with_another_setting_are_refused() -> None:
    plain = Learner(SCHEMA, SETTINGS.model_copy(update={"row_history": False}), device="cpu")
    batch, labels = records(40)
    learner = learner_of()
    for each in (plain, learner):
        each.learn(batch, labels)
    assert "history" not in plain.serving_state() and BASE not in plain.serving_state()
    assert [*plain.take_delta().rows.parts()] == [name for name in ROW_PARTS if name != "history"]
    with pytest.raises(SnapshotMismatch, match=r"tensor 'history': expected \d+×2 of torch\.float32, found no such tensor"):
        learner.restore(plain.serving_state(), plain.trainer_state())
    with pytest.raises(SnapshotMismatch, match="use the features and model settings that the snapshot was made with"):
        plain.restore(learner.serving_state(), learner.trainer_state())
    without = {name: each for name, each in learner.serving_state().items() if name != BASE}
    with pytest.raises(SnapshotMismatch, match=r"tensor 'history\.base'"):
        Predictor.of(SCHEMA, SETTINGS, without, device="cpu")


def test_bot_clicks_that_are_taken_back_leave_an_item_near_its_clean_score() -> None:
    """100 clicks of bots on one item, taken back while training goes on. The clean model saw no clicks of them."""
    schema = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="item")), embedding_dim=8)
    settings = SETTINGS.model_copy(update={"hidden": (64, 32)})
    rng = np.random.default_rng(5)
    items = rng.integers(0, 4, 60_000)
    shown = np.stack((rng.integers(100, 160, len(items)), items), 1)
    labels = (rng.random(len(items)) < 0.05 + 0.05 * items).astype(np.float32)
    bots = np.stack((np.arange(100) % 60 + 100, np.full(100, 2)), 1)
    asked = np.stack((np.arange(100, 160), np.full(60, 2)), 1)

    def as_batch(keys: np.ndarray) -> FeatureBatch:
        return FeatureBatch(keys, np.empty(0, np.int64), np.zeros(1, np.int64), lists=0)

    def trained(*, bots_click: bool) -> tuple[Learner, list[float]]:
        """A learner, and the item's score after every 600 impressions."""
        learner, scores = Learner(schema, settings, device="cpu"), []
        for start in range(0, len(shown), 60):
            learner.learn(as_batch(shown[start : start + 60]), labels[start : start + 60])
            some = as_batch(bots[start % 600 // 6 :][:10])  # ten batches of ten
            if start // 600 == 30:
                learner.learn(some, np.full(10, float(bots_click)))
            if start // 600 == 32 and bots_click:
                learner.learn(some, np.zeros(10), corrects=np.ones(10, np.bool_))
            if start % 600 == 540:
                scores.append(float(learner.predict(as_batch(asked)).mean()))
        return learner, scores

    (clean, expected), (bought, found) = trained(bots_click=False), trained(bots_click=True)
    assert found[29] == expected[29] and found[30] > 1.3 * expected[30], "the bots had an effect"
    assert np.mean(found[-40:]) == pytest.approx(np.mean(expected[-40:]), rel=0.05)
    assert counts_of(bought) == counts_of(clean)
