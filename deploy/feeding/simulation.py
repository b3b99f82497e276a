"""A stream whose true click probabilities are known.

The truth is a logistic model over users, items, their segments, device, hour and price. A stream can also change while it runs:
weights can turn (drift), items can appear and fade, the feature `hour` can change faster than a clock, and the click-through
rate can step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.datasets.encode import members, objects
from deploy.errors import DeployError
from model.schema import FeatureSchema, FieldSpec

__all__ = ["Batch", "CtrStep", "Simulation", "TruthFile", "generate", "simulation_schema"]

_BATCH = 4_096  # impressions generated at once
_USERS, _ITEMS, _SEGMENTS, _CATEGORIES, _DEVICES = 20_000, 2_000, 8, 12, 4
_ZIPF = 1.1  # popularity of users and items, as in click logs
# Standard deviations of the true weights, by feature; those of the hours are multiplied by `hour_effect`.
_SPREADS = {"user": 0.4, "item": 0.6, "device": 0.3, "hour": 1.0, "pair": 0.8, "price": 0.5}
_PRICE = 0.01  # the lowest price: the model reads its logarithm, so none is 0
_CALIBRATED_ON = 20_000  # impressions from which the bias is computed: the mean probability is met within about 1 %

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Columns = dict[str, npt.NDArray[np.generic]]


class CtrStep(NamedTuple):
    """Another mean true click probability from a point of the stream on."""

    seconds: float  # after the start
    ctr: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is simulated.

    Attributes:
        rate: impressions a second of event time.
        count: impressions.
        ctr: mean true click probability over the stream, at the weights of its start (within about 2 %).
        ctr_steps: changes of `ctr` while the stream runs, by rising time.
        delay: distribution of click delays; `delay_ms` is its mean (for uniform, half its largest value).
        shuffle_ms: each event is sent up to this much later than its time; how much is drawn for each.
        duplicates: share of events that are sent twice.
        malformed: broken records sent in addition, as a share of the impressions.
        drift: quarter turns of the true weights in 100,000 impressions; after one, they are unrelated to the first ones.
        hour_ms: length of one value of the feature `hour` in event time; each of the 24 has an effect of its own.
        hour_effect: standard deviation of these effects on the log odds.
        new_items: how many items appear in a second of event time, each with an effect of its own.
        new_item_share: share of impressions that show one of these items.
        new_item_life_s: mean age of such an item when it is shown. Such items are most popular at first, and fade.
        first_id: number of the first impression's id, so that runs on one topic don't collide.
        start_ms: event time of the first impression.
        seed: seed of everything that is drawn.
    """

    rate: float = 1_000.0
    count: int = 10_000
    ctr: float = 0.1
    ctr_steps: tuple[CtrStep, ...] = ()
    delay: Literal["exponential", "lognormal", "uniform"] = "exponential"
    delay_ms: float = 5_000.0
    shuffle_ms: int = 0
    duplicates: float = 0.0
    malformed: float = 0.0
    drift: float = 0.0
    hour_ms: int = 3_600_000
    hour_effect: float = 0.2
    new_items: float = 0.0
    new_item_share: float = 0.3
    new_item_life_s: float = 60.0
    first_id: int = 0
    start_ms: int = 1_700_000_000_000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Impressions with their truth, N of them, in event-time order."""

    ids: list[str]
    times_ms: Int64s  # (N,)
    features: list[bytes]
    probabilities: Floats  # (N,) true
    clicked: npt.NDArray[np.bool_]  # (N,)
    click_times_ms: Int64s  # (N,), -1 without a click
    item_ages_ms: Int64s  # (N,) since the item appeared; -1 for an item that was there from the start


def simulation_schema() -> FeatureSchema:
    """The features that simulated events carry."""
    names = ("user_id", "segment", "device", "hour", "item_id", "category")
    return FeatureSchema(fields=(*(FieldSpec(name=name) for name in names), FieldSpec(name="price", kind="numeric")))


class Truth:
    """The logistic model behind the clicks."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        rng = np.random.default_rng([simulation.seed, 1])
        self._weights = [self._draw(rng) for _ in range(2)]  # at the start, and after a quarter turn of drift
        for weights in self._weights:
            weights["hour"] = weights["hour"] * simulation.hour_effect
        self.segments = rng.integers(0, _SEGMENTS, _USERS)
        categories = rng.integers(0, _CATEGORIES, _ITEMS)
        # Items that appear later are numbered after the others. They have a generator of their own, so that all other draws
        # are the same with and without them.
        later = np.random.default_rng([simulation.seed, 4])
        born = int(simulation.new_items * simulation.count / simulation.rate) + 1
        self.categories = np.concatenate([categories, later.integers(0, _CATEGORIES, born)])
        for weights in self._weights:
            weights["item"] = np.concatenate([weights["item"], later.normal(0.0, _SPREADS["item"], born)])
        ctrs = [simulation.ctr, *(step.ctr for step in simulation.ctr_steps)]
        self._biases = np.array([self._bias(ctr) for ctr in ctrs])
        self._step_rows = np.array([step.seconds * simulation.rate for step in simulation.ctr_steps])

    @staticmethod
    def _draw(rng: np.random.Generator) -> dict[str, Floats]:
        sizes = {"user": _USERS, "item": _ITEMS, "device": _DEVICES, "hour": 24, "pair": _SEGMENTS * _CATEGORIES, "price": 1}
        return {name: rng.normal(0.0, _SPREADS[name], size) for name, size in sizes.items()}

    @property
    def hour_effects(self) -> Floats:
        """What each hour adds to the log odds at the start, (24,)."""
        return self._weights[0]["hour"]

    def probabilities(self, columns: Columns, rows: Int64s) -> Floats:
        """True click probability of each row, (N,)."""
        here, there = (self._logits(columns, weights) for weights in self._weights)
        angle = self._simulation.drift * np.pi / 2 * rows / 100_000
        bias = self._biases[np.searchsorted(self._step_rows, rows, side="right")]
        return _logistic(bias + np.cos(angle) * here + np.sin(angle) * there)

    @staticmethod
    def _logits(columns: Columns, weights: dict[str, Floats]) -> Floats:
        """Log odds without a bias, (N,)."""
        logits: Floats = (
            weights["user"][columns["user"]]
            + weights["item"][columns["item"]]
            + weights["device"][columns["device"]]
            + weights["hour"][columns["hour"]]
            + weights["pair"][columns["segment"].astype(np.int64) * _CATEGORIES + columns["category"].astype(np.int64)]
            + weights["price"][0] * np.log(columns["price"].astype(np.float64))  # whose logarithm is standard normal
        )
        return logits

    def _bias(self, ctr: float) -> float:
        """The bias with which a sample of the stream's impressions has a mean click probability of `ctr`."""
        rng = np.random.default_rng([self._simulation.seed, 5])
        rows = np.sort(rng.integers(0, self._simulation.count, _CALIBRATED_ON))
        columns, _ = _columns(self._simulation, self, rows, rng, np.random.default_rng([self._simulation.seed, 6]))
        logits = self._logits(columns, self._weights[0])
        low, high = -30.0, 30.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if _logistic(middle + logits).mean() < ctr else (low, middle)
        return low


def _logistic(logits: Floats) -> Floats:
    probabilities: Floats = 1.0 / (1.0 + np.exp(-logits))
    return probabilities


def generate(simulation: Simulation) -> Iterator[Batch]:
    """Impressions in event-time order with their true probabilities and clicks."""
    truth = Truth(simulation)
    rng, new_items = (np.random.default_rng([simulation.seed, number]) for number in (2, 7))
    for start in range(0, simulation.count, _BATCH):
        rows = np.arange(start, min(start + _BATCH, simulation.count), dtype=np.int64)
        times_ms = _times_ms(simulation, rows)
        columns, ages_ms = _columns(simulation, truth, rows, rng, new_items)
        probabilities = truth.probabilities(columns, rows)
        clicked = rng.random(len(rows)) < probabilities
        yield Batch(
            ids=[f"sim-{number}" for number in (rows + simulation.first_id).tolist()],
            times_ms=times_ms,
            features=_features(columns),
            probabilities=probabilities,
            clicked=clicked,
            click_times_ms=np.where(clicked, times_ms + _delays_ms(simulation, rng, len(rows)), -1),
            item_ages_ms=ages_ms,
        )


def _times_ms(simulation: Simulation, rows: Int64s) -> Int64s:
    times_ms: Int64s = simulation.start_ms + (rows * (1_000.0 / simulation.rate)).astype(np.int64)
    return times_ms


def _columns(
    simulation: Simulation, truth: Truth, rows: Int64s, rng: np.random.Generator, new_items: np.random.Generator
) -> tuple[Columns, Int64s]:
    """What is shown to whom, as numbers, and the item's age in ms (N,), -1 for an item that was there from the start."""
    times_ms = _times_ms(simulation, rows)
    users = (rng.zipf(_ZIPF, len(rows)) - 1) % _USERS
    items = (rng.zipf(_ZIPF, len(rows)) - 1) % _ITEMS
    ages_ms = np.full(len(rows), -1, np.int64)
    if simulation.new_items:
        since_ms = times_ms - simulation.start_ms
        drawn_ms = new_items.exponential(simulation.new_item_life_s * 1_000, len(rows))
        number = ((since_ms - drawn_ms) * simulation.new_items / 1_000).astype(np.int64)
        # A draw from before the start of the stream shows one of the items that were there from the start.
        new = (new_items.random(len(rows)) < simulation.new_item_share) & (drawn_ms <= since_ms)
        items = np.where(new, _ITEMS + number, items)
        ages_ms = np.where(new, since_ms - (number * 1_000 / simulation.new_items).astype(np.int64), ages_ms)
    columns: Columns = {
        "user": users,
        "segment": truth.segments[users],
        "device": rng.integers(0, _DEVICES, len(rows)),
        "hour": times_ms // simulation.hour_ms % 24,
        "item": items,
        "category": truth.categories[items],
        "price": np.round(np.exp(rng.normal(0.0, 1.0, len(rows))), 2).clip(_PRICE),
    }
    return columns, ages_ms


def _features(columns: Columns) -> list[bytes]:
    names = {"user": "u", "segment": "s", "device": "d", "item": "i", "category": "c"}  # a prefix makes the values strings

    def text(name: str) -> pa.Array:
        distinct, inverse = np.unique(columns[name], return_inverse=True)
        return pa.array([f"{names[name]}{value}" for value in distinct.tolist()]).take(pa.array(inverse))

    return objects(
        members(
            {
                "user_id": text("user"),
                "segment": text("segment"),
                "device": text("device"),
                "hour": pa.array(columns["hour"]),
                "item_id": text("item"),
                "category": text("category"),
                "price": pa.array(columns["price"]),
            }
        )
    )


def _delays_ms(simulation: Simulation, rng: np.random.Generator, count: int) -> Int64s:
    mean = simulation.delay_ms
    if simulation.delay == "exponential":
        drawn = rng.exponential(mean, count)
    elif simulation.delay == "lognormal":
        drawn = rng.lognormal(np.log(mean) - 0.5, 1.0, count)  # sigma 1: a long tail; minus 0.5 keeps the mean
    else:
        drawn = rng.uniform(0.0, 2 * mean, count)
    return drawn.astype(np.int64)


class TruthFile:
    """The true probabilities by impression id, as Parquet (`.parquet`) or JSON lines (any other name).

    Columns: `impression_id`, `timestamp`, `probability`, `clicked`, `click_timestamp` (null without a click), `item_age_ms`
    (since the item appeared; null for an item that was there from the start).

    Raises:
        DeployError: the file can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._schema = pa.schema(
            [
                ("impression_id", pa.string()),
                ("timestamp", pa.int64()),
                ("probability", pa.float64()),
                ("clicked", pa.bool_()),
                ("click_timestamp", pa.int64()),
                ("item_age_ms", pa.int64()),
            ]
        )
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(path, self._schema) if path.suffix == ".parquet" else None
            self._lines = None if self._parquet is not None else path.open("wb")

    def write(self, batch: Batch) -> None:
        """Add a batch."""
        clicks = pa.array(batch.click_times_ms, mask=~batch.clicked)
        columns = [
            pa.array(batch.ids),
            pa.array(batch.times_ms),
            pa.array(batch.probabilities),
            pa.array(batch.clicked),
            clicks,
            pa.array(batch.item_ages_ms, mask=batch.item_ages_ms < 0),
        ]
        table = pa.table(columns, schema=self._schema)
        with self._writing():
            if self._parquet is not None:
                self._parquet.write_table(table)
            elif self._lines is not None:
                self._lines.write(b"".join(msgspec.json.encode(row) + b"\n" for row in table.to_pylist()))

    def close(self) -> None:
        """Finish the file."""
        with self._writing():
            for file in (self._parquet, self._lines):
                if file is not None:
                    file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            found = error.strerror or str(error)
            raise DeployError(
                f"--truth {self._path.absolute()}: expected a file that can be written, found: {found}. Free space there, or "
                "name another file."
            ) from error
