"""A stream whose true click probabilities are known, with what real streams do to a pipeline.

The truth is a logistic model over users, items, their segments, device, hour and price; with drift its weights turn while it
runs. Order, repetition and garbage are put in afterwards, so that they change what arrives and never what is true.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
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
from deploy.feed import Feed, Pace
from deploy.settings import Settings
from model.schema import FeatureSchema, FieldSpec
from stream.topics import TopicNames

__all__ = ["Batch", "Simulation", "SimulationStats", "Simulator", "TruthFile"]

_BATCH = 4_096  # impressions generated at once
_STEP = 1_000  # events handed over at once
_MARGIN_MS = 1_000  # of the last watermark beyond the last window
_REPEAT_MS = 2_000  # a duplicate comes up to this long after the first

_USERS, _ITEMS, _SEGMENTS, _CATEGORIES, _DEVICES = 20_000, 2_000, 8, 12, 4
_ZIPF = 1.1  # popularity of users and items, as in click logs

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]


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


@dataclass(slots=True)
class SimulationStats:
    """Counts so far; safe to read from another thread."""

    impressions: int = 0  # distinct
    clicks: int = 0  # distinct
    duplicates: int = 0
    malformed: int = 0
    event_time_ms: int = -1
    watermark_ms: int = -1
    elapsed_s: float = 0.0

    @property
    def events(self) -> int:
        return self.impressions + self.clicks + self.duplicates + self.malformed

    @property
    def events_per_s(self) -> float:
        return self.events / self.elapsed_s if self.elapsed_s > 0 else 0.0


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

    def probabilities(self, columns: dict[str, npt.NDArray[np.generic]], rows: Int64s) -> Floats:
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


class Simulator:
    """One simulated stream.

    ```python
    simulator = Simulator(Simulation(rate=2_000, count=100_000, drift=0.5), settings)
    simulator.run()                        # or: await simulator.run_async()
    ```

    Args:
        paced: send each event when its time has come (by the simulation's own clock); else as fast as it goes.
        truth: file to write the true probabilities to.
        end_watermark: end with a watermark record beyond the last window.
        on_progress: called after every step.
    """

    def __init__(
        self,
        simulation: Simulation,
        settings: Settings,
        *,
        paced: bool = True,
        truth: TruthFile | None = None,
        end_watermark: bool = True,
        on_progress: Callable[[SimulationStats], None] | None = None,
    ) -> None:
        self.stats = SimulationStats()
        self._simulation = simulation
        self._settings = settings
        self._topics = TopicNames.of(settings.topics)
        self._pace = Pace(speed=1.0 if paced else None)
        self._truth = truth
        self._end_watermark = end_watermark
        self._on_progress = on_progress
        self._stop = threading.Event()

    @staticmethod
    def schema() -> FeatureSchema:
        """The features that the events carry."""
        names = ("user_id", "segment", "device", "hour", "item_id", "category")
        return FeatureSchema(fields=(*(FieldSpec(name=name) for name in names), FieldSpec(name="price", kind="numeric")))

    def stop(self) -> None:
        """End early, watermark included; safe from any thread."""
        self._stop.set()

    def run(self) -> SimulationStats:
        """Send it all, in an event loop of its own. Raises as `run_async`."""
        return asyncio.run(self.run_async())

    async def run_async(self) -> SimulationStats:
        """Send it all.

        Raises:
            FeedError: Kafka or a topic is not there, or doesn't take the events.
            DeployError: the truth file can't be written.
        """
        began = time.monotonic()
        self._pace.begin(self._simulation.start_ms)
        latest_ms = -1
        try:
            async with Feed(self._settings.kafka) as feed:
                for sends in _arrivals(self.batches(), self._simulation):
                    latest_ms = max(latest_ms, int(sends.event_times_ms.max()))
                    await self._send(feed, sends, began)
                    if self._stop.is_set():
                        break
                await feed.flush()
                if self._end_watermark and latest_ms >= 0:
                    join = self._settings.join
                    self.stats.watermark_ms = latest_ms + join.window_ms + join.lateness_ms + _MARGIN_MS
                    await feed.watermark((self._topics.impressions, self._topics.clicks), self.stats.watermark_ms)
                    await feed.flush()
        finally:
            if self._truth is not None:
                self._truth.close()
        self._report(began)
        return self.stats

    def batches(self) -> Iterator[Batch]:
        """What is true: impressions and their clicks, before anything is done to their order. Writes the truth file."""
        for batch in generate(self._simulation):
            if self._truth is not None:
                self._truth.write(batch)
            yield batch

    async def _send(self, feed: Feed, sends: _Sends, began: float) -> None:
        position = 0
        while position < len(sends.times_ms) and not self._stop.is_set():
            stop = self._pace.due(sends.times_ms, position, self.stats.events, _STEP)
            if stop == position:
                await asyncio.sleep(self._pace.pause_s(int(sends.times_ms[position]), self.stats.events))
                continue
            for topic, is_click in ((self._topics.impressions, False), (self._topics.clicks, True)):
                rows = [row for row in range(position, stop) if sends.is_click[row] == is_click]
                await feed.send(topic, [sends.keys[row] for row in rows], [sends.values[row] for row in rows])
            what = sends.what[position:stop]
            clicks = sends.is_click[position:stop]
            self.stats.impressions += int(((what == _FIRST) & ~clicks).sum())
            self.stats.clicks += int(((what == _FIRST) & clicks).sum())
            self.stats.duplicates += int((what == _AGAIN).sum())
            self.stats.malformed += int((what == _BROKEN).sum())
            self.stats.event_time_ms = int(sends.times_ms[stop - 1])
            position = stop
            self._report(began)

    def _report(self, began: float) -> None:
        self.stats.elapsed_s = time.monotonic() - began
        if self._on_progress is not None:
            self._on_progress(self.stats)


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
        columns: dict[str, npt.NDArray[np.generic]] = {
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


def _features(columns: dict[str, npt.NDArray[np.generic]]) -> list[bytes]:
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


_FIRST, _AGAIN, _BROKEN = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Sends:
    """Records in the order in which they are sent."""

    times_ms: Int64s  # when each is sent, never falling
    event_times_ms: Int64s
    is_click: npt.NDArray[np.bool_]
    what: Int64s  # _FIRST, _AGAIN or _BROKEN
    keys: list[bytes]
    values: list[bytes | None]


# One of each way in which producers get it wrong; the id in the key tells them apart from real ones.
_GARBAGE: tuple[bytes | None, ...] = (
    b'{"impression_id":"%b","timestamp":',
    b'{"impression_id":"%b","timestamp":"yesterday","features":{}}',
    b'{"timestamp":1700000000000,"features":{},"note":"%b"}',
    b'{"impression_id":"not-%b","timestamp":1700000000000,"features":{}}',
    b"\xff\xfe%b",
    None,
)


def _arrivals(batches: Iterator[Batch], simulation: Simulation) -> Iterator[_Sends]:
    """Put events in the order of arrival: clicks among impressions, delays, duplicates, garbage."""
    rng = np.random.default_rng([simulation.seed, 3])
    waiting: _Sends | None = None
    for batch in batches:
        sends = _join(waiting, _of(batch, simulation, rng))
        order = np.argsort(sends.times_ms, kind="stable")
        # What the next batch may still come before has to wait for it.
        ready = int(np.searchsorted(sends.times_ms[order], int(batch.times_ms[-1]), side="left"))
        waiting = _take(sends, order[ready:])
        if ready:
            yield _take(sends, order[:ready])
    if waiting is not None and len(waiting.keys):
        yield waiting


def _of(batch: Batch, simulation: Simulation, rng: np.random.Generator) -> _Sends:
    encode = msgspec.json.encode
    clicked = np.flatnonzero(batch.clicked)
    keys = [name.encode() for name in batch.ids]
    keys += [keys[row] for row in clicked.tolist()]
    times = np.concatenate([batch.times_ms, batch.click_times_ms[clicked]])
    listed = times.tolist()
    count = len(batch.ids)
    values: list[bytes | None] = [
        b'{"impression_id":%b,"timestamp":%d,"features":%b}' % (encode(batch.ids[row]), listed[row], batch.features[row])
        for row in range(count)
    ]
    values += [
        b'{"impression_id":%b,"timestamp":%d}' % (encode(batch.ids[row]), when)
        for row, when in zip(clicked.tolist(), listed[count:], strict=True)
    ]
    is_click = np.arange(len(times)) >= count
    sent = times + (rng.integers(0, simulation.shuffle_ms + 1, len(times)) if simulation.shuffle_ms else 0)
    again = np.flatnonzero(rng.random(len(times)) < simulation.duplicates)
    sends = _Sends(sent, times, is_click, np.full(len(times), _FIRST), keys, values)
    if len(again):
        repeated = _take(sends, again)
        later = repeated.times_ms + rng.integers(1, _REPEAT_MS, len(again))
        sends = _join(
            sends,
            _Sends(
                later, repeated.event_times_ms, repeated.is_click, np.full(len(again), _AGAIN), repeated.keys, repeated.values
            ),
        )
    broken = np.flatnonzero(rng.random(count) < simulation.malformed)
    if len(broken):
        names = [b"broken-%b" % keys[row] for row in broken.tolist()]
        kinds = rng.integers(0, len(_GARBAGE), len(broken)).tolist()
        bad: list[bytes | None] = []
        for name, kind in zip(names, kinds, strict=True):
            pattern = _GARBAGE[kind]
            bad.append(None if pattern is None else pattern % name)
        when = batch.times_ms[broken]
        flags = rng.random(len(broken)) < 0.5
        sends = _join(sends, _Sends(when, when, flags, np.full(len(broken), _BROKEN), names, bad))
    return sends


def _join(first: _Sends | None, second: _Sends) -> _Sends:
    if first is None:
        return second
    return _Sends(
        np.concatenate([first.times_ms, second.times_ms]),
        np.concatenate([first.event_times_ms, second.event_times_ms]),
        np.concatenate([first.is_click, second.is_click]),
        np.concatenate([first.what, second.what]),
        first.keys + second.keys,
        first.values + second.values,
    )


def _take(sends: _Sends, rows: npt.NDArray[np.int64]) -> _Sends:
    listed = rows.tolist()
    return _Sends(
        sends.times_ms[rows],
        sends.event_times_ms[rows],
        sends.is_click[rows],
        sends.what[rows],
        [sends.keys[row] for row in listed],
        [sends.values[row] for row in listed],
    )


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
