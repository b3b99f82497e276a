"""A trainer that is a plain loop: weights in a dict, deltas to the log, versions to the store and the registry."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import torch

from deploy.settings import Settings
from model.digest import dense_hash, digest_sum, row_hashes
from model.rows import ModelDelta, Rows
from state.manifest import Manifest
from state.store import SnapshotStore
from stream.deltas.writer import DeltaWriter
from stream.records.delta import DeltaHeader, Point
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.judged import JUDGED
from tests.stream.scorer.factory import MODEL, SCHEMA, weights

ROWS = ("keys", "embedding", "first_order")


class PlainTrainer:
    """Its methods block. Every candidate gets the score `per_mille` / 1000, by the bias."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.names = settings, TopicNames.of(settings.topics)
        self.store = SnapshotStore(settings.snapshots)
        self.runner = asyncio.Runner()
        self.serving = weights(1)
        self.sequence, self.ordinal, self.per_mille = 0, 0, 1
        self.parent: Point | None = None
        self.start()

    def start(self) -> None:
        """Take an epoch, and begin a chain."""
        self.registry = RegistryWriter(self.settings.kafka, self.names, who="test")

        async def begin() -> None:
            self.epoch = await self.registry.take_trainer_epoch()
            self.writer = DeltaWriter(self.settings.kafka, self.names, epoch=self.epoch)
            await self.writer.open()

        self.runner.run(begin())
        self.chain = f"deepfm/{self.epoch}/0"

    def restart(self) -> None:
        """Another trainer goes on with the same weights; its first delta says so."""
        self.close(last=False)
        self.parent = Point(self.chain, self.sequence)
        self.sequence = 0
        self.start()

    def close(self, *, last: bool = True) -> None:
        self.runner.run(self.writer.close())
        self.runner.run(self.registry.close())
        if last:
            self.runner.close()

    @property
    def digest(self) -> int:
        rows = Rows(*(self.serving[name] for name in ROWS))
        return (digest_sum(row_hashes(rows)) + dense_hash(self.dense)) % 2**64

    @property
    def dense(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.serving.items() if name not in ROWS}

    def make(self, rows: int = 20, **changed: Any) -> tuple[DeltaHeader, ModelDelta]:
        """Learn something, and make the delta of it."""
        self.per_mille += 1
        first = len(self.serving["keys"]) // 2  # rewrites some rows, adds others
        keys = torch.arange(1 + first, 1 + first + rows)
        new = Rows(keys, torch.randn(rows, SCHEMA.embedding_dim), torch.randn(rows))
        kept = ~torch.isin(self.serving["keys"], keys)
        for name, tensor in zip(ROWS, (new.keys, new.embedding, new.first_order), strict=True):
            self.serving[name] = torch.cat((self.serving[name][kept], tensor))
        self.serving["bias"] = self.serving["bias"].clone().fill_(math.log(self.per_mille / (1_000 - self.per_mille)))
        before, rebase = self.parent or Point(self.chain, self.sequence), self.parent is not None
        self.sequence, self.parent = self.sequence + 1, None
        now_ms = int(time.time() * 1_000)
        fields: dict[str, Any] = {"negative_rate": 1.0, "rebase": rebase, "arrivals": (now_ms,), **changed}
        header = DeltaHeader(
            chain=self.chain,
            sequence=self.sequence,
            parent=before,
            offsets={"0": self.sequence},
            watermark_ms=0,
            examples_seen=0,
            at_ms=now_ms,
            **fields,
        )
        return header, ModelDelta(new, torch.empty(0, dtype=torch.int64), self.dense, self.digest)

    def delta(self, count: int = 1, *, digest: int | None = None) -> None:
        for _ in range(count):
            header, delta = self.make()
            if digest is not None:
                delta = ModelDelta(delta.rows, delta.gone, delta.dense, digest)
            self.runner.run(self.writer.publish(header, delta))

    def version(self, number: int, *, good: bool = True, chain: bool = True) -> None:
        """Write the weights whole and announce them; they become champion unless promotion is held."""
        point: dict[str, Any] = {}
        if chain:
            point = {"chain": self.chain, "sequence": self.sequence, "digest": f"{self.digest:016x}"}
            point["deltas_offset"] = self.writer.position
        made = Manifest(
            version=number,
            epoch=self.epoch,
            created_at_ms=int(time.time() * 1_000),
            features=SCHEMA.model_dump(mode="json"),
            model=MODEL.model_dump(mode="json"),
            verdict=JUDGED,
            **point,
        )
        manifest = self.store.write(made, self.serving, None)
        gate = self.settings.snapshots.model_copy(update={"first_examples": 0})
        self.runner.run(self.registry.announce(manifest, gate=gate))
        if good:
            self.runner.run(self.registry.tag_good(number))
