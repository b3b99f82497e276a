"""Watches the stream for abrupt changes (`state.drift`): sums over the batches that are learned, before a delta leaves."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from model.batch import FeatureBatch
from model.errors import ModelError
from model.hashing import missing_key
from model.schema import FeatureSchema
from state.drift import BLOCK_EXAMPLES, DriftBlock, DriftState, DriftWatch
from state.drift_tests import histogram
from state.settings import SnapshotSettings
from stream.trainer.bookkeeping import State, from_json, to_json
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import counts
from stream.trainer.logits import logits

__all__ = ["Drift"]

log = logging.getLogger(__name__)


class Drift:
    """Sums up batches for a `DriftWatch`. For the training thread; `problem`, `alarm` and `watch` may be read in any.

        drift = Drift(schema, settings.snapshots)
        drift.observe(batch, scores)    # all batches
        drift.problem                   # "" or why deltas are to be withheld
        drift.accept()                  # they leave whatever has changed

    As a part of the bookkeeping it is saved with versions.
    """

    def __init__(self, schema: FeatureSchema, settings: SnapshotSettings) -> None:
        single = schema.singles
        lists = schema.lists
        self._missing = np.array([missing_key(field.hash_space) for field in single], np.int64)
        self._missing_lists = np.array([missing_key(field.hash_space) for field in lists], np.int64)
        self._settings, self._fields = settings, [field.name for field in (*single, *lists)]
        self.watch = DriftWatch(settings, self._fields)
        self._gathered: list[tuple[ExampleColumns, npt.NDArray[np.float32]]] = []
        self._rows = 0

    @property
    def problem(self) -> str:
        """Why what is learned is to be withheld; empty while nothing is wrong."""
        return self.watch.state.problem

    @property
    def alarm(self) -> str:
        """What is unusual about the click rate; empty while nothing is."""
        return self.watch.state.alarm

    @property
    def explained(self) -> tuple[float, float]:
        """By how many logits, from and to, clicks explain that all scores move: (0, 0) while the click rate is as usual."""
        return (0.0, 0.0) if self.problem else self.watch.state.explained

    def observe(self, batch: ExampleColumns, scores: npt.NDArray[np.float32]) -> None:
        """Take a batch that was learned, with the scores from before its update."""
        self._gathered.append((batch, scores))
        self._rows += len(batch)
        # A block must close at the same batch whether or not the sums were saved in between.
        if self._rows + self.watch.state.open.examples >= BLOCK_EXAMPLES:
            self._take_in()

    def accept(self) -> None:
        """Take what has changed for normal from now on."""
        self.watch.accept()

    def state(self) -> State:
        """Everything observed so far."""
        self._take_in()
        return {"state": to_json(self.watch.state), "fields": to_json(self._fields)}

    def restore(self, state: State) -> None:
        """Go on from what `state` gave. Raises ModelError for an unknown layout, or other fields."""
        if from_json(state.get("fields"), list[str]) != self._fields:
            raise ModelError("saved sums of drift: expected those of this schema's fields, found others")
        self.watch = DriftWatch(self._settings, self._fields, from_json(state.get("state"), DriftState))

    def _take_in(self) -> None:
        gathered, self._gathered, self._rows = self._gathered, [], 0
        if not gathered:
            return
        before = self.alarm
        self.watch.add(self._sums(gathered))
        if self.alarm and not before:
            log.error("drift: %s. Nothing is withheld for that", self.alarm)
        elif before and not self.alarm:
            log.info("drift: the click rate is as usual again")

    def _sums(self, gathered: list[tuple[ExampleColumns, npt.NDArray[np.float32]]]) -> DriftBlock:
        batch = FeatureBatch.concat([each.batch for each, _ in gathered])
        weights = np.concatenate([counts(each) for each, _ in gathered]).astype(np.float64)
        labels = np.concatenate([each.labels for each, _ in gathered])
        live = logits(np.concatenate([scores for _, scores in gathered]))
        none = [np.zeros(len(each), np.bool_) if each.corrects is None else each.corrects for each, _ in gathered]
        corrects = np.concatenate(none)
        # A correction isn't another impression: it moves a click, and nothing else.
        first = np.where(corrects, 0.0, weights)
        known = np.where(np.isfinite(live), first, 0.0)
        moved = np.where(labels > 0.5, weights, np.where(corrects, -weights, 0.0))
        return DriftBlock(
            examples=float(len(labels) - int(corrects.sum())),
            weight=float(first.sum()),
            squares=float((first * first).sum()),
            nulls=(first @ self._nulls(batch)).tolist(),
            logits=histogram(np.nan_to_num(live), known).tolist(),
            clicks=float(moved.sum()),
        )

    def _nulls(self, batch: FeatureBatch) -> npt.NDArray[np.float64]:
        """Which fields have no value, (B, F), lists last."""
        single = batch.keys == self._missing
        if not batch.lists:
            return single.astype(np.float64)
        starts = batch.list_offsets[:-1]
        alone = np.diff(batch.list_offsets) == 1
        absent = (alone & (batch.list_keys[starts] == np.tile(self._missing_lists, len(batch)))).reshape(
            len(batch), batch.lists
        )
        return np.concatenate((single, absent), 1).astype(np.float64)
