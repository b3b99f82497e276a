"""Versions whose scores tell which version they are, and requests for them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from deploy.settings import Settings
from model.learner import Learner
from model.predictor import Predictor
from model.requests import RequestDecoder
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.manifest import Manifest
from state.store import SnapshotStore
from stream.registry.writer import RegistryWriter
from stream.scorer.serving import Served, WeightsState
from stream.scorer.standstill import Standstill
from stream.topics.names import TopicNames
from tests.judged import JUDGED

SCHEMA = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="price", kind="numeric")), embedding_dim=4)
MODEL = ModelSettings(hidden=(8,), initial_rows=16, row_history=False, cross_layers=0)
MAX_BYTES = 1_048_588


def never_stood_still() -> Standstill:
    async def read() -> None:
        raise AssertionError("expected no standstill to be noticed")

    return Standstill(read, limit_s=math.inf, patience_s=1.0)


def weights(version: int) -> dict[str, torch.Tensor]:
    """Weights that give every candidate the score version / 1000."""
    serving = {name: torch.zeros_like(tensor) for name, tensor in Learner(SCHEMA, MODEL, device="cpu").serving_state().items()}
    serving["bias"].fill_(math.log(version / (1000 - version)))
    return serving


def served(version: int, serving: dict[str, torch.Tensor] | None = None, *, created_at_ms: int = 1_000) -> Served:
    predictor = Predictor.of(SCHEMA, MODEL, serving or weights(version), device="cpu")
    return Served(WeightsState(version, created_at_ms), RequestDecoder(SCHEMA), predictor)


def request(name: str, candidates: int = 3, **more: Any) -> bytes:
    listed = [{"id": f"c{index}", "features": {"price": index}} for index in range(candidates)]
    return json.dumps({"request_id": name, "context": {"user": "u"}, "candidates": listed, **more}).encode()


def record(value: bytes | None, key: bytes | None, offset: int = 0, partition: int = 0) -> Any:
    """As aiokafka hands it over."""
    return SimpleNamespace(
        topic="score-requests",
        partition=partition,
        offset=offset,
        key=key,
        value=value,
        headers=(),
        timestamp=int(time.time() * 1000),
    )


def records(names: Sequence[str], **more: Any) -> list[Any]:
    return [record(request(name, **more), name.encode(), offset) for offset, name in enumerate(names)]


async def publish(settings: Settings, *versions: int, promote: bool = True) -> None:
    """Write versions and announce them; the last one becomes champion, each is tagged good."""
    store = SnapshotStore(settings.snapshots)
    writer = RegistryWriter(settings.kafka, TopicNames.of(settings.topics), who="test")
    try:
        epoch = await writer.take_trainer_epoch()
        for version in versions:
            manifest = store.write(
                Manifest(
                    version=version,
                    epoch=epoch,
                    created_at_ms=int(time.time() * 1000),
                    features=SCHEMA.model_dump(mode="json"),
                    model=MODEL.model_dump(mode="json"),
                    verdict=JUDGED,
                ),
                weights(version),
                None,
            )
            gate = settings.snapshots.model_copy(update={"auto_promote": promote, "first_examples": 0})
            await writer.announce(manifest, gate=gate)
            await writer.tag_good(version)
    finally:
        await writer.close()
