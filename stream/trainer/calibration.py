"""Calibration of served scores by decile of the score and by the top values of fields, from settled impressions.

An impression is *settled* once its late clicks have come: `trainer.settled_ms` of event time after it. Before that its label
may still be corrected, and every group would look as if it were scored too high.

The examples of a sample of impressions are kept in a ring. The sample is drawn by hash of the impression id, so that a first
label and its correction are both in it or both not. It is halved until the ring reaches back far enough to hold settled
impressions, whatever the rate of the stream. So memory is bounded: 33 bytes and 8 for each field, times `RING`.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from model.derived import shown_value
from model.errors import ModelError
from model.schema import FeatureSchema
from stream.trainer.columns import BoolArray, ExampleColumns, Float32Array, Int64Array
from stream.trainer.evaluation import counts

__all__ = ["DECILES", "TOP", "CalibrationWatch", "GroupCalibration", "is_off"]

RING = 50_000
"""Examples kept: at a CTR of 2 %, a decile has some 50 clicks or more, and a standard error of 14 % or less."""

DECILES = 10

TOP = 10
"""Values shown of each field: with the fields' names they are labels of a metric, whose number must be small."""

REACH = 3
"""How many times `settled_ms` the ring reaches back at least, so that two thirds of its impressions are settled."""

LEAST_CLICKS = 20
"""Clicks of a group below which nothing is said about it: its standard error is 22 % or more."""

TOLERANCE = 0.05
ERRORS = 3.0
"""A group is off if its calibration is away from 1 by more than this share and by more than so many standard errors."""

GATHERED = 4_096  # examples gathered before they are put into the ring: that costs more than gathering them

_SMALLEST_SHARE = 2.0**-20  # of impressions sampled: a stream of 50 million a second needs no smaller one
_FAR_MS = 1 << 62  # later than every time
_NAME_BYTES = 40  # of a value in a label; the rest is cut


class GroupCalibration(NamedTuple):
    """Expected over actual clicks of a group of settled impressions.

    field  `decile`, or the field's name
    value  number of the decile, 1 to 10 by rising score, or the value of the field
    error  standard error of the calibration, if the scores were right
    """

    field: str
    value: str
    impressions: float
    clicks: float
    calibration: float
    error: float

    @property
    def off(self) -> bool:
        """Whether the calibration is away from 1 by more than chance and more than the tolerance."""
        return is_off(self.calibration, self.error, self.clicks)


def is_off(calibration: float, error: float, clicks: float) -> bool:
    """Whether a calibration with this standard error is away from 1 by more than chance and more than the tolerance."""
    away = abs(calibration - 1)
    return clicks >= LEAST_CLICKS and away > TOLERANCE and away > ERRORS * error


@dataclass(frozen=True, slots=True)
class _Rows:
    """N examples that carry the score that they were shown with. `keys` (N, F) are those of the watched fields."""

    scores: Float32Array
    labels: Float32Array
    weights: Float32Array
    corrects: BoolArray
    impression_ms: Int64Array
    hashes: npt.NDArray[np.uint64]
    keys: Int64Array

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: npt.NDArray[np.integer] | BoolArray | slice) -> _Rows:
        return _Rows(*(getattr(self, name)[rows] for name in self.__slots__))


def _no_keys(count: int) -> Int64Array:
    return np.empty((count, 0), np.int64)


def _joined(parts: Sequence[_Rows]) -> _Rows:
    return _Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in _Rows.__slots__))


class CalibrationWatch:
    """Keeps a sample of examples. An observer of training; `observe` is for the training thread, `report` for any other.

    After a restart it begins from nothing.

    Args:
        fields: fields whose top values are watched.
        settled_ms: event time after an impression from which on its label counts as final.
        ring: examples kept.

    Raises:
        ModelError: a field isn't in the schema, or holds lists.
    """

    def __init__(self, schema: FeatureSchema, fields: Sequence[str], settled_ms: int, *, ring: int = RING) -> None:
        singles = [spec.name for spec in schema.singles]
        if unknown := [name for name in fields if name not in singles]:
            raise ModelError(
                f"trainer.calibration_fields: expected fields with a single value ({', '.join(singles)}), found "
                f"{unknown[0]!r}. Correct the setting"
            )
        self._schema = schema
        self._fields = list(fields)
        self._columns = [singles.index(name) for name in self._fields]
        self._settled_ms, self._reach_ms, self._ring = settled_ms, REACH * settled_ms, ring
        self._lock = threading.Lock()
        self._gathered: list[ExampleColumns] = []
        self._waiting = 0
        self._parts: deque[_Rows] = deque()  # oldest first
        self._share = 1.0
        self._lost_ms = -1  # newest impression of which an example is no longer in the ring
        self._watermark_ms = -1
        self._names: dict[tuple[str, int], str] = {}
        self._unnamed: set[tuple[str, int]] = set()

    def observe(self, batch: ExampleColumns, scores: Float32Array) -> None:
        """Take the examples of a batch that carry the score that they were shown with."""
        with self._lock:
            self._gathered.append(batch)
            self._waiting += len(batch)
            if self._waiting >= GATHERED:
                self._keep()

    def report(self) -> list[GroupCalibration]:
        """The groups of settled impressions: deciles, then the top values of each field. Empty while there are none."""
        with self._lock:
            self._keep()
            parts, settled_ms, lost_ms = list(self._parts), self._watermark_ms - self._settled_ms, self._lost_ms
        if not parts:
            return []
        rows = _joined(parts)
        rows = rows.take((rows.impression_ms <= settled_ms) & (rows.impression_ms > lost_ms))
        if not len(rows):
            return []
        groups = _deciles(rows)
        wanted: list[tuple[str, int]] = []
        for column, field in enumerate(self._fields):
            keys, inverse, times = np.unique(rows.keys[:, column], return_inverse=True, return_counts=True)
            for at in np.argsort(-times, kind="stable")[:TOP].tolist():
                key = int(keys[at])
                wanted.append((field, key))
                name = self._names.get((field, key))
                if name is not None:
                    groups.append(_calibration(field, name, rows.take(inverse == at)))
        with self._lock:
            self._unnamed = {each for each in wanted if each not in self._names}
            self._names = {each: self._names[each] for each in wanted if each in self._names}
        return groups

    def _keep(self) -> None:
        """Put what was gathered into the ring."""
        gathered, self._gathered, self._waiting = self._gathered, [], 0
        if not gathered:
            return
        self._watermark_ms = max(self._watermark_ms, int(np.concatenate([batch.reached_ms for batch in gathered]).max()))
        rows = self._watched(gathered)
        self._parts.append(rows.take(np.isfinite(rows.scores) & self._sampled(rows)))
        while sum(map(len, self._parts)) > self._ring:
            if self._reaches_back() or self._share < _SMALLEST_SHARE:
                lost = self._parts.popleft()
                self._lost_ms = max(self._lost_ms, int(lost.impression_ms.max(initial=-1)))
            else:
                self._share /= 2
                self._parts = deque(part.take(self._sampled(part)) for part in self._parts)

    def _reaches_back(self) -> bool:
        """Whether what is kept would still reach back far enough without its oldest part."""
        oldest_ms = min((int(part.impression_ms.min(initial=_FAR_MS)) for part in list(self._parts)[1:]), default=_FAR_MS)
        return self._watermark_ms - oldest_ms >= self._reach_ms

    def _watched(self, batches: Sequence[ExampleColumns]) -> _Rows:
        if self._unnamed:
            for batch in batches:
                self._find_names(batch)
        columns = self._columns
        return _Rows(
            scores=np.concatenate([batch.served for batch in batches]),
            labels=np.concatenate([batch.labels for batch in batches]),
            weights=np.concatenate([counts(batch) for batch in batches]),
            corrects=np.concatenate(
                [np.zeros(len(batch), np.bool_) if batch.corrects is None else batch.corrects for batch in batches]
            ),
            impression_ms=np.concatenate([batch.impression_ms for batch in batches]),
            hashes=np.concatenate([batch.id_hashes for batch in batches]).view(np.uint64),
            keys=np.concatenate([batch.batch.keys[:, columns] if columns else _no_keys(len(batch)) for batch in batches]),
        )

    def _sampled(self, rows: _Rows) -> BoolArray:
        if self._share >= 1:
            return np.ones(len(rows), np.bool_)
        # The gate draws its sample by a multiple of the hash, so neither sample is a part of the other.
        return (rows.hashes >> np.uint64(11)).astype(np.float64) / 2.0**53 < self._share

    def _find_names(self, batch: ExampleColumns) -> None:
        """The values of keys that are to be shown, from the first example that has them."""
        for field, column in zip(self._fields, self._columns, strict=True):
            keys = [key for name, key in self._unnamed if name == field]
            found, rows = np.unique(batch.batch.keys[:, column], return_index=True)
            for key in keys:
                at = int(np.searchsorted(found, key))
                if at < len(found) and found[at] == key:
                    row = int(rows[at])
                    self._names[field, key] = self._value(batch.records[row].value, column, int(batch.impression_ms[row]))
                    self._unnamed.discard((field, key))

    def _value(self, event: bytes | None, column: int, time_ms: int) -> str:
        """The value of a field in an event, as a label shows it."""
        features = msgspec.json.decode(event or b"{}").get("features", {})
        return shown_value(self._schema.singles[column], self._schema, features, time_ms)[:_NAME_BYTES]


def _deciles(rows: _Rows) -> list[GroupCalibration]:
    """Ten groups of as many first labels each; a correction is in the group of its score, which is its first label's."""
    firsts = np.sort(rows.scores[~rows.corrects])
    if not len(firsts):
        return []
    edges = firsts[np.arange(1, DECILES) * len(firsts) // DECILES]
    decile = np.searchsorted(edges, rows.scores, side="right")
    return [_calibration("decile", str(number + 1), rows.take(decile == number)) for number in range(DECILES)]


def _calibration(field: str, value: str, rows: _Rows) -> GroupCalibration:
    """The sums of a group. A correction to 1 adds a click and no impression; one to 0 takes a click away."""
    weights = rows.weights.astype(np.float64)
    first, clicked = ~rows.corrects, rows.labels > 0.5
    impressions = float(weights[first].sum())
    clicks = float(weights[clicked].sum() - weights[~first & ~clicked].sum())
    p = rows.scores[first].astype(np.float64)
    expected = float(weights[first] @ p)
    error = math.sqrt(float(weights[first] ** 2 @ (p * (1 - p))))
    known = clicks > 0
    return GroupCalibration(
        field,
        value,
        impressions,
        clicks,
        expected / clicks if known else math.nan,
        error / clicks if known else math.nan,
    )
