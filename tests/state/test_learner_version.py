"""A learner's frozen model, written and read piece by piece, is the learner that it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.learner import Learner
from model.settings import ModelSettings
from model.table_settings import TableSettings
from state.manifest import Manifest
from state.pieces import TRAINER_ROW_TENSORS, piece_rows
from tests.model.test_deferred import SCHEMA, batch_of
from tests.state.made_version import at

KEEPING = TableSettings()
EVICTING = TableSettings(admit_after=2, evict_below=1.4, half_life_ms=60_000)


def learner(table: TableSettings, *, history: bool) -> Learner:
    return Learner(SCHEMA, ModelSettings(hidden=(8,), row_history=history, cross_layers=0), table=table, device="cpu")


def learn(which: Learner, seed: int) -> None:
    draw = np.random.default_rng(seed)
    for step in range(10):
        columns = [draw.integers(0, 50, 8).tolist() for _ in range(2)]
        times = np.full(8, 1e12 + seed * 600_000 + step * 60_000.0)
        which.learn(batch_of(*columns), draw.integers(0, 2, 8), impression_ms=times)


def state(which: Learner) -> dict[str, torch.Tensor]:
    return {**which.serving_state(), **which.trainer_state()}


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("table", [KEEPING, EVICTING])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_learner_that_was_written_while_it_learned_comes_back_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, table: TableSettings, history: bool
) -> None:
    monkeypatch.setattr("state.pieces.PIECE_BYTES", 3 * 48)
    written, restored = (learner(table, history=history) for _ in range(2))
    learn(written, 1)
    written.take_delta()
    digest, wanted, fields = written.digest, state(written), written.table.fields
    frozen = written.freeze()
    learn(written, 2)
    manifest = at(tmp_path).write_version(
        Manifest(version=1, digest=f"{digest:016x}"),
        dense=frozen.dense,
        small=frozen.small,
        pieces=frozen.pieces(piece_rows(SCHEMA.embedding_dim)),
    )
    frozen.close()
    assert ("table.free" in frozen.small) == (table is EVICTING)
    assert len(manifest.files) > 6 and manifest.rows == len(wanted["keys"])
    if streamed:
        reader = at(tmp_path).read(1)
        restored.begin_restore(reader.row_count, reader.small())
        for piece in reader.trainer_rows():
            assert piece.trainer.keys() == set(TRAINER_ROW_TENSORS[:4] if table is KEEPING else TRAINER_ROW_TENSORS)
            restored.restore_rows(piece.serving, piece.trainer)
        restored.finish_restore(reader.dense(), reader.small())
    else:
        restored.restore(at(tmp_path).serving(1), at(tmp_path).trainer(1))
    assert f"{restored.digest:016x}" == manifest.digest and restored.table.fields == fields
    found = state(restored)
    assert ("history" in found) == history
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
