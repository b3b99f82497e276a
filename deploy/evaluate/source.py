"""Where a run's impressions come from, and how they are changed before they are learned."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploy.datasets import DataSet, FileDataSet
from deploy.errors import EvaluationError
from deploy.evaluate.stream import Stream, from_data_set, simulated
from deploy.feeding.simulation import Simulation, simulation_schema
from deploy.settings import Settings
from model.schema import FeatureSchema
from stream.settings import JoinSettings

__all__ = ["Source"]


class Source:
    """Reads a data set, or a simulation, anew for each set of fields.

    Args:
        origin: the data set, or what to simulate.
        limit: impressions to read; all when None.
        until: read this first share of them.
        by: fields whose values are kept by key.
        keep_clicks: share of the clicked impressions that are kept, drawn at random.
        late_clicks: share of the clicks that come after the hold, with delays drawn anew; None: the clicks keep their times.
    """

    def __init__(
        self,
        origin: DataSet | Simulation,
        *,
        limit: int | None = None,
        until: float = 1.0,
        by: tuple[str, ...] = (),
        keep_clicks: float = 1.0,
        late_clicks: float | None = None,
    ) -> None:
        self._origin, self._limit, self._until, self._by = origin, limit, until, by
        self._keep_clicks, self._late_clicks = keep_clicks, late_clicks
        self._last: tuple[Any, Stream] | None = None
        self._clicks_by: JoinSettings | None = None

    @property
    def schema(self) -> FeatureSchema:
        """The fields that the data set has."""
        return simulation_schema() if isinstance(self._origin, Simulation) else self._origin.schema()

    def read(self, settings: Settings, permuted: str | None = None) -> Stream:
        """Read for the fields and the join of a run. The last stream is kept for the next call.

        Late clicks are late by the settings of the first call, so that all runs have the same clicks.

        Args:
            permuted: the values of this feature change places among neighbouring impressions.
        """
        self._clicks_by = self._clicks_by or settings.join
        wanted = settings.features, settings.join, permuted
        if self._last is None or self._last[0] != wanted:
            self._last = None  # the memory of one stream is enough
            self._last = wanted, self._changed(self._read(settings, permuted), self._clicks_by)
        return self._last[1]

    def _read(self, settings: Settings, permuted: str | None) -> Stream:
        rate = settings.join.negative_rate
        if isinstance(self._origin, Simulation):
            return simulated(self._origin, schema=settings.features, negative_rate=rate, named=self._by, permuted=permuted)
        if isinstance(self._origin, FileDataSet):
            self._origin.check(settings.features)
        return from_data_set(
            self._origin,
            schema=settings.features,
            limit=self._limit,
            negative_rate=rate,
            named=self._by,
            permuted=permuted,
        )

    def _changed(self, stream: Stream, join: JoinSettings) -> Stream:
        rows = np.arange(round(self._until * len(stream)))
        if self._keep_clicks < 1:
            drawn = np.random.default_rng(1).random(len(stream))[rows]
            rows = rows[(stream.clicked_ms[rows] < 0) | (drawn < self._keep_clicks)]
        if len(rows) < len(stream):
            stream = stream.take(rows)
        if self._late_clicks is None:
            return stream
        try:
            return stream.with_late_clicks(self._late_clicks, join.held_ms, join.window_ms)
        except ValueError as error:
            raise EvaluationError(f"--late-clicks: {error}") from error
