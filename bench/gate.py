"""The gate on simulated streams: false holds a day on stationary streams, and how soon faults are withheld.

A logistic model with a bias and three fields learns with a constant learning rate, so that its noise never ends. Its own older
weights are the anchor, chosen by the rule of `docs/training.md`. There is no Kafka and no torch. Once there is an anchor, one
of these faults begins:

- `rate_times_100`: the learning rate is multiplied by 100;
- `field_zeroed`: the most informative field reads 0 in every prediction;
- `logits_plus_0.7`: the logit of every prediction is too high by 0.7.

The last line is one JSON object:

- `false_holds_a_day`: mean over the stationary days, for each click rate;
- `caught`: for each fault, the number of seeds whose versions were withheld within 2,000 clicks;
- `median_clicks`: the median number of clicks until then;
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
from state.gate import Gate, GateState
from state.gate_blocks import sample
from state.settings import SnapshotSettings

Fault = Literal["none", "rate_times_100", "field_zeroed", "logits_plus_0.7"]
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
            yield

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


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


class Holds(NamedTuple):
    """How often a healthy model was withheld, and how many blocks were judged."""

    holds: int
    blocks: int


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
            return Holds(holds, round(simulation.clicks / settings.gate_block_clicks))
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


def holds_at_steps(seed: int, settings: SnapshotSettings, *, hours: float = 1.0) -> int:
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
    return holds


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--seeds", default=100, show_default=True, help="Seeds for each fault.")
@click.option("--days", default=1, show_default=True, help="Stationary days for each click rate, with one seed each.")
@click.option("--hours", default=24.0, show_default=True, help="Simulated hours of a day. Holds are scaled up to 24.")
def main(seeds: int, days: int, hours: float) -> None:
    settings = SnapshotSettings()
    holds, caught, clicks = {}, {}, {}
    for click_rate in CLICK_RATES:
        found = [false_holds(seed, click_rate, hours, settings).holds for seed in range(days)]
        holds[f"{click_rate:g}"] = round(sum(found) / days * 24 / hours, 2) if days else None
        ends: dict[Fault, list[float]] = {fault: [] for fault in FAULTS}
        for seed in range(seeds):
            simulation = ready(1_000 + seed, click_rate, settings)
            for fault in FAULTS:
                end = clicks_until_withheld(simulation, fault)
                ends[fault] += [] if end is None else [end]
        for fault, seen in ends.items():
            caught[f"{fault}_{click_rate:g}"] = len(seen)
            clicks[f"{fault}_{click_rate:g}"] = round(statistics.median(seen)) if seen else None
    report(
        benchmark="gate",
        value=round(min(caught.values()) / seeds, 3) if seeds else None,
        unit="share caught of the fault caught least",
        seeds=seeds,
        days=days,
        holds_at_ctr_steps=sum(holds_at_steps(2_000 + seed, settings) for seed in range(-(-seeds // 10))),
        false_holds_a_day=holds,
        caught=caught,
        median_clicks=clicks,
    )


if __name__ == "__main__":
    main()
