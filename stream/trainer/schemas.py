"""Versions of another schema than the trainer's: how training goes on from them, and when their scores can be computed."""

from __future__ import annotations

from model.errors import SnapshotMismatch
from model.migration import require_movable
from model.schema import FeatureSchema
from model.schema_change import SchemaChange
from model.settings import ModelSettings
from state.errors import SnapshotCorrupt
from state.manifest import Manifest

__all__ = ["comparable", "schema_change"]


def schema_change(manifest: Manifest, schema: FeatureSchema) -> SchemaChange:
    """From the schema of a version to `schema`.

    Raises:
        SnapshotMismatch: a model of the one can't go on as a model of the other.
    """
    if manifest.schema_hash == schema.fingerprint():
        return SchemaChange.between(schema, schema)
    try:
        before = FeatureSchema.model_validate(manifest.features)
        settings = ModelSettings.of_version(manifest.model)
    except ValueError as error:
        raise SnapshotMismatch(
            f"features, model: expected a schema and settings that this release knows, found others: {error}"
        ) from error
    change = SchemaChange.between(before, schema)
    require_movable(change, settings)
    return change


def comparable(manifest: Manifest, schema: FeatureSchema) -> SchemaChange:
    """The same, for a version whose scores are to be computed from features of `schema`.

    Raises:
        SnapshotCorrupt: its scores of these features would be others than its own.
    """
    try:
        change = schema_change(manifest, schema)
    except SnapshotMismatch as error:
        raise SnapshotCorrupt(
            f"version {manifest.version}: expected the trainer's feature schema, found another: {error}"
        ) from error
    if not change.keeps_scores:
        raise SnapshotCorrupt(
            f"version {manifest.version}: expected the trainer's feature schema or a part of it, found another: "
            + "; ".join(change.explained())
        )
    return change
