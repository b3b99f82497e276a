"""Deltas whose records are right, and whose content is not what the trainer had."""

from __future__ import annotations

from collections.abc import Callable

import torch
from msgspec.structs import replace as changed

from model.rows import ModelDelta, Rows
from stream.records.delta import DeltaHeader
from tests.faults.snapshots.kinds.base import kinds
from tests.faults.snapshots.play import Kind
from tests.faults.snapshots.run import Run

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)


def wrong_model(name: str, change: Callable[[Run, ModelDelta], ModelDelta], *reasons: str) -> None:
    @kind(name)
    async def play(run: Run) -> None:
        await run.begin()
        run.trainer.writer.mangle_model = lambda header, delta: (header, change(run, delta))
        before = run.trainer.point
        await run.trainer.delta(2)
        await run.refused(*reasons)
        for scorer in run.scorers:
            run.expect(scorer.point == before, f"{scorer.name}: expected to stay at {before}, found {scorer.point}")


def flip_weight(run: Run, delta: ModelDelta) -> ModelDelta:
    words = delta.rows.embedding.clone().view(torch.int32)
    words.view(-1)[run.drawn.randrange(words.numel())] ^= 1 << run.drawn.randrange(31)
    rows = Rows(delta.rows.keys, words.view(torch.float32), delta.rows.first_order)
    return ModelDelta(rows, delta.gone, delta.dense, delta.digest)


def flip_key(run: Run, delta: ModelDelta) -> ModelDelta:
    keys = delta.rows.keys.clone()
    keys[run.drawn.randrange(len(keys))] ^= 1 << run.drawn.randrange(60)
    return ModelDelta(Rows(keys, delta.rows.embedding, delta.rows.first_order), delta.gone, delta.dense, delta.digest)


def flip_dense(run: Run, delta: ModelDelta) -> ModelDelta:
    assert delta.dense is not None
    dense = {name: tensor.clone() for name, tensor in delta.dense.items()}
    words = dense[run.drawn.choice(sorted(dense))].view(-1).view(torch.int32)
    words[run.drawn.randrange(len(words))] ^= 1 << run.drawn.randrange(31)
    return ModelDelta(delta.rows, delta.gone, dense, delta.digest)


def drop_row(run: Run, delta: ModelDelta) -> ModelDelta:
    kept = torch.ones(len(delta.rows), dtype=torch.bool)
    kept[run.drawn.randrange(len(kept))] = False
    rows = Rows(delta.rows.keys[kept], delta.rows.embedding[kept], delta.rows.first_order[kept])
    return ModelDelta(rows, delta.gone, delta.dense, delta.digest)


def other_digest(run: Run, delta: ModelDelta) -> ModelDelta:
    return ModelDelta(delta.rows, delta.gone, delta.dense, delta.digest ^ (1 << run.drawn.randrange(64)))


def wide(run: Run, delta: ModelDelta) -> ModelDelta:
    rows = Rows(delta.rows.keys, torch.cat([delta.rows.embedding, delta.rows.embedding], 1), delta.rows.first_order)
    return ModelDelta(rows, delta.gone, delta.dense, delta.digest)


def row_gone(run: Run, delta: ModelDelta) -> ModelDelta:
    return ModelDelta(delta.rows, delta.rows.keys[:1] + 1, delta.dense, delta.digest ^ 1)


wrong_model("a weight flips between capture and checksum", flip_weight, "wrong_digest")
wrong_model("a key flips between capture and checksum", flip_key, "wrong_digest")
wrong_model("a dense weight flips between capture and checksum", flip_dense, "wrong_digest")
wrong_model("a row is left out of a delta", drop_row, "wrong_digest")
wrong_model("a delta names another digest", other_digest, "wrong_digest")
wrong_model("a delta of another model", wide, "unfit")
wrong_model("a delta evicts a row that nobody has", row_gone, "wrong_digest")


def wrong_header(name: str, change: Callable[[Run, DeltaHeader], DeltaHeader], *reasons: str) -> None:
    @kind(name)
    async def play(run: Run) -> None:
        await run.begin()
        run.trainer.writer.mangle_model = lambda header, delta: (change(run, header), delta)
        await run.trainer.delta(2)
        await run.refused(*reasons)


def older_parent(run: Run, header: DeltaHeader) -> DeltaHeader:
    parent = changed(header.parent, sequence=header.parent.sequence - 1)
    return changed(header, parent=parent, rebase=True)


wrong_header("a delta belongs on an older point", older_parent, "wrong_parent", "gap")
wrong_header("a delta skips a sequence number", lambda run, header: changed(header, sequence=header.sequence + 1), "gap")
