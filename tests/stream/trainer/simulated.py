"""The simulator's events through the real join and the real trainer, without Kafka: what becomes of known probabilities."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from deploy.feeding.simulation import Batch, Simulation, generate
from model.features import FeatureDecoder
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.join_state import JoinState, StateOptions
from stream.join.events import Events
from stream.kafka.transport import Run
from stream.settings import JoinSettings
from stream.trainer.batching import BatchCutter
from stream.trainer.evaluation import Evaluation, Report
from stream.trainer.examples import ExampleDecoder
from stream.trainer.training import Training
from tests.stream.join.oracle import Partition
from tests.stream.join.written import written
from tests.stream.trainer.factory import metrics

__all__ = ["Calibration", "Chain"]

# What carries most of the true odds: a small model knows it after some ten thousand examples.
SCHEMA = FeatureSchema(fields=tuple(FieldSpec(name=name) for name in ("segment", "category", "device")), embedding_dim=4)
MODEL = ModelSettings(
    hidden=(8,),
    batch_rows=128,
    dense_learning_rate=2e-3,
    row_learning_rate=0.02,
    initial_rows=256,
    row_history=False,
    cross_layers=0,
)


class Calibration:
    """Sums over scored impressions; the truth is known, so no label's luck is in them."""

    def __init__(self) -> None:
        self.scores = self.probabilities = 0.0

    def __float__(self) -> float:
        return self.scores / self.probabilities


class Chain:
    """A join and a trainer. `without` are headers that are taken from examples on the way, to show what they are good for."""

    def __init__(self, folder: Path, join: JoinSettings, *, without: tuple[str, ...] = ()) -> None:
        self._join, self._without = join, without
        self._partition: Any = Partition(join)
        self._partition.state = JoinState(folder / "state", StateOptions(8))
        self.learner = Learner(SCHEMA, MODEL, device="cpu")
        self.scores = Evaluation(20_000)
        cutter = BatchCutter(MODEL.batch_rows, {0: 0})
        self.training = Training(self.learner, cutter, self.scores, metrics(), max_batch_age_s=0)
        self._examples, self._features = ExampleDecoder(SCHEMA), FeatureDecoder(SCHEMA)
        self._offset = 0
        self._clicks: list[tuple[int, bytes]] = []  # to come

    def play(self, simulation: Simulation, *, measured_from: float) -> Calibration:
        """Score impressions as they come, from a share of the stream on, then join and learn them."""
        seen, calibration = 0, Calibration()
        for batch in generate(simulation):
            values = [
                b'{"impression_id":"%b","timestamp":%d,"features":%b}' % (name.encode(), time_ms, features)
                for name, time_ms, features in zip(batch.ids, batch.times_ms.tolist(), batch.features, strict=True)
            ]
            if seen >= measured_from * simulation.count:
                scores = self.learner.predict(self._features.impressions(values).batch)
                calibration.scores += float(scores.sum(dtype=np.float64))
                calibration.probabilities += float(batch.probabilities.sum())
            seen += len(values)
            self._learn(batch, values)
        return calibration

    def report(self) -> Report:
        return self.scores.freeze().report()

    def close(self) -> None:
        self._partition.state.close()

    def _learn(self, batch: Batch, values: list[bytes]) -> None:
        partition, until_ms = self._partition, int(batch.times_ms[-1])
        keys = [name.encode() for name in batch.ids]
        late = zip(batch.click_times_ms.tolist(), keys, batch.clicked.tolist(), strict=True)
        self._clicks = sorted([*self._clicks, *((time_ms, key) for time_ms, key, clicked in late if clicked)])
        now = [click for click in self._clicks if click[0] <= until_ms]
        del self._clicks[: len(now)]
        impressions = events(keys, batch.times_ms.tolist(), values, partition.impressions, until_ms)
        clicks = events(
            [key for _, key in now], [time_ms for time_ms, _ in now], [b"{}"] * len(now), partition.clicks, until_ms
        )
        plan = partition.step([("impressions", impressions), ("clicks", clicks)])
        records = []
        for offset, (key, value, headers) in enumerate(written(plan, self._join.negative_rate), self._offset):
            kept = tuple(header for header in headers if header[0] not in self._without)
            records.append(
                SimpleNamespace(
                    topic="examples", partition=0, offset=offset, timestamp=until_ms, key=key, value=value, headers=kept
                )
            )
        run = Run("examples", 0, self._offset, self._offset + len(records), records)
        self._offset = run.after
        decoded = self._examples.decode(run)
        assert not decoded.letters
        self.training.add(decoded)
        while self.training.step(0.0, more_at_hand=True):
            pass


def events(keys: list[bytes], times_ms: list[int], values: list[bytes], first: int, mark_ms: int) -> Events:
    records: list[Any] = [
        SimpleNamespace(key=key, value=value, timestamp=mark_ms) for key, value in zip(keys, values, strict=True)
    ]
    return Events(keys, times_ms, list(range(first, first + len(keys))), values, records, watermark_ms=mark_ms)
