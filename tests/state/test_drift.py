"""Abrupt changes of the stream: found within a block or two, not found where there are none, over once they are over."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from state.drift import BLOCK_EXAMPLES, LEAST_BLOCKS, DriftBlock, DriftState, DriftWatch
from state.drift_tests import EDGES, click_evidence, explained_shift, histogram, mean_logit, stability_index
from state.settings import SnapshotSettings

SETTINGS = SnapshotSettings()
FIELDS = ["user", "item", "tags"]


class Stream:
    """Blocks of a made-up stream: shares of nulls, a click rate, normal logits that follow it."""

    def __init__(self, seed: int = 0, watch: DriftWatch | None = None) -> None:
        self.random = np.random.default_rng(seed)
        self.watch = DriftWatch(SETTINGS, FIELDS) if watch is None else watch
        self.nulls, self.clicks, self.shift, self.spread = [0.0, 0.02, 0.4], 0.05, 0.0, 1.0

    def block(self, count: int = BLOCK_EXAMPLES) -> DriftBlock:
        logits = self.random.normal(np.log(0.05 / 0.95) + self.shift, self.spread, count)
        return DriftBlock(
            examples=float(count),
            weight=float(count),
            squares=float(count),
            nulls=[float(self.random.binomial(count, share)) for share in self.nulls],
            logits=histogram(logits, np.ones(count)).tolist(),
            clicks=float(self.random.binomial(count, self.clicks)),
        )

    def run(self, blocks: int) -> list[str]:
        problems = []
        for _ in range(blocks):
            self.watch.add(self.block())
            problems.append(self.watch.state.problem)
        return problems


@pytest.fixture
def stream() -> Stream:
    found = Stream()
    assert not any(found.run(200)), "nothing changes in a stationary stream"
    assert not found.watch.state.alarm
    return found


@pytest.mark.parametrize(("field", "share"), [(0, 0.3), (1, 1.0), (2, 0.1), (2, 0.7)])
def test_a_null_rate_that_jumps_is_a_problem_at_once_and_until_it_is_back(stream: Stream, field: int, share: float) -> None:
    usual = stream.nulls[field]
    stream.nulls[field] = share
    problems = stream.run(20)
    assert all(f"{FIELDS[field]} (" in each for each in problems)
    assert all("without a value more or less often than usual" in each for each in problems)
    stream.nulls[field] = usual
    assert not any(stream.run(20)), "it ends by itself"


def test_what_stays_becomes_normal_once_it_is_accepted(stream: Stream) -> None:
    stream.nulls[1] = 0.9
    assert all(stream.run(3))
    stream.watch.accept()
    assert not any(stream.run(60))
    stream.nulls[1] = 0.02
    assert any(stream.run(1)), "and then going back is a change"


def test_scores_that_shift_without_clicks_are_a_problem_and_with_clicks_none(stream: Stream) -> None:
    stream.shift = 1.2
    assert "scores are distributed otherwise than usual" in stream.run(1)[0]
    stream.shift = 0.0
    assert not any(stream.run(5))
    odds = 0.05 / 0.95 * np.exp(0.9)
    stream.shift, stream.clicks = 0.9, float(odds / (1 + odds))
    assert not any(stream.run(10))


def test_scores_that_lose_their_spread_are_a_problem(stream: Stream) -> None:
    stream.spread = 0.3
    assert all("scores are distributed" in each for each in stream.run(3))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_click_rate_that_changes_alone_only_alarms(stream: Stream, factor: float) -> None:
    stream.clicks *= factor
    problems, alarms = [], []
    for _ in range(8):
        problems += stream.run(1)
        alarms.append(stream.watch.state.alarm)
    assert not any(problems)
    assert "the click rate of the newest" in alarms[-1]
    stream.run(400)
    assert not stream.watch.state.alarm, "after a while it is the usual one"


@pytest.mark.parametrize("factor", [0.0, 0.1, 5.0])
def test_a_click_rate_beyond_a_factor_of_four_is_a_problem_within_a_thousand_impressions(stream: Stream, factor: float) -> None:
    usual, stream.clicks = stream.clicks, stream.clicks * factor
    assert "a change beyond a factor of 4" in stream.run(1)[0]
    assert all(stream.run(30))
    stream.clicks = usual
    assert not any(stream.run(30)[10:])


def test_few_clicks_take_longer_and_raise_no_false_alarm() -> None:
    stream = Stream(seed=3)
    stream.clicks = 0.002
    assert not any(stream.run(1_000))
    stream.clicks = 0.0
    problems = stream.run(16)
    assert not problems[0] and problems[-1]


def test_what_changes_slowly_is_no_drift(stream: Stream) -> None:
    for _ in range(300):
        stream.nulls[1] += 0.002
        stream.shift += 0.004
        assert not stream.run(1)[0]


def test_nothing_is_judged_before_the_usual_variation_is_known() -> None:
    stream = Stream()
    stream.run(LEAST_BLOCKS - 1)
    stream.nulls[0] = 1.0
    assert stream.run(1) == [""]
    assert stream.run(1) != [""]


def test_a_stream_whose_null_rate_varies_is_held_to_what_is_usual_for_it() -> None:
    stream = Stream(seed=1)
    for _ in range(400):
        stream.nulls[2] = float(stream.random.uniform(0.2, 0.6))
        assert not stream.run(1)[0]


def test_a_restart_changes_nothing(stream: Stream) -> None:
    saved = msgspec.json.encode(stream.watch.state)
    other = Stream(watch=DriftWatch(SETTINGS, FIELDS, msgspec.json.decode(saved, type=DriftState)))
    other.random = np.random.default_rng(9)
    stream.random = np.random.default_rng(9)
    for each in (stream, other):
        each.nulls[1] = 0.3
    assert stream.run(5) == other.run(5)
    assert msgspec.json.encode(stream.watch.state) == msgspec.json.encode(other.watch.state)


def test_the_stability_index_is_that_of_its_definition() -> None:
    random = np.random.default_rng(2)
    before = histogram(random.normal(0, 1, 50_000), np.ones(50_000))
    now = histogram(random.normal(0.5, 1, 50_000), np.ones(50_000))
    # Of two normal distributions of variance 1, the symmetric divergence is the square of the shift; bins lose a little.
    assert stability_index(before, now, 0.0, 0.0) == pytest.approx(0.25, abs=0.03)
    assert stability_index(before, now, 0.0, 0.5) < 0.005
    assert stability_index(before, before, 0.0, 0.0) == 0.0
    assert stability_index(before, np.zeros(len(before)), 0.0, 0.0) == 0.0
    single = np.zeros(len(EDGES) - 1)
    single[-1] = 5.0
    assert stability_index(single, single, 0.0, 0.0) == 0.0
    assert mean_logit(single) == pytest.approx(EDGES[-1], abs=0.1)


def test_evidence_bounds_the_chance_of_a_poisson_count() -> None:
    random = np.random.default_rng(4)
    clicks = random.poisson(20, 20_000)
    evidence = np.array([click_evidence((1_000, float(each)), (1e9, 2e7), 1.0) for each in clicks])
    for limit in (1.0, 2.0, 4.0):
        assert (evidence >= limit).mean() <= 2 * np.exp(-limit)
    assert click_evidence((1_000, 20.0), (1_000_000, 20_000.0), 1.0) == pytest.approx(0.0, abs=1e-6)
    low, high = explained_shift((1_000, 100.0), (100_000, 5_000.0), 1.0)
    assert low == 0.0 and 0.7 < high < 1.2
