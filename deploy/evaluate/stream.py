"""Impressions of a data set or of a simulation, decoded for one schema and held in memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from deploy.datasets import DataSet
from deploy.datasets.base import draw_uniform
from deploy.errors import DataSetError
from deploy.feeding.replay import impressions
from deploy.feeding.simulation import Simulation, generate, simulation_schema
from model.batch import FeatureBatch
from model.derived import shown_value
from model.features import FeatureDecoder
from model.schema import FeatureSchema
from stream.join.sampling import Sampling

__all__ = ["Bools", "Floats", "Int64s", "Stream", "from_data_set", "simulated"]

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

PERMUTED_WITHIN = 1_000
"""Impressions among which the values of a permuted field change places. They are neighbours in time, so that the values are as
new and as frequent as before."""


@dataclass(frozen=True, slots=True)
class Stream:
    """N impressions in event-time order.

    shown_ms       (N,): event times
    clicked_ms     (N,): times of the clicks; -1 without a click
    probabilities  (N,): true probability of a click at any time; NaN if unknown
    ages_ms        (N,): time since the item first appeared; -1 for items that exist from the start
    kept           (N,): whether the join sends the impression's negative; None when it sends all
    values         for each field that was asked for, the values of its keys, as they stand in the events
    """

    name: str
    schema: FeatureSchema
    batch: FeatureBatch
    shown_ms: Int64s
    clicked_ms: Int64s
    probabilities: Floats
    ages_ms: Int64s
    kept: Bools | None = None
    values: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.shown_ms)

    def labels(self, window_ms: int) -> Bools:
        """Whether each impression was clicked within the attribution window, (N,)."""
        return (self.clicked_ms >= 0) & (self.clicked_ms - self.shown_ms <= window_ms)

    def take(self, rows: Int64s) -> Stream:
        """Only these impressions; `rows` (M,) ascend."""
        return replace(
            self,
            batch=self.batch.take(rows),
            shown_ms=self.shown_ms[rows],
            clicked_ms=self.clicked_ms[rows],
            probabilities=self.probabilities[rows],
            ages_ms=self.ages_ms[rows],
            kept=None if self.kept is None else self.kept[rows],
        )

    def with_late_clicks(self, late: float, hold_ms: int, window_ms: int) -> Stream:
        """The same clicks at other times: exponential delays within the window, of which a share `late` is beyond the hold.

        Raises:
            ValueError: no exponential delays have that share.
        """
        most = 1 - hold_ms / window_ms
        if not 0 < late < most:
            raise ValueError(
                f"expected a share above 0 and below {most:.3g}, which is the most that clicks spread over join.window_ms have "
                f"after join.hold_ms, found {late:g}. Change it, or one of these settings."
            )
        mean_ms = _mean_delay(late, hold_ms, window_ms)
        drawn = draw_uniform(np.arange(len(self), dtype=np.int64), seed=1)
        delays_ms = -mean_ms * np.log1p(drawn * math.expm1(-window_ms / mean_ms))
        clicked_ms = self.shown_ms + np.minimum(delays_ms, window_ms).astype(np.int64)
        return replace(self, clicked_ms=np.where(self.clicked_ms >= 0, clicked_ms, -1))


def _mean_delay(late: float, hold_ms: int, window_ms: int) -> float:
    """Mean of the exponential delays of which, cut at the window, the share `late` is beyond the hold."""
    low, high = hold_ms / 1e3, 1e6 * window_ms
    for _ in range(200):
        mean = math.sqrt(low * high)
        beyond = (math.exp(-hold_ms / mean) - math.exp(-window_ms / mean)) / -math.expm1(-window_ms / mean)
        low, high = (mean, high) if beyond < late else (low, mean)
    return mean


def simulated(
    simulation: Simulation,
    name: str = "simulation",
    *,
    schema: FeatureSchema | None = None,
    negative_rate: float = 1.0,
    named: Collection[str] = (),
    permuted: str | None = None,
) -> Stream:
    """The stream of a simulation. Arguments are as those of `from_data_set`."""
    decoder, sampling = FeatureDecoder(schema or simulation_schema()), Sampling(negative_rate)
    names = _Names(decoder.schema, named)
    rng = np.random.default_rng([simulation.seed, 1])
    batches, decoded = list(generate(simulation)), list[FeatureBatch]()
    for batch in batches:
        features = batch.features if permuted is None else _permuted(batch.features, permuted, rng)
        decoded.append(_decoded(decoder, _events(batch.times_ms, features), batch.times_ms))
        names.add(decoded[-1], features, batch.times_ms)
    return Stream(
        name=name,
        schema=decoder.schema,
        batch=FeatureBatch.concat(decoded),
        shown_ms=np.concatenate([batch.times_ms for batch in batches]),
        clicked_ms=np.concatenate([batch.click_times_ms for batch in batches]),
        probabilities=np.concatenate([batch.probabilities for batch in batches]),
        ages_ms=np.concatenate([batch.item_ages_ms for batch in batches]),
        kept=None if negative_rate >= 1 else np.array([sampling.keeps(name.encode()) for each in batches for name in each.ids]),
        values=names.values,
    )


def from_data_set(
    data_set: DataSet,
    *,
    schema: FeatureSchema | None = None,
    limit: int | None = None,
    negative_rate: float = 1.0,
    named: Collection[str] = (),
    permuted: str | None = None,
    seed: int = 0,
) -> Stream:
    """The impressions of a data set, with its own click delays.

    Args:
        schema: the fields to read, by default all that the data set has.
        limit: read that many impressions from the start; all when None.
        negative_rate: share of the negatives that the join sends (`join.negative_rate`).
        named: fields whose values are kept by key (`Stream.values`).
        permuted: the values of this feature change places among neighbouring impressions.
        seed: decides which ones.

    Raises:
        DataSetError: the data set isn't there, is empty, or has an event that the model would reject.
    """
    decoder = FeatureDecoder(schema or data_set.schema())
    sampling = Sampling(negative_rate)
    batches, shown_ms, clicked_ms = list[FeatureBatch](), list[Int64s](), list[Int64s]()
    kept = list[bool]()
    names = _Names(decoder.schema, named)
    rng = np.random.default_rng([seed, 1])
    left = limit
    for chunk in data_set.chunks():
        if left is not None:
            chunk = chunk.head(left)
            left -= len(chunk)
        if not len(chunk):
            break
        if permuted is not None:
            chunk = replace(chunk, features=_permuted(chunk.features, permuted, rng))
        batch = _decoded(decoder, impressions(chunk, range(len(chunk)), {}), chunk.timestamps_ms, data_set.name)
        names.add(batch, chunk.features, chunk.timestamps_ms)
        batches.append(batch)
        shown_ms.append(chunk.timestamps_ms)
        clicked_ms.append(np.where(chunk.clicked, chunk.click_timestamps_ms, -1))
        if negative_rate < 1:
            kept += [sampling.keeps(each.encode()) for each in chunk.ids]
    if not batches:
        raise DataSetError(f"{data_set.name}: expected at least one impression, found none. Check its file.")
    count = sum(map(len, shown_ms))
    return Stream(
        name=data_set.name,
        schema=decoder.schema,
        batch=FeatureBatch.concat(batches),
        shown_ms=np.concatenate(shown_ms),
        clicked_ms=np.concatenate(clicked_ms),
        probabilities=np.full(count, np.nan),
        ages_ms=np.full(count, -1, np.int64),
        kept=np.array(kept) if negative_rate < 1 else None,
        values=names.values,
    )


def _events(times_ms: Int64s, features: Sequence[bytes]) -> list[bytes]:
    return [
        b'{"impression_id":"-","timestamp":%d,"features":%b}' % (when, each)
        for when, each in zip(times_ms.tolist(), features, strict=True)
    ]


def _decoded(decoder: FeatureDecoder, events: Sequence[bytes], times_ms: Int64s, name: str = "simulation") -> FeatureBatch:
    decoded = decoder.impressions(events, times_ms)
    if decoded.bad:
        bad = decoded.bad[0]
        raise DataSetError(
            f"{name}: expected events that the model can read, found {len(decoded.bad)} that it would reject, the first "
            f"because of {bad.path}: {bad.message}. Correct the data, or change the fields ([features] in the settings)."
        )
    return decoded.batch


def _permuted(features: Sequence[bytes], name: str, rng: np.random.Generator) -> list[bytes]:
    """The features with the values of `name` in other places. Whoever had no value may get one, and the other way round."""
    rows: list[dict[str, Any]] = [msgspec.json.decode(each) for each in features]
    order = np.arange(len(rows))
    for start in range(0, len(rows), PERMUTED_WITHIN):
        rng.shuffle(order[start : start + PERMUTED_WITHIN])
    values = [row.get(name) for row in rows]
    return [msgspec.json.encode({**row, name: values[other]}) for row, other in zip(rows, order.tolist(), strict=True)]


class _Names:
    """Finds the value that stands for each key of some single-valued fields."""

    def __init__(self, schema: FeatureSchema, named: Collection[str]) -> None:
        self._schema = schema
        self._columns = {spec.name: index for index, spec in enumerate(schema.singles) if spec.name in named}
        self.values: dict[str, dict[int, str]] = {name: {} for name in self._columns}

    def add(self, batch: FeatureBatch, features: Sequence[bytes], times_ms: Int64s) -> None:
        """Note the values of keys that were not seen before. A bucket of numbers is named by the first number in it."""
        for name, column in self._columns.items():
            known, spec = self.values[name], self._schema.singles[column]
            keys, firsts = np.unique(batch.keys[:, column], return_index=True)
            for key, row in zip(keys.tolist(), firsts.tolist(), strict=True):
                if key not in known:
                    known[key] = shown_value(spec, self._schema, msgspec.json.decode(features[row]), int(times_ms[row]))
