"""Captured versions: their manifests, and how they are written to a store."""

from __future__ import annotations

from collections.abc import Mapping

from model.rows import RowPrecision
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.history import History
from state.manifest import Manifest
from state.pieces import piece_rows
from state.rewinds import Rewinds, SkippedRange
from state.store import SnapshotStore
from stream.trainer.captured import CapturedVersion
from stream.trainer.chain import Published

__all__ = ["new_manifest", "write_captured"]


def new_manifest(
    captured: CapturedVersion,
    *,
    version: int,
    parent: int | None,
    epoch: int,
    point: Published | None,
    metrics: Mapping[str, float],
    topic_ids: Mapping[str, str],
    schema: FeatureSchema,
    model: ModelSettings,
    row_precision: RowPrecision,
    skipped: tuple[SkippedRange, ...] = (),
    rewinds: Rewinds | None = None,
    history: History | None = None,
) -> Manifest:
    """The manifest of a captured version, without its files.

    Args:
        point: the point of the chain that the version is; None when it is none.
    """
    position = captured.position
    return Manifest(
        version=version,
        parent=parent,
        kind="full",
        epoch=epoch,
        created_at_ms=position.at_ms,
        offsets={str(partition): offset for partition, offset in sorted(position.offsets.items())},
        watermark_ms=position.watermark_ms,
        examples_seen=position.examples_seen,
        negative_rate=position.negative_rate,
        chain="" if point is None else point.point.chain,
        sequence=None if point is None else point.point.sequence,
        deltas_offset=None if point is None else point.offset,
        digest=f"{captured.digest:016x}" if captured.on_chain else "",
        row_precision=row_precision,
        metrics=dict(metrics),
        verdict=captured.verdict,
        topic_ids=dict(topic_ids),
        skipped=skipped,
        rewinds=rewinds,
        history=history,
        schema_hash=schema.fingerprint(),
        features=schema.model_dump(mode="json"),
        model=model.model_dump(mode="json"),
    )


def write_captured(store: SnapshotStore, manifest: Manifest, captured: CapturedVersion, schema: FeatureSchema) -> Manifest:
    """Write a captured version, with the manifest last. Returns it as written. Raises as `SnapshotStore.write_version`."""
    frozen = captured.frozen
    return store.write_version(
        manifest,
        dense=frozen.dense,
        small={**frozen.small, **captured.bookkeeping},
        pieces=frozen.pieces(piece_rows(schema.embedding_dim)),
    )
