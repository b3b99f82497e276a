"""Examples to feed a trainer: as Kafka records, as runs, as decoded columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from model.features import FeatureBatch
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from stream.kafka.transport import Run
from stream.records.dead_letter import DeadLetter
from stream.trainer.examples import DecodedRun, hash_ids
from stream.trainer.metrics import TrainerMetrics

SCHEMA = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="item")), embedding_dim=4)
MODEL = ModelSettings(hidden=(8,), batch_rows=32, initial_rows=16, row_history=False, cross_layers=0, cross_rank=0)
FIRST_MS = 1_650_000_000_000
ARRIVED_MS = FIRST_MS + 3_600_000


def metrics() -> TrainerMetrics:
    return TrainerMetrics(CollectorRegistry())


def value(index: int, **more: Any) -> bytes:
    """An impression: which user it is decides whether there is a click."""
    features = {"user": f"u{index % 7}", "item": f"i{index * 31 % 101}"}
    return json.dumps({"impression_id": f"x{index}", "timestamp": FIRST_MS + index, "features": features, **more}).encode()


def headers(index: int, **changed: bytes | None) -> list[tuple[str, bytes]]:
    """Headers of an example; None leaves one out."""
    every: dict[str, bytes | None] = {
        "label": b"1" if index % 7 < 2 else b"0",
        "weight": b"1",
        "kind": b"first",
        "impression_ms": b"%d" % (FIRST_MS + index),
        "source_offset": b"%d" % index,
        **changed,
    }
    return [(name, each) for name, each in every.items() if each is not None]


def record(
    offset: int,
    payload: bytes | None = None,
    *,
    partition: int = 0,
    only: Sequence[tuple[str, bytes]] | None = None,
    **changed: bytes | None,
) -> Any:
    """As aiokafka hands it over. `only` are its headers, in the place of an ordinary example's."""
    return SimpleNamespace(
        topic="examples",
        partition=partition,
        offset=offset,
        timestamp=ARRIVED_MS,
        key=b"x%d" % offset,
        value=value(offset) if payload is None else payload,
        headers=tuple(headers(offset, **changed) if only is None else only),
    )


def run(records: Sequence[Any], *, partition: int = 0, before: int | None = None, after: int | None = None) -> Run:
    first = records[0].offset if before is None else before
    last = records[-1].offset + 1 if after is None else after
    return Run("examples", partition, first, last, list(records))


def columns(offsets: Iterable[int], *, partition: int = 0, after: int | None = None, letters: int = 0) -> DecodedRun:
    """A decoded run whose every column tells its row's offset."""
    at = np.fromiter(offsets, np.int64)
    end = after if after is not None else int(at[-1]) + 1
    letter = DeadLetter("wrong_type", "", "", "examples", partition, end - 1, None, None)
    return DecodedRun(
        partition=partition,
        after=end,
        batch=FeatureBatch(
            keys=np.stack([at, at + 1], 1), list_keys=np.empty(0, np.int64), list_offsets=np.zeros(1, np.int64), lists=0
        ),
        offsets=at,
        labels=(at % 7 < 2).astype(np.float32),
        weights=np.ones(len(at), np.float32),
        impression_ms=at + FIRST_MS,
        reached_ms=at + FIRST_MS,
        served=np.full(len(at), np.nan, np.float32),
        versions=at + 7,
        deltas=at % 5 - 1,
        id_hashes=hash_ids([b"x%d" % offset for offset in at.tolist()]),
        letters=[letter] * letters,
        records=[record(offset, partition=partition) for offset in at.tolist()],
    )
