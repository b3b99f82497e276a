"""What changed between two versions, on made-up weights: every number is one that a reader can compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from model.rows import Rows
from state.errors import SnapshotError
from state.manifest import Manifest
from state.version_diff import Distance, compare


@dataclass
class Version:
    """A version in memory, in pieces of two rows."""

    manifest: Manifest
    table: dict[int, list[float]]
    tensors: dict[str, torch.Tensor]

    def dense(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def rows(self) -> Iterator[Rows]:
        keys = list(self.table)
        for start in range(0, len(keys), 2):
            part = keys[start : start + 2]
            weights = torch.tensor([self.table[key] for key in part])
            yield Rows(torch.tensor(part), weights[:, :-1].contiguous(), weights[:, -1].contiguous())


FIELDS = {"fields": [{"name": "tags", "kind": "list"}, {"name": "user", "kind": "categorical"}]}


def version(
    number: int, table: dict[int, list[float]], dense: dict[str, torch.Tensor] | None = None, **more: object
) -> Version:
    manifest = Manifest(version=number, features=FIELDS, **more)  # type: ignore[arg-type]
    return Version(manifest, table, dense or {})


def test_rows_are_matched_by_key_whatever_their_order() -> None:
    before = version(1, {5: [3.0, 4.0, 0.0], -7: [0.0, 0.0, 1.0], 1: [1.0, 0.0, 0.0], 9: [0.0, 0.0, 0.0]})
    after = version(2, {1: [1.0, 2.0, 0.0], 8: [5.0, 0.0, 0.0], 5: [3.0, 4.0, 0.0], -7: [0.0, 0.0, 2.0], 6: [0.0, 0.0, 0.0]})
    rows = compare(before, after).rows
    assert (rows.before, rows.after) == (4, 5)
    assert (rows.added, rows.gone, rows.changed, rows.same) == (2, 1, 2, 1)  # 8 and 6; 9; 1 and -7; 5
    assert rows.norm_before == pytest.approx(math.sqrt((25 + 1) / 4))
    assert rows.norm_after == pytest.approx(math.sqrt((5 + 25 + 25) / 5))
    assert rows.change == pytest.approx(math.sqrt((4 + 0) / 2)), "-7 changed in its first-order weight only"
    assert rows.change_max == pytest.approx(2.0)


def test_equal_and_empty_versions() -> None:
    table = {key: [float(key), 1.0, 2.0] for key in range(5)}
    rows = compare(version(1, table), version(2, dict(reversed(table.items())))).rows
    assert (rows.added, rows.gone, rows.changed, rows.same, rows.change, rows.change_max) == (0, 0, 0, 5, 0.0, 0.0)
    rows = compare(version(1, {}), version(2, table)).rows
    assert (rows.before, rows.added, rows.gone) == (0, 5, 0) and math.isnan(rows.norm_before)
    rows = compare(version(1, table), version(2, {})).rows
    assert (rows.after, rows.added, rows.gone) == (0, 0, 5) and math.isnan(rows.norm_after)


def test_dense_weights_and_fields_have_norms() -> None:
    """The weights have single-valued fields before lists, whatever the order of the schema."""
    old = {
        "typical.embedding": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        "mlp.0.weight": torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]),
        "bias": torch.tensor([1.0]),
    }
    new = {
        "typical.embedding": torch.tensor([[3.0, 4.0], [0.0, 6.0]]),
        "mlp.0.weight": torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]),
        "cross": torch.tensor([2.0]),
    }
    diff = compare(version(1, {}, old), version(2, {}, new))
    assert [field.field for field in diff.fields] == ["user", "tags"]
    user, tags = diff.fields
    assert user.row == Distance(5.0, 5.0, 0.0) and user.input == Distance(1.0, 4.0, 3.0)
    assert tags.row == Distance(0.0, 6.0, 6.0) and tags.input == Distance(2.0, 2.0, 0.0)
    assert diff.dense["bias"] == Distance(1.0, None, None) and diff.dense["cross"] == Distance(None, 2.0, None)


def test_inputs_of_row_history_belong_to_their_fields() -> None:
    """After the embeddings' weights (two fields of width 2), two weights of each field's history."""
    old = {
        "typical.embedding": torch.zeros(2, 2),
        "history.base": torch.ones(2),
        "mlp.0.weight": torch.tensor([[1.0, 0.0, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0]]),
    }
    new = {**old, "mlp.0.weight": torch.tensor([[1.0, 0.0, 0.0, 2.0, 3.0, 4.0, 5.0, 0.0]])}
    user, tags = compare(version(1, {}, old), version(2, {}, new)).fields
    assert user.input == Distance(pytest.approx(math.sqrt(26)), pytest.approx(math.sqrt(26)), 0.0)
    assert tags.input == Distance(pytest.approx(math.sqrt(65)), pytest.approx(math.sqrt(29)), 6.0)


def test_metrics_and_settings() -> None:
    before = version(1, {}, metrics={"window_log_loss": 0.5, "window_auc": 0.7}, examples_seen=10, model={"hidden": [4]})
    after = version(2, {}, metrics={"window_log_loss": 0.25}, examples_seen=30, model={"hidden": [4]}, chain="deepfm/1/0")
    diff = compare(before, after)
    assert diff.metrics == {"window_log_loss": (0.5, 0.25), "window_auc": (0.7, None)}
    assert diff.settings == {"chain": ("", "deepfm/1/0"), "examples_seen": ("10", "30")}


def test_embeddings_of_different_widths_are_not_compared() -> None:
    with pytest.raises(SnapshotError, match="versions 1 and 2: expected embeddings of one width, found 2 and 1"):
        compare(version(1, {1: [0.0, 0.0, 0.0]}), version(2, {1: [0.0, 0.0]}))
