"""A stand-in for the trainer, for benchmarks of scorers: it learns, publishes deltas, and keeps the scores of every point."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import numpy as np

from deploy.settings import Settings
from model.batch import FeatureBatch
from model.features import FeatureDecoder
from model.learner import Learner
from model.predictor import Predictor
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.gate_report import GateReport
from state.manifest import Manifest
from state.pieces import piece_rows
from state.store import SnapshotStore
from stream.deltas.writer import DeltaWriter
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from stream.trainer.captured import CapturedDelta, Position
from stream.trainer.chain import Chain

__all__ = ["CANDIDATES", "PROBES", "Trainer", "bench_settings", "features_of", "now_ms"]

FIELDS, DIM, HIDDEN = 39, 16, (400, 400, 400)
PROBES, CANDIDATES = 40, 10  # distinct requests
DELTA_S, DELTA_ROWS = 0.25, 26  # examples of a delta: each touches 39 rows


def bench_settings(bootstrap_servers: str, work: Path, scorers: int, *, heartbeat_ms: int = 1_000) -> Settings:
    """Settings for so many scorers of one thread, with all files in `work`."""
    base = Settings()
    fields = tuple(FieldSpec(name=f"f{at}") for at in range(FIELDS))
    return base.model_copy(
        update={
            "kafka": base.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers}),
            "topics": base.topics.model_copy(update={"partitions": 2, "request_partitions": max(2, scorers)}),
            "snapshots": base.snapshots.model_copy(
                update={"url": str(work / "snapshots"), "first_examples": 0, "good_after_ms": 86_400_000}
            ),
            "scorer": base.scorer.model_copy(update={"threads": 1, "heartbeat_ms": heartbeat_ms}),
            "features": FeatureSchema(fields=fields, embedding_dim=DIM),
            "state_dir": work / "state",
        }
    )


class Trainer:
    """A stand-in for the trainer: it learns, publishes deltas, and keeps the scores of the probes at every point."""

    def __init__(self, settings: Settings, rows: int) -> None:
        self._settings, self._names = settings, TopicNames.of(settings.topics)
        self._model = ModelSettings(hidden=HIDDEN)
        self.store = SnapshotStore(settings.snapshots)
        self.learner = Learner(settings.features, self._model, device="cpu")
        self._each = rows // FIELDS
        self._rng = np.random.default_rng(0)
        self._decoder = FeatureDecoder(settings.features)
        for first in range(0, self._each, 512):
            self._learn(np.repeat(np.arange(first, min(first + 512, self._each))[:, None], FIELDS, axis=1))
        self.ids = self._rng.integers(0, self._each, (PROBES * CANDIDATES, FIELDS))
        self._probes = self._batch(self.ids)
        self._dense_due_s = 0.0
        self.scores: dict[int, np.ndarray] = {}  # by sequence
        self.sequences: dict[int, int] = {}  # by version

    def _batch(self, ids: np.ndarray) -> FeatureBatch:
        impressions = [
            msgspec.json.encode({"impression_id": "i", "timestamp": 1, "features": features_of(row)}) for row in ids.tolist()
        ]
        return self._decoder.impressions(impressions).batch

    def _learn(self, ids: np.ndarray) -> None:
        self.learner.learn(self._batch(ids), self._rng.random(len(ids)) < 0.3)

    async def begin(self) -> None:
        """Take an epoch, and begin the chain with version 1."""
        self.registry = RegistryWriter(self._settings.kafka, self._names, who="trainer")
        self._epoch = await self.registry.take_trainer_epoch()
        self._writer = DeltaWriter(self._settings.kafka, self._names, epoch=self._epoch)
        await self._writer.open()
        self._chain = Chain(f"deepfm/{self._epoch}/0", self._writer, None, self.learner.touched_keys)
        self.learner.take_delta()
        self._replica = Predictor.of(self._settings.features, self._model, self.learner.serving_state(), device="cpu")
        self._chain.begin()
        await self.version(1)
        await self.registry.tag_good(1)

    async def version(self, number: int) -> None:
        """Write the weights as they are, and announce them. They are a point of the chain."""
        point = self._chain.published
        assert point is not None
        self._note()
        self.sequences[number] = point.point.sequence
        with self.learner.freeze() as frozen:
            manifest = self.store.write_version(
                Manifest(
                    version=number,
                    epoch=self._epoch,
                    created_at_ms=now_ms(),
                    examples_seen=self.learner.examples_seen,
                    chain=point.point.chain,
                    sequence=point.point.sequence,
                    deltas_offset=point.offset,
                    digest=f"{self.learner.digest:016x}",
                    verdict=GateReport(flow="flowing", clicks=1_000, negatives=1_000),
                    schema_hash=self._settings.features.fingerprint(),
                    features=self._settings.features.model_dump(mode="json"),
                    model=self._model.model_dump(mode="json"),
                ),
                dense=frozen.dense,
                small=frozen.small,
                pieces=frozen.pieces(piece_rows(DIM)),
            )
        announced = await self.registry.announce(manifest, gate=self._settings.snapshots)
        assert announced.promoted, announced.reason

    async def delta(self, *, dense: bool = False) -> None:
        """Learn some examples, and publish what they have changed; the dense weights too if they are due or asked for."""
        await asyncio.to_thread(self._learn, self._rng.integers(0, self._each, (DELTA_ROWS, FIELDS)))
        dense = dense or time.monotonic() >= self._dense_due_s
        if dense:
            self._dense_due_s = time.monotonic() + self._settings.snapshots.dense_interval_ms / 1_000
        delta = self.learner.take_delta(dense=dense)
        position = Position({0: self.learner.examples_seen}, 0, self.learner.examples_seen, 1.0, 0, now_ms())
        self._replica.apply(self._replica.prepare(delta))
        self._note(next_one=True)  # before a scorer can answer with it
        await self._chain.publish(CapturedDelta(delta, position))

    def _note(self, *, next_one: bool = False) -> None:
        assert self._chain.published is not None
        sequence = self._chain.published.point.sequence + int(next_one)
        self.scores[sequence] = self._replica.predict(self._probes).reshape(PROBES, CANDIDATES)

    async def run(self, *, dense: bool = True) -> None:
        """Publish deltas until cancelled. Without `dense` they have rows only."""
        self._dense_due_s = 0.0 if dense else float("inf")
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + DELTA_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            await self.delta()

    async def close(self) -> None:
        await self._writer.close()
        await self.registry.close()


def features_of(ids: list[int]) -> dict[str, str]:
    return {f"f{at}": str(each) for at, each in enumerate(ids)}


def now_ms() -> int:
    return time.time_ns() // 1_000_000
