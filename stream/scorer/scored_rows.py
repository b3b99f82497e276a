"""Scores of the candidates of several requests, from one predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.batch import FeatureBatch
from model.features import DecodedRequests
from model.predictor import Predictor

__all__ = ["ScoredRows", "score_rows"]

# Digits of a score after the point. Neighbouring float32 values near 1 differ by 6e-8, and the score of a rare click (1e-5)
# still has three digits.
DIGITS = 8
# Rows in one call of the model: some 40 MB of activations at 40 fields of 16 floats and layers of 400. More rows are no faster.
PASS_ROWS = 4_096


class Bounds(NamedTuple):
    """The rows of a request's candidates."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Scores of the candidates of some requests, by the requests' positions.

    scores  of all rows
    finite  (B,), whether each is a number
    rows    the rows of each request
    """

    scores: list[float]
    finite: npt.NDArray[np.bool_]
    rows: dict[int, Bounds]

    def of(self, index: int) -> list[float] | None:
        """The scores of a request; None if any is no number."""
        start, stop = self.rows[index]
        return self.scores[start:stop] if self.finite[start:stop].all() else None

    def first_not_finite(self, index: int) -> int:
        """The first candidate of a request whose score is no number."""
        start, stop = self.rows[index]
        return int(np.argmin(self.finite[start:stop]))


def score_rows(predictor: Predictor, decoded: DecodedRequests, wanted: Sequence[int]) -> ScoredRows:
    """Score the candidates of the wanted requests, all with one predictor."""
    offsets, batch = decoded.offsets, decoded.batch
    if len(wanted) < len(decoded.request_ids):
        batch = batch.take(np.concatenate([np.arange(offsets[index], offsets[index + 1]) for index in wanted]))
    rounded = np.round(_predict(predictor, batch), DIGITS)
    ends = np.cumsum([offsets[index + 1] - offsets[index] for index in wanted]).tolist()
    rows = {index: Bounds(start, stop) for index, start, stop in zip(wanted, [0, *ends], ends, strict=False)}
    return ScoredRows(rounded.tolist(), np.isfinite(rounded), rows)


def _predict(predictor: Predictor, batch: FeatureBatch) -> npt.NDArray[np.float64]:
    """Scores of all rows, (B,), `PASS_ROWS` at a time."""
    parts = [predictor.predict(batch.slice(start, start + PASS_ROWS)) for start in range(0, len(batch), PASS_ROWS)]
    return np.concatenate(parts or [np.empty(0, np.float32)]).astype(np.float64)
