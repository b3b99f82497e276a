"""A stream whose true click probabilities are known.

The truth is a logistic model over users, items, their segments, device, hour and price; with drift its weights turn while it
runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.datasets.encode import members, objects
from deploy.errors import DeployError
from model.schema import FeatureSchema, FieldSpec

__all__ = ["Batch", "Simulation", "TruthFile", "generate", "simulation_schema"]

_BATCH = 4_096  # impressions generated at once
_USERS, _ITEMS, _SEGMENTS, _CATEGORIES, _DEVICES = 20_000, 2_000, 8, 12, 4
_ZIPF = 1.1  # popularity of users and items, as in click logs

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Columns = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is simulated.

    Attributes:
        rate: impressions a second of event time.
        count: impressions.
        ctr: mean true click probability, roughly, at the start.
        delay: distribution of click delays; `delay_ms` is its mean (uniform: half its largest value).
        shuffle_ms: an event is sent up to this much later than its time, drawn for each.
        duplicates: share of events that are sent twice.
        malformed: broken records sent in addition, as a share of the impressions.
        drift: quarter turns of the true weights towards unrelated ones in 100,000 impressions.
        first_id: numbers impressions from here, so that runs on one topic don't collide.
        start_ms: event time of the first impression.
        seed: of everything drawn.
    """

    rate: float = 1_000.0
    count: int = 10_000
    ctr: float = 0.1
    delay: Literal["exponential", "lognormal", "uniform"] = "exponential"
    delay_ms: float = 5_000.0
    shuffle_ms: int = 0
    duplicates: float = 0.0
    malformed: float = 0.0
    drift: float = 0.0
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


def simulation_schema() -> FeatureSchema:
    """The features that simulated events carry."""
    names = ("user_id", "segment", "device", "hour", "item_id", "category")
    return FeatureSchema(fields=(*(FieldSpec(name=name) for name in names), FieldSpec(name="price", kind="numeric")))


class Truth:
    """The logistic model behind the clicks."""

    def __init__(self, simulation: Simulation) -> None:
        rng = np.random.default_rng([simulation.seed, 1])
        self._weights = [self._draw(rng) for _ in range(2)]  # where drift begins, and what it turns to
        self._drift = simulation.drift
        self._bias = float(np.log(simulation.ctr / (1 - simulation.ctr))) - 0.6  # the weights' spread raises the mean
        self.segments = rng.integers(0, _SEGMENTS, _USERS)
        self.categories = rng.integers(0, _CATEGORIES, _ITEMS)

    @staticmethod
    def _draw(rng: np.random.Generator) -> dict[str, Floats]:
        sizes = {"user": _USERS, "item": _ITEMS, "device": _DEVICES, "hour": 24, "pair": _SEGMENTS * _CATEGORIES, "price": 1}
        spreads = {"user": 0.4, "item": 0.6, "device": 0.3, "hour": 0.2, "pair": 0.8, "price": 0.5}
        return {name: rng.normal(0.0, spreads[name], size) for name, size in sizes.items()}

    def probabilities(self, columns: Columns, rows: Int64s) -> Floats:
        """True click probability of each row, (N,)."""
        log_price = np.log(columns["price"].astype(np.float64))  # standard normal
        here, there = (
            weights["user"][columns["user"]]
            + weights["item"][columns["item"]]
            + weights["device"][columns["device"]]
            + weights["hour"][columns["hour"]]
            + weights["pair"][columns["segment"].astype(np.int64) * _CATEGORIES + columns["category"].astype(np.int64)]
            + weights["price"][0] * log_price
            for weights in self._weights
        )
        angle = self._drift * np.pi / 2 * rows / 100_000
        logits = self._bias + np.cos(angle) * here + np.sin(angle) * there
        return 1.0 / (1.0 + np.exp(-logits))


def generate(simulation: Simulation) -> Iterator[Batch]:
    """Impressions in event-time order with their true probabilities and clicks."""
    truth = Truth(simulation)
    rng = np.random.default_rng([simulation.seed, 2])
    gap_ms = 1_000.0 / simulation.rate
    for start in range(0, simulation.count, _BATCH):
        rows = np.arange(start, min(start + _BATCH, simulation.count), dtype=np.int64)
        times_ms = simulation.start_ms + (rows * gap_ms).astype(np.int64)
        users = (rng.zipf(_ZIPF, len(rows)) - 1) % _USERS
        items = (rng.zipf(_ZIPF, len(rows)) - 1) % _ITEMS
        columns: Columns = {
            "user": users,
            "segment": truth.segments[users],
            "device": rng.integers(0, _DEVICES, len(rows)),
            "hour": times_ms // 3_600_000 % 24,
            "item": items,
            "category": truth.categories[items],
            "price": np.round(np.exp(rng.normal(0.0, 1.0, len(rows))), 2).clip(0.01),
        }
        probabilities = truth.probabilities(columns, rows)
        clicked = rng.random(len(rows)) < probabilities
        yield Batch(
            ids=[f"sim-{number}" for number in (rows + simulation.first_id).tolist()],
            times_ms=times_ms,
            features=_features(columns),
            probabilities=probabilities,
            clicked=clicked,
            click_times_ms=np.where(clicked, times_ms + _delays_ms(simulation, rng, len(rows)), -1),
        )


def _features(columns: Columns) -> list[bytes]:
    names = {"user": "u", "segment": "s", "device": "d", "item": "i", "category": "c"}  # a prefix makes them strings

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
        drawn = rng.lognormal(np.log(mean) - 0.5, 1.0, count)  # sigma 1: a long tail, the mean as asked
    else:
        drawn = rng.uniform(0.0, 2 * mean, count)
    return drawn.astype(np.int64)


class TruthFile:
    """The true probabilities by impression id, as Parquet (`.parquet`) or JSON lines (any other name).

    Columns: `impression_id`, `timestamp`, `probability`, `clicked`, `click_timestamp` (null without a click).

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
            ]
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(path, self._schema) if path.suffix == ".parquet" else None
            self._lines = None if self._parquet is not None else path.open("wb")
        except OSError as error:
            raise DeployError(f"--truth {path}: expected a file that can be written, found: {error}. Name another.") from error

    def write(self, batch: Batch) -> None:
        """Add a batch."""
        clicks = pa.array(batch.click_times_ms, mask=~batch.clicked)
        columns = [
            pa.array(batch.ids),
            pa.array(batch.times_ms),
            pa.array(batch.probabilities),
            pa.array(batch.clicked),
            clicks,
        ]
        table = pa.table(columns, schema=self._schema)
        if self._parquet is not None:
            self._parquet.write_table(table)
        elif self._lines is not None:
            self._lines.write(b"".join(msgspec.json.encode(row) + b"\n" for row in table.to_pylist()))

    def close(self) -> None:
        """Finish the file."""
        for file in (self._parquet, self._lines):
            if file is not None:
                file.close()
