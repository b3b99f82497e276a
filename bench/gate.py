"""The gate on simulated streams: false holds a day on stationary streams, and how soon faults are withheld.

A logistic model with a bias and three fields learns with a constant learning rate, so that its noise never ends. Its own older
weights are the anchor, chosen by the rule of `docs/training.md`. There is no Kafka and no neural network. Once there is an
anchor, one of these faults begins:

- `rate_times_100`: the learning rate is multiplied by 100;
- `field_zeroed`: the most informative field reads 0 in every prediction;
- `logits_plus_0.7`: the logit of every prediction is too high by 0.7.

Beside it, before each delta, some requests are scored again (`stream/trainer/score_shift.py`): that must find labels that are
flipped, which the blocks of clicks don't, and must not withhold a healthy model.

The last line is one JSON object:

- `false_holds_a_day`: mean over the stationary days, for each click rate;
- `caught`: for each fault, the number of seeds whose versions were withheld within 2,000 clicks;
- `median_clicks`: the median number of clicks until then;
- `largest_shift`: the largest shift of scores in the stationary days, in logits, and at the steps of the click rate below;
- `false_shifts_a_day`: how often a shift was beyond what is allowed in a stationary day, and in all of the steps below;
- `flip_seconds`: the median time until the shift is beyond the limit when all labels are flipped, and `flips_found`: the
  number of seeds in which that took less than a minute;
- `holds_at_ctr_steps`: how often versions were withheld on streams whose click rate steps from 3 to 6 % and back. There are a
  tenth as many of these streams as seeds.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import click
import numpy as np

from bench.common import report
from model.batch import FeatureBatch
from state.gate import Gate, GateState
from state.gate_blocks import sample
from state.settings import SnapshotSettings
from stream.trainer.columns import ExampleColumns
from stream.trainer.sanity import BACK, TIMES_USUAL
from stream.trainer.score_shift import ScoreShift

Fault = Literal["none", "rate_times_100", "field_zeroed", "logits_plus_0.7", "labels_flipped"]
FAULTS: tuple[Fault, ...] = ("rate_times_100", "field_zeroed", "logits_plus_0.7")
CLICK_RATES = (0.05, 0.01)
STEPS = (0.03, 0.06, 0.03)

PER_SECOND = 300
ROWS = 512
IDS = (1_000, 300, 24)
# Standard deviation of each field's true weights: items differ most, as on MovieLens and KuaiRand.
SPREAD = (0.5, 1.2, 0.2)
RATE = 0.02
WARM_UP_S = 3_600
FAULT_CLICKS = 2_000
FLIPPED_S = 60


@dataclass(slots=True)
class Weights:
    """A bias and a weight for each id of each field."""

    bias: float
    fields: list[np.ndarray]

    def copy(self) -> Weights:
        return Weights(self.bias, [field.copy() for field in self.fields])

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.bias + sum(field[ids[:, at]] for at, field in enumerate(self.fields))


class Stream:
    """Impressions with a true logit, from which their labels are drawn."""

    def __init__(self, rng: np.random.Generator, click_rate: float) -> None:
        self._rng = rng
        self.truth = Weights(0.0, [rng.normal(0, spread, count) for spread, count in zip(SPREAD, IDS, strict=True)])
        odds = [np.arange(1, count + 1) ** -0.8 for count in IDS]
        self._cumulative = [np.cumsum(each / each.sum()) for each in odds]
        self.set_click_rate(click_rate)

    def set_click_rate(self, click_rate: float) -> None:
        """Change the true bias so that this is the mean of the true probabilities."""
        ids = self.ids(50_000)
        low, high = -12.0, 4.0
        for _ in range(40):
            self.truth.bias = (low + high) / 2
            mean = sigmoid(self.truth.logits(ids)).mean()
            low, high = (self.truth.bias, high) if mean < click_rate else (low, self.truth.bias)

    def ids(self, rows: int) -> np.ndarray:
        drawn = self._rng.random((rows, len(IDS)))
        return np.stack([np.minimum(np.searchsorted(at, drawn[:, n]), len(at) - 1) for n, at in enumerate(self._cumulative)], 1)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        return (self._rng.random(len(ids)) < sigmoid(self.truth.logits(ids))).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Weights that become the anchor once they are old enough, with the time and the number of clicks at their capture."""

    at_ms: float
    clicks: float
    weights: Weights


class Simulation:
    """One stream with one model, its anchors and its gate. `steps` never ends.

    Args:
        rows: examples in a batch.
    """

    def __init__(self, seed: int, click_rate: float, settings: SnapshotSettings, rows: int = ROWS) -> None:
        self._rng = np.random.default_rng(seed)
        self.stream, self._settings, self._rows = Stream(self._rng, click_rate), settings, rows
        self.live = Weights(float(np.log(click_rate / (1 - click_rate))), [np.zeros(count) for count in IDS])
        self.gate = Gate(settings, GateState())
        self.fault: Fault = "none"
        self.now_ms, self.clicks = 0.0, 0.0
        self.shift, self.largest_shift, self.shifts = ScoreShift(self), 0.0, 0
        self.is_shifted = False
        self.examples_seen = 0
        self._anchor: Weights | None = None
        self._next: Candidate | None = None

    def warm_up(self, rows: int) -> None:
        """Learn about `rows` examples without the gate, in larger batches."""
        for _ in range(rows // 2_048):
            ids = self.stream.ids(2_048)
            self._learn(ids, self.stream.labels(ids), self._predict(ids), rate=RATE)

    def steps(self) -> Iterator[None]:
        while True:
            ids = self.stream.ids(self._rows)
            labels, live = self.stream.labels(ids), self._predict(ids)
            if self.fault == "labels_flipped":
                labels = 1 - labels
            self.gate.count(labels, None, np.ones(len(labels)))
            if self._anchor is not None:
                at, weights = sample(
                    self._rng.random(len(ids)),
                    labels,
                    None,
                    one_in=self._settings.gate_sample,
                    click_share=self.gate.click_share,
                )
                self.gate.pair(labels[at], weights, live[at], self._anchor.logits(ids[at]))
                if self.gate.block_is_full:
                    self.gate.close_block(int(self.now_ms) or 1)
            self._learn(ids, labels, live, rate=RATE * 100 if self.fault == "rate_times_100" else RATE)
            self.now_ms += 1_000 * self._rows / PER_SECOND
            self.clicks += labels.sum()
            self._keep_anchor()
            self._check_shift(ids)
            yield

    def predict(self, batch: FeatureBatch) -> np.ndarray:
        """What the check of shifts scores with."""
        return sigmoid(self._predict(batch.keys)).astype(np.float32)

    def _check_shift(self, ids: np.ndarray) -> None:
        """What the trainer does before a delta, here after each batch."""
        self.examples_seen += len(ids)
        self.shift.observe(as_batch(ids), np.empty(0, np.float32))
        if self._anchor is not None:
            found = self.shift.measure() or 0.0
            self.largest_shift = max(self.largest_shift, found)
            limit = max(self._settings.score_shift_limit, TIMES_USUAL * self.shift.usual)
            was_shifted, self.is_shifted = self.is_shifted, found > (limit * BACK if self.is_shifted else limit)
            self.shifts += self.is_shifted and not was_shifted
            if self.is_shifted:
                return
        self.shift.served()

    def _predict(self, ids: np.ndarray) -> np.ndarray:
        logits = self.live.logits(ids)
        if self.fault == "field_zeroed":
            logits = logits - self.live.fields[1][ids[:, 1]]
        return np.clip(logits + 0.7 if self.fault == "logits_plus_0.7" else logits, -16, 16)

    def _learn(self, ids: np.ndarray, labels: np.ndarray, logits: np.ndarray, *, rate: float) -> None:
        slope = sigmoid(logits) - labels
        if self.fault in ("field_zeroed", "logits_plus_0.7"):
            # These faults are in the prediction alone, so that learning doesn't correct them.
            slope = sigmoid(self.live.logits(ids)) - labels
        self.live.bias -= rate * float(slope.sum()) / 10
        for at, field in enumerate(self.live.fields):
            field -= rate * np.bincount(ids[:, at], slope, len(field))

    def _keep_anchor(self) -> None:
        """A copy of the weights becomes the anchor once it is old enough. Then the next copy is taken."""
        if self._next is None:
            self._next = Candidate(self.now_ms, self.clicks, self.live.copy())
            return
        settings, candidate = self._settings, self._next
        old = self.now_ms - candidate.at_ms >= settings.anchor_age_ms
        if old and self.clicks - candidate.clicks >= settings.anchor_clicks and self.gate.state.flow == "flowing":
            self._anchor, self._next = candidate.weights, None
            self.gate.anchored((self.gate.state.anchor or 0) + 1)


def as_batch(ids: np.ndarray) -> ExampleColumns:
    """What the check of shifts needs of a batch."""
    count = len(ids)
    features = FeatureBatch(ids, np.empty(0, np.int64), np.zeros(1, np.int64), lists=0)
    zeros = np.zeros(count, np.int64)
    none = np.zeros(count, np.float32)
    hashes = ids[:, 0] * 0x1F3D_5B79 % 0x7FFF_FFFF
    return ExampleColumns(
        batch=features,
        labels=none,
        impression_ms=zeros,
        reached_ms=zeros,
        served=none,
        versions=zeros,
        deltas=zeros,
        id_hashes=hashes,
        records=(),
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


class Holds(NamedTuple):
    """How often a healthy model was withheld by blocks and by shifts, how many blocks were judged, and the largest shift."""

    holds: int
    blocks: int
    shifts: int = 0
    largest_shift: float = 0.0


def false_holds(seed: int, click_rate: float, hours: float, settings: SnapshotSettings) -> Holds:
    """How often a healthy model was withheld in so many hours."""
    simulation = Simulation(seed, click_rate, settings, rows=1_024)
    simulation.warm_up(WARM_UP_S * PER_SECOND)
    holds, before = 0, "flowing"
    for _ in simulation.steps():
        state = simulation.gate.state
        holds += before == "flowing" and state.flow == "withheld"
        before = state.flow
        if simulation.now_ms >= hours * 3_600_000:
            blocks = round(simulation.clicks / settings.gate_block_clicks)
            return Holds(holds, blocks, simulation.shifts, simulation.largest_shift)
    raise AssertionError


def ready(seed: int, click_rate: float, settings: SnapshotSettings) -> Simulation:
    """A simulation that has an anchor, at some point of a block."""
    simulation = Simulation(seed, click_rate, settings)
    simulation.warm_up(WARM_UP_S * PER_SECOND)
    steps = simulation.steps()
    while simulation.gate.state.last is None:
        next(steps)
    for _ in range(int(np.random.default_rng(seed).integers(50))):
        next(steps)
    return simulation


def clicks_until_withheld(simulation: Simulation, fault: Fault) -> float | None:
    """Clicks from the beginning of a fault until versions are withheld; None if they aren't within `FAULT_CLICKS`.

    The given simulation isn't changed.
    """
    simulation = copy.deepcopy(simulation)
    steps = simulation.steps()
    simulation.fault, began = fault, simulation.clicks
    while simulation.clicks - began <= FAULT_CLICKS:
        next(steps)
        if simulation.gate.state.flow == "withheld":
            return float(simulation.clicks - began)
    return None


def seconds_until_shifted(simulation: Simulation) -> float | None:
    """Seconds from the first flipped label until the shift is beyond the limit; None if that takes longer than a minute."""
    simulation = copy.deepcopy(simulation)
    simulation.shift._learner = simulation
    steps = simulation.steps()
    simulation.fault, began_ms = "labels_flipped", simulation.now_ms
    while simulation.now_ms - began_ms <= 1_000 * FLIPPED_S:
        next(steps)
        if simulation.is_shifted:
            return (simulation.now_ms - began_ms) / 1_000
    return None


def holds_at_steps(seed: int, settings: SnapshotSettings, *, hours: float = 1.0) -> Holds:
    """How often versions were withheld while the click rate was 3 %, then 6 %, then 3 % again, for so many hours each."""
    simulation = ready(seed, STEPS[0], settings)
    steps = simulation.steps()
    holds, before = 0, "flowing"
    for click_rate in STEPS:
        simulation.stream.set_click_rate(click_rate)
        until_ms = simulation.now_ms + hours * 3_600_000
        while simulation.now_ms < until_ms:
            next(steps)
            flow = simulation.gate.state.flow
            holds += before == "flowing" and flow == "withheld"
            before = flow
    return Holds(holds, 0, simulation.shifts, simulation.largest_shift)


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--seeds", default=100, show_default=True, help="Seeds for each fault.")
@click.option("--days", default=1, show_default=True, help="Stationary days for each click rate, with one seed each.")
@click.option("--hours", default=24.0, show_default=True, help="Simulated hours of a day. Holds are scaled up to 24.")
def main(seeds: int, days: int, hours: float) -> None:
    settings = SnapshotSettings()
    holds, caught, clicks = {}, {}, {}
    shifts, largest, found_s, flips = {}, {}, {}, {}
    for click_rate in CLICK_RATES:
        found = [false_holds(seed, click_rate, hours, settings) for seed in range(days)]
        holds[f"{click_rate:g}"] = round(sum(each.holds for each in found) / days * 24 / hours, 2) if days else None
        shifts[f"{click_rate:g}"] = round(sum(each.shifts for each in found) / days * 24 / hours, 2) if days else None
        largest[f"{click_rate:g}"] = round(max((each.largest_shift for each in found), default=0.0), 3)
        seconds: list[float] = []
        ends: dict[Fault, list[float]] = {fault: [] for fault in FAULTS}
        for seed in range(seeds):
            simulation = ready(1_000 + seed, click_rate, settings)
            for fault in FAULTS:
                end = clicks_until_withheld(simulation, fault)
                ends[fault] += [] if end is None else [end]
            after_s = seconds_until_shifted(simulation)
            seconds += [] if after_s is None else [after_s]
        flips[f"{click_rate:g}"] = len(seconds)
        found_s[f"{click_rate:g}"] = round(statistics.median(seconds), 1) if seconds else None
        for fault, seen in ends.items():
            caught[f"{fault}_{click_rate:g}"] = len(seen)
            clicks[f"{fault}_{click_rate:g}"] = round(statistics.median(seen)) if seen else None
    steps = [holds_at_steps(2_000 + seed, settings) for seed in range(-(-seeds // 10))]
    largest["steps"] = round(max((each.largest_shift for each in steps), default=0.0), 3)
    shifts["steps"] = sum(each.shifts for each in steps)
    report(
        benchmark="gate",
        value=round(min(caught.values()) / seeds, 3) if seeds else None,
        unit="share caught of the fault caught least",
        seeds=seeds,
        days=days,
        holds_at_ctr_steps=sum(each.holds for each in steps),
        largest_shift=largest,
        false_shifts_a_day=shifts,
        flips_found=flips,
        flip_seconds=found_s,
        false_holds_a_day=holds,
        caught=caught,
        median_clicks=clicks,
    )


if __name__ == "__main__":
    main()
