"""Stand-ins for what the trainer's parts use: a learner that remembers, a log of deltas in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.learner import Learner
from model.rows import ModelDelta, Rows
from state.manifest import Manifest
from state.store import SnapshotStore
from stream.deltas.writer import Sent
from stream.records.delta import encode_delta
from stream.records.delta_assembly import Delta, assemble
from stream.trainer.captured import CapturedVersion

NO_KEYS = torch.empty(0, dtype=torch.int64)


class FakeFrozen:
    """A model without rows."""

    def __init__(self, dense: dict[str, torch.Tensor], small: dict[str, torch.Tensor]) -> None:
        self.dense, self.small, self.rows, self.closed = dense, small, 0, False

    def pieces(self, rows_per_piece: int) -> Any:
        assert not self.closed
        return iter(())

    def close(self) -> None:
        self.closed = True


class FakeLearner:
    """Remembers which examples it was shown. Each batch touches one row."""

    def __init__(self) -> None:
        self.examples_seen = 0
        self.negative_rate = 1.0
        self.batches: list[list[int]] = []
        self.weights: list[list[float] | None] = []
        self.digest = 0
        self.weight = 1.0
        self.expected: list[int] = []
        self._touched: set[int] = set()

    def learn(self, batch, labels, weights=None, corrects=None, impression_ms=None):
        self.batches.append(batch.keys[:, 0].tolist())
        self.weights.append(None if weights is None else np.round(np.asarray(weights, float), 6).tolist())
        self.examples_seen += len(batch)
        self._touched.add(len(self.batches))
        return np.full(len(batch), 0.5, np.float32)

    @property
    def touched(self) -> int:
        return len(self._touched)

    def touched_keys(self) -> torch.Tensor:
        return torch.tensor(sorted(self._touched), dtype=torch.int64)

    def expect(self, keys: torch.Tensor) -> None:
        self._touched.update(keys.tolist())

    def take_delta(self, *, dense: bool = True) -> ModelDelta:
        keys = self.touched_keys()
        self._touched.clear()
        self.digest = self.examples_seen
        rows = Rows(keys, torch.full((len(keys), 4), self.weight), torch.full((len(keys),), self.weight))
        seen = {"seen": torch.tensor([float(self.examples_seen)])}
        return ModelDelta(rows, NO_KEYS, seen if dense else None, self.digest)

    def freeze(self):
        return FakeFrozen(
            {"seen": torch.tensor([float(self.examples_seen)])}, {"examples_seen": torch.tensor(self.examples_seen)}
        )


class DeltaLog:
    """A log of deltas in memory, with the offsets that Kafka would give them: a transaction ends with a marker."""

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self.deltas: list[Delta] = []
        self.answers: list[BaseException | None] = []

    async def publish(self, header, delta):
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        pieces, offset = encode_delta(header, delta, 100_000), self.position
        self.deltas.append(assemble(pieces))
        self.position += len(pieces) + 1
        return Sent(offset, offset + len(pieces), 0, sum(map(len, pieces)))

    @property
    def points(self) -> list[tuple[str, int]]:
        return [(each.header.chain, each.header.sequence) for each in self.deltas]


@dataclass(frozen=True, slots=True)
class Whole:
    """A captured version in memory."""

    captured: CapturedVersion
    pieces: list[Any]
    dense: dict[str, torch.Tensor]
    small: dict[str, torch.Tensor]

    @property
    def serving(self) -> dict[str, torch.Tensor]:
        return {**self.dense, **_joined(each.serving.parts() for each in self.pieces)}

    @property
    def trainer(self) -> dict[str, torch.Tensor]:
        return {**self.small, **_joined(each.trainer for each in self.pieces)}

    def restore(self, learner: Learner) -> None:
        """Have a learner go on from it."""
        learner.begin_restore(sum(len(each.serving) for each in self.pieces), self.small)
        for each in self.pieces:
            learner.restore_rows(each.serving, each.trainer)
        learner.finish_restore(self.dense, self.small)

    def write(self, store: SnapshotStore, manifest: Manifest) -> Manifest:
        """Write it to a store."""
        return store.write_version(manifest, dense=self.dense, small=self.small, pieces=self.pieces)


def whole(captured: CapturedVersion) -> Whole:
    """A captured version, copied into memory. Ends the freeze."""
    with captured.frozen as frozen:
        return Whole(captured, list(frozen.pieces(1_000)), dict(frozen.dense), {**frozen.small, **captured.bookkeeping})


def _joined(pieces: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    parts = list(pieces)
    return {name: torch.cat([each[name] for each in parts]) for name in (parts[0] if parts else ())}
