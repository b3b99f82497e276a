"""A simulated stream: its truth is true, its disorder changes nothing but the order, and its garbage is garbage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.cli import cli
from deploy.errors import DeployError
from deploy.feeding.arrivals import AGAIN, BROKEN, FIRST, arrivals
from deploy.feeding.simulate import Simulator
from deploy.feeding.simulation import CtrStep, Simulation, TruthFile, generate, simulation_schema
from deploy.settings import Settings
from stream.join.events import read_run
from tests.deploy.made_up import read_topic


def truth_of(simulation: Simulation) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and clicks of the whole stream."""
    batches = list(generate(simulation))
    return np.concatenate([b.probabilities for b in batches]), np.concatenate([b.clicked for b in batches])


def test_clicks_happen_as_often_as_their_probabilities_say() -> None:
    probabilities, clicked = truth_of(Simulation(count=200_000, ctr=0.1))
    assert abs(probabilities.mean() - 0.1) < 0.003
    assert probabilities.std() > 0.05  # there is something to learn
    order = np.argsort(probabilities)
    for part in np.array_split(order, 10):
        expected = probabilities[part].mean()
        assert abs(clicked[part].mean() - expected) < 5 * np.sqrt(expected / len(part))


def test_the_seed_decides_everything() -> None:
    first, again, other = (list(generate(Simulation(count=5_000, seed=seed))) for seed in (1, 1, 2))
    assert [b.features for b in first] == [b.features for b in again]
    assert all((a.click_times_ms == b.click_times_ms).all() for a, b in zip(first, again, strict=True))
    assert [b.features for b in first] != [b.features for b in other]


def test_drift_turns_the_weights_and_no_drift_does_not() -> None:
    still, _ = truth_of(Simulation(count=100_000))
    turned, _ = truth_of(Simulation(count=100_000, drift=1.0))
    assert np.allclose(still[:100], turned[:100], rtol=0.02)
    late = slice(-5_000, None)
    assert abs(np.corrcoef(still[late], turned[late])[0, 1]) < 0.5  # a quarter turn: unrelated


@pytest.mark.parametrize("ctr", [0.01, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_the_click_through_rate_is_the_one_that_was_asked_for(ctr: float, seed: int) -> None:
    stream = Simulation(count=60_000, rate=300, ctr=ctr, seed=seed, new_items=0.5, hour_ms=20_000)
    probabilities, _ = truth_of(stream)
    assert abs(probabilities.mean() / ctr - 1) < 0.05


def test_the_click_through_rate_steps_when_it_was_asked_to_and_nothing_else_changes() -> None:
    level = Simulation(count=60_000, rate=300, ctr=0.03)
    still, _ = truth_of(level)
    stepped, _ = truth_of(replace(level, ctr_steps=(CtrStep(100.0, 0.06), CtrStep(150.0, 0.03))))
    assert (stepped[:30_000] == still[:30_000]).all()
    assert abs(stepped[30_000:45_000].mean() / still[30_000:45_000].mean() - 2) < 0.1
    assert np.allclose(stepped[45_000:], still[45_000:])


def test_new_items_appear_all_along_fade_and_have_effects_of_their_own() -> None:
    stream = Simulation(count=90_000, rate=300, new_items=0.5, new_item_share=0.3, new_item_life_s=30)
    batches = list(generate(stream))
    ages_ms, probabilities = (np.concatenate([getattr(b, name) for b in batches]) for name in ("item_ages_ms", "probabilities"))
    items = np.array([json.loads(features)["item_id"] for b in batches for features in b.features])
    new = ages_ms >= 0
    assert abs(new[30_000:].mean() - 0.3) < 0.02
    assert abs(ages_ms[new][10_000:].mean() - 30_000) < 3_000  # within an item's second of appearance
    # One appears every 2 s, in this order, and no impression shows one before its time.
    first = {item: row for row, item in reversed(list(enumerate(items))) if new[row]}
    assert len(first) > 130
    assert not set(items[new]) & set(items[~new])
    numbers = [int(item[1:]) for item in first]
    assert max(numbers) - min(numbers) + 1 == pytest.approx(150, abs=3)
    assert all(row >= 600 * (int(item[1:]) - 2_000) for item, row in first.items())
    # The oldest are shown seldom; and between items the mean probability differs by more than their users explain.
    assert (ages_ms[new] < 30_000).sum() > 1.5 * (ages_ms[new] >= 30_000).sum()
    by_item = [probabilities[items == item].mean() for item in list(first)[::5]]
    assert np.std(np.log(by_item)) > 0.3


def test_an_hour_lasts_as_long_as_it_was_asked_to_and_has_an_effect_of_its_own() -> None:
    stream = Simulation(count=90_000, rate=300, hour_ms=60_000, start_ms=1_700_000_040_000)
    batches = list(generate(stream))
    hours = np.array([json.loads(features)["hour"] for b in batches for features in b.features])
    assert (np.diff(np.flatnonzero(np.diff(hours))) == 18_000).all()
    assert len(set(hours.tolist())) == 5
    log_odds = np.log(truth_of(stream)[0])
    means = [log_odds[hours == hour].mean() for hour in sorted(set(hours.tolist()))]
    assert np.std(means) > 0.05  # within an hour the mean is known to 0.01


@pytest.mark.parametrize("delay", ["exponential", "lognormal", "uniform"])
def test_delays_have_the_mean_that_was_asked(delay: Literal["exponential", "lognormal", "uniform"]) -> None:
    batches = generate(Simulation(count=100_000, ctr=0.3, delay=delay, delay_ms=4_000))
    delays = np.concatenate([(b.click_times_ms - b.times_ms)[b.clicked] for b in batches])
    assert delays.min() >= 0
    assert 3_700 < delays.mean() < 4_300
    if delay == "uniform":
        assert delays.max() <= 8_000


def test_features_are_those_of_the_schema() -> None:
    batch = next(generate(Simulation(count=10)))
    assert {field.name for field in simulation_schema().fields} == set(json.loads(batch.features[0]))
    assert batch.times_ms.tolist() == [1_700_000_000_000 + i for i in range(10)]


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 9_000),
    shuffle_ms=st.sampled_from([0, 1, 700]),
    duplicates=st.sampled_from([0.0, 0.1]),
    malformed=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 5),
)
def test_disorder_loses_nothing_and_stays_within_bounds(
    count: int, shuffle_ms: int, duplicates: float, malformed: float, seed: int
) -> None:
    simulation = Simulation(
        count=count, rate=2_000, shuffle_ms=shuffle_ms, duplicates=duplicates, malformed=malformed, seed=seed, delay_ms=900
    )
    true = list(generate(simulation))
    last_ms, first = 0, {False: set[bytes](), True: set[bytes]()}
    again: list[tuple[bool, bytes]] = []
    for sends in arrivals(iter(true), simulation):
        assert sends.times_ms[0] >= last_ms
        assert (np.diff(sends.times_ms) >= 0).all()
        last_ms = int(sends.times_ms[-1])
        late = (sends.times_ms - sends.event_times_ms)[sends.what == FIRST]
        assert len(late) == 0 or (late.min() >= 0 and late.max() <= shuffle_ms)
        for key, what, is_click in zip(sends.keys, sends.what.tolist(), sends.is_click.tolist(), strict=True):
            if what == FIRST:
                assert key not in first[is_click]
                first[is_click].add(key)
            elif what == AGAIN:
                assert key in first[is_click]  # never before the first
                again.append((is_click, key))
            else:
                assert what == BROKEN
                assert key.startswith(b"broken-sim-")
    assert first[False] == {name.encode() for batch in true for name in batch.ids}
    clicks = {batch.ids[row].encode() for batch in true for row in np.flatnonzero(batch.clicked)}
    assert first[True] == clicks
    assert len(again) == len(set(again))
    assert bool(again) == (duplicates > 0) or count < 200


class _Record:
    topic, partition, offset, headers, timestamp = "impressions", 0, 0, (), 2_000_000_000_000

    def __init__(self, key: bytes, value: bytes | None) -> None:
        self.key, self.value = key, value


def test_all_garbage_is_refused_by_the_join_and_nothing_else_is() -> None:
    simulation = Simulation(count=4_000, malformed=0.1)
    reasons = set()
    for sends in arrivals(generate(simulation), simulation):
        for key, value, what in zip(sends.keys, sends.values, sends.what.tolist(), strict=True):
            events = read_run([_Record(key, value)], max_future_ms=3_600_000, max_watermark_future_ms=0)
            assert len(events.dead) == (what == BROKEN), (key, value)
            reasons |= {letter.reason for letter in events.dead}
    assert reasons == {"malformed_json", "wrong_type", "missing_field", "id_mismatch", "bad_utf8", "empty_value"}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_the_truth_file_has_a_row_an_impression(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "deep" / f"truth.{suffix}"
    truth = TruthFile(path)
    batches = list(generate(Simulation(count=5_000)))
    for batch in batches:
        truth.write(batch)
    truth.close()
    rows = (
        pq.read_table(path).to_pylist() if suffix == "parquet" else [json.loads(line) for line in path.read_text().splitlines()]
    )
    assert len(rows) == 5_000
    assert rows[0]["impression_id"] == "sim-0"
    assert rows[7]["probability"] == batches[0].probabilities[7]
    assert all(row["item_age_ms"] is None for row in rows)
    clicked = [row for row in rows if row["clicked"]]
    assert all(row["click_timestamp"] >= row["timestamp"] for row in clicked)
    assert all(row["click_timestamp"] is None for row in rows if not row["clicked"])


def test_a_truth_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeployError, match=r"--truth .*: expected a file that can be written, found: "):
        TruthFile(tmp_path / "file" / "truth.jsonl")


@pytest.mark.kafka
def test_what_is_sent_is_what_was_counted(topics: Settings, tmp_path: Path) -> None:
    simulation = Simulation(count=6_000, rate=5_000, shuffle_ms=200, duplicates=0.05, malformed=0.02, delay_ms=500)
    truth = TruthFile(tmp_path / "truth.parquet")
    stats = Simulator(simulation, topics, paced=False, truth=truth).run()
    assert stats.impressions == 6_000
    impressions, clicks = read_topic(topics, "impressions"), read_topic(topics, "clicks")
    assert len(impressions) + len(clicks) == stats.events + 4  # and four watermark records
    rows = pq.read_table(tmp_path / "truth.parquet").to_pylist()
    assert stats.clicks == sum(row["clicked"] for row in rows)
    events = [record for record in clicks if record.key is not None and not record.key.startswith(b"broken")]
    assert {record.key.decode() for record in events} == {row["impression_id"] for row in rows if row["clicked"]}
    marks = [record for record in impressions + clicks if record.key is None]
    latest = max(max(row["timestamp"], row["click_timestamp"] or 0) for row in rows)
    assert {dict(record.headers)["headrace-watermark"] for record in marks} == {str(stats.watermark_ms).encode()}
    assert stats.watermark_ms == latest + topics.join.window_ms + topics.join.lateness_ms + 1_000


@pytest.mark.kafka
def test_paced_streams_take_their_time(topics: Settings) -> None:
    seen: list[Any] = []
    simulation = Simulation(count=1_000, rate=1_000, delay="uniform", delay_ms=50)
    stats = Simulator(simulation, topics, on_progress=lambda now: seen.append(now.impressions)).run()
    assert 0.95 < stats.elapsed_s < 10
    assert seen == sorted(seen)
    assert len(seen) > 10


@pytest.mark.parametrize("step", ["200", "200:", "0:0.06", "200:1.5", "x:0.06"])
def test_a_step_that_cannot_be_read_says_what_was_expected(step: str) -> None:
    result = CliRunner().invoke(cli, ["simulate", "--count", "10", "--ctr-step", step])
    assert result.exit_code == 2
    assert f"expected SECONDS:CTR, as in 200:0.06, found '{step}'" in result.output
