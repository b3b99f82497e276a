"""What changed between two versions: rows, dense weights by field, metrics, settings. Reads both piece by piece.

Rows are matched by key, whatever their order. Memory holds 24 bytes for each row of the first version (its key, its hash and
its position) and a few pieces; the first version's weights wait in a temporary file, and only those of changed rows are read
again.

A row doesn't say which field it belongs to, since its key is a hash. What is known by field is the average row, which stands
for all rows of the field, and the part of the MLP's first layer that reads the field.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from model.schema import FeatureSchema
from state.errors import SnapshotError
from state.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from model.rows import Rows

__all__ = ["Distance", "FieldDistance", "RowsDiff", "VersionDiff", "VersionWeights", "compare"]

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class VersionWeights(Protocol):
    """A version's serving weights, as `state.store` reads them: tensors that are no rows, and rows piece by piece."""

    @property
    def manifest(self) -> Manifest: ...

    def dense(self) -> Mapping[str, torch.Tensor]: ...

    def rows(self) -> Iterator[Rows]: ...


@dataclass(frozen=True, slots=True)
class Distance:
    """Euclidean norms of some weights before and after, and of their difference; None where one version lacks them."""

    before: float | None
    after: float | None
    change: float | None


@dataclass(frozen=True, slots=True)
class FieldDistance:
    """What is known of one field.

    row    its average row: the initial row of a new value, which an unknown value reads
    input  the weights of the MLP's first layer that read its embedding
    """

    field: str
    row: Distance
    input: Distance


@dataclass(frozen=True, slots=True)
class RowsDiff:
    """Numbers of rows, and norms of embeddings.

    before, after         rows in each version
    added, gone, changed  rows only in the second version, only in the first, and in both with other weights
    norm_before, norm_after  root mean square norm of a row's embedding; NaN without rows
    change, change_max    of the changed rows: root mean square and largest norm of the embedding's difference; 0 without any
    """

    before: int
    after: int
    added: int
    gone: int
    changed: int
    norm_before: float
    norm_after: float
    change: float
    change_max: float

    @property
    def same(self) -> int:
        """Rows that are equal bit by bit."""
        return self.after - self.added - self.changed


@dataclass(frozen=True, slots=True)
class VersionDiff:
    """What changed from one version to another.

    dense     by tensor that is no row
    fields    by field; empty when the two versions have different fields
    metrics   by name: before and after, None where a version lacks it
    settings  manifest entries, model settings and features that differ, as text: before and after
    """

    rows: RowsDiff
    dense: dict[str, Distance]
    fields: list[FieldDistance]
    metrics: dict[str, tuple[float | None, float | None]]
    settings: dict[str, tuple[str, str]]


def compare(before: VersionWeights, after: VersionWeights) -> VersionDiff:
    """What changed from one version to another. Blocks, and reads both versions once.

    Raises:
        SnapshotError: a version can't be read, or their embeddings have different widths.
    """
    old, new = before.dense(), after.dense()
    return VersionDiff(
        rows=_compare_rows(before, after),
        dense={name: _distance(old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())},
        fields=_compare_fields(before.manifest, after.manifest, old, new),
        metrics={
            name: (before.manifest.metrics.get(name), after.manifest.metrics.get(name))
            for name in sorted(before.manifest.metrics.keys() | after.manifest.metrics.keys())
        },
        settings=_compare_settings(before.manifest, after.manifest),
    )


def _compare_rows(before: VersionWeights, after: VersionWeights) -> RowsDiff:
    from model.digest import row_hashes

    with tempfile.TemporaryFile() as spilled:
        keys_in, hashes_in, squares_before, dim = [], [], 0.0, 0
        for piece in before.rows():
            keys_in.append(piece.keys.numpy().copy())
            hashes_in.append(row_hashes(piece).numpy())
            embedding = piece.embedding.numpy()
            dim = embedding.shape[1]
            squares_before += _squares(embedding)
            spilled.write(np.ascontiguousarray(embedding).data)
        spilled.flush()
        keys, hashes = _joined(keys_in), _joined(hashes_in)
        order = np.argsort(keys, kind="stable")  # position in the file of each key in ascending order
        keys, hashes = keys[order], hashes[order]
        old = (
            np.memmap(spilled, dtype=np.float32, mode="r", shape=(len(keys), dim))
            if len(keys)
            else np.zeros((0, 1), np.float32)
        )
        count = added = changed = 0
        squares_after = squares_change = largest = 0.0
        for piece in after.rows():
            embedding = piece.embedding.numpy()
            if len(keys) and embedding.shape[1] != dim:
                raise SnapshotError(
                    f"versions {before.manifest.version} and {after.manifest.version}: expected embeddings of one width, found "
                    f"{dim} and {embedding.shape[1]}. Rows of different widths can't be compared."
                )
            theirs = piece.keys.numpy()
            at = np.minimum(np.searchsorted(keys, theirs), max(len(keys) - 1, 0))
            known = keys[at] == theirs if len(keys) else np.zeros(len(theirs), bool)
            count += len(theirs)
            added += int((~known).sum())
            squares_after += _squares(embedding)
            differs = np.flatnonzero(known)
            differs = differs[hashes[at[differs]] != row_hashes(piece).numpy()[differs]]
            if len(differs):
                steps = np.square(embedding[differs].astype(np.float64) - old[order[at[differs]]]).sum(1)
                changed += len(differs)
                squares_change += float(steps.sum())
                largest = max(largest, float(steps.max()))
    return RowsDiff(
        before=len(keys),
        after=count,
        added=added,
        gone=len(keys) - (count - added),
        changed=changed,
        norm_before=_root_mean(squares_before, len(keys)),
        norm_after=_root_mean(squares_after, count),
        change=_root_mean(squares_change, changed) if changed else 0.0,
        change_max=math.sqrt(largest),
    )


def _compare_fields(
    before: Manifest, after: Manifest, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]
) -> list[FieldDistance]:
    """By field, in the order of the weights: single-valued fields, then lists."""
    names = _field_names(before)
    if names != _field_names(after):
        return []
    rows = [_by_field(tensors.get("typical.embedding"), len(names)) for tensors in (old, new)]
    inputs = []
    for tensors in (old, new):
        weights = tensors.get("mlp.0.weight")  # (H, F*D)
        fits = weights is not None and weights.shape[1] % max(len(names), 1) == 0
        parts = weights.reshape(len(weights), len(names), -1).transpose(0, 1) if weights is not None and fits else None
        inputs.append(_by_field(parts, len(names)))
    return [
        FieldDistance(name, _distance(rows[0][index], rows[1][index]), _distance(inputs[0][index], inputs[1][index]))
        for index, name in enumerate(names)
    ]


def _field_names(manifest: Manifest) -> list[str]:
    """The fields in the order of the weights; none for a schema that this release doesn't know."""
    try:
        schema = FeatureSchema.model_validate(manifest.features)
    except ValueError:
        return []
    return [field.name for field in (*schema.singles, *schema.lists)]


def _by_field(tensor: torch.Tensor | None, count: int) -> list[torch.Tensor] | list[None]:
    return [None] * count if tensor is None or len(tensor) != count else list(tensor)


def _compare_settings(before: Manifest, after: Manifest) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for name in ("chain", "sequence", "digest", "epoch", "examples_seen", "negative_rate", "format", "row_precision"):
        found[name] = (str(getattr(before, name)), str(getattr(after, name)))
    for name in sorted(before.model.keys() | after.model.keys()):
        found[f"model.{name}"] = (str(before.model.get(name)), str(after.model.get(name)))
    fields = [{str(field.get("name")): field for field in each.features.get("fields") or []} for each in (before, after)]
    for name in sorted(fields[0].keys() | fields[1].keys()):
        found[f"features.{name}"] = (str(fields[0].get(name)), str(fields[1].get(name)))
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _distance(before: torch.Tensor | None, after: torch.Tensor | None) -> Distance:
    norms = [None if tensor is None else float(tensor.double().norm()) for tensor in (before, after)]
    change = None
    if before is not None and after is not None and before.shape == after.shape:
        change = float((after.double() - before.double()).norm())
    return Distance(norms[0], norms[1], change)


def _joined(pieces: list[Int64Array]) -> Int64Array:
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _squares(embedding: Float32Array) -> float:
    return float(np.einsum("nd,nd->", embedding, embedding, dtype=np.float64))


def _root_mean(squares: float, count: int) -> float:
    return math.sqrt(squares / count) if count else math.nan
