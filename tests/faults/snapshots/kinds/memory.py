"""Weights that change by themselves in a scorer's memory. The bits are flipped here; the product has no way to do it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import torch

from model.predictor import Predictor
from stream.registry.writer import RegistryWriter
from stream.scorer.serving import Served
from tests.faults.snapshots.kinds.base import kinds
from tests.faults.snapshots.play import Kind
from tests.faults.snapshots.run import Run, memory_digest
from tests.faults.snapshots.scorer import SCRUB_S, Scorer

__all__ = ["KINDS", "flip_somewhere"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

# A scrub begins SCRUB_S after the last one, computes in a tenth of the time, and shares a core with everything else of a run.
FOUND_S = SCRUB_S + 3.0


def is_right(served: Served | None) -> bool:
    """Whether memory holds weights of the digest that they are said to have."""
    return served is not None and memory_digest(served) == f"{served.state.digest:016x}"


def flip_bit(run: Run, tensor: torch.Tensor, first: int, last: int) -> None:
    """Flip a bit of one of the numbers `first` to `last` of a tensor's memory, not the one that changes nothing: -0.0."""
    words = tensor.view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int64)
    words[run.drawn.randrange(first, last)] ^= 1 << run.drawn.randrange(20, 30)


def flip_embedding(run: Run, predictor: Predictor) -> None:
    rows, dim = predictor._rows, predictor.schema.embedding_dim
    flip_bit(run, rows.embedding, rows._fields * dim, (rows._fields + rows.keys.last_row) * dim)


def flip_first_order(run: Run, predictor: Predictor) -> None:
    rows = predictor._rows
    flip_bit(run, rows.first_order, rows._fields, rows._fields + rows.keys.last_row)


def flip_key(run: Run, predictor: Predictor) -> None:
    keys = predictor._rows.keys
    flip_bit(run, keys._keys, 1, keys.last_row + 1)


def flip_slot(run: Run, predictor: Predictor) -> None:
    words = predictor._rows.keys._slots._words
    taken = words.nonzero().squeeze(1)
    words[int(taken[run.drawn.randrange(len(taken))])] ^= 1 << run.drawn.randrange(predictor._rows.keys._slots._row_bits - 4)


def flip_average(run: Run, predictor: Predictor) -> None:
    flip_bit(run, predictor._rows.embedding, 0, predictor._rows._fields * predictor.schema.embedding_dim)


def flip_dense(run: Run, predictor: Predictor) -> None:
    named = predictor._dense.model.named
    tensor = named[run.drawn.choice(sorted(named))]  # between them are numbers that nobody reads
    flip_bit(run, tensor, 0, tensor.numel())


FLIPS: dict[str, Callable[[Run, Predictor], None]] = {
    "an embedding": flip_embedding,
    "a first-order weight": flip_first_order,
    "a key": flip_key,
    "a slot of the table": flip_slot,
    "an average row": flip_average,
    "a dense weight": flip_dense,
}


def flip_somewhere(run: Run, predictor: Predictor) -> None:
    FLIPS[run.drawn.choice(sorted(FLIPS))](run, predictor)


async def flip(run: Run, scorer: Scorer, how: Callable[[Run, Predictor], None], served: Served | None = None) -> float:
    """Flip a bit between two batches. Returns when."""
    weights = served or scorer.served
    assert weights is not None

    def work() -> None:
        scorer.hurt.append(weights)
        how(run, weights.predictor)

    await scorer.in_scoring_thread(work)
    return time.monotonic()


async def found(run: Run, scorer: Scorer, since: float) -> None:
    """Wait until a scrub has found it."""
    await run.until(lambda: scorer.count("scrubs_total", found="wrong") > 0, f"{scorer.name}: a scrub finds it", FOUND_S)
    run.happened.append(f"found after {time.monotonic() - since:.2f} s")


async def found_or_written_over(run: Run, scorer: Scorer, since: float) -> None:
    """As `found`, where deltas flow: a delta that brings all dense weights writes over what has flipped in them.

    A delta of a row that has flipped finds it before the scrub does, and the whole memory is checked then.
    """

    async def over() -> bool:
        if scorer.count("scrubs_total", found="wrong") > 0:
            run.happened.append(f"found after {time.monotonic() - since:.2f} s")
            return True
        if await scorer.in_scoring_thread(lambda: is_right(scorer.served)):
            run.happened.append("written over")
            return True
        return False

    await run.until(over, f"{scorer.name}: the flip is found", FOUND_S)


def flips(name: str, how: Callable[[Run, Predictor], None]) -> None:
    @kind(f"a bit flips in a scorer's memory: {name}")
    async def play(run: Run) -> None:
        await run.begin()
        scorer = run.scorers[0]
        since = await flip(run, scorer, how)
        await found(run, scorer, since)
        await run.caught_up()

    @kind(f"a bit flips in a scorer's memory while deltas flow: {name}")
    async def flowing(run: Run) -> None:
        await run.begin()
        scorer = run.drawn.choice(run.scorers)
        since = await flip(run, scorer, how)
        for _ in range(10):
            await run.trainer.delta()
            await asyncio.sleep(0.02)
        await found_or_written_over(run, scorer, since)
        await run.caught_up()


for name, how in FLIPS.items():
    flips(name, how)


@kind("bits flip in all scorers at once")
async def _all(run: Run) -> None:
    await run.begin(scorers=3)
    for scorer in run.scorers:
        since = await flip(run, scorer, flip_somewhere)
    for scorer in run.scorers:
        await found(run, scorer, since)
    await run.caught_up()


@kind("a bit flips in a version that is pinned")
async def _pinned(run: Run) -> None:
    await run.begin(versions=2)
    writer = RegistryWriter(run.where.kafka, run.where.names, who="operator")
    try:
        await writer.rollback(1, "test")
        await run.until(lambda: all(each.point is not None and each.point.sequence == 0 for each in run.scorers), "pinned")
        scorer = run.scorers[0]
        since = await flip(run, scorer, flip_somewhere)
        await found(run, scorer, since)
        await run.until(lambda: all(each is not scorer.served for each in scorer.hurt), "read again")
        await writer.resume("test")
    finally:
        await writer.close()


@kind("a bit flips in the version that a rollback would go to")
async def _target(run: Run) -> None:
    await run.begin(versions=2, scorers=1)
    [scorer] = run.scorers
    await run.until(lambda: 1 in scorer.swapper._ready, "the target is kept ready")
    since = await flip(run, scorer, flip_somewhere, scorer.swapper._ready[1])
    await found(run, scorer, since)
    writer = RegistryWriter(run.where.kafka, run.where.names, who="operator")
    try:
        await writer.rollback(1, "test")
        await run.until(lambda: scorer.point is not None and scorer.point.sequence == 0, "pinned")
        await asyncio.sleep(0.2)
        await writer.resume("test")
    finally:
        await writer.close()


@kind("a bit flips while a delta is being prepared")
async def _prepared(run: Run) -> None:
    await run.begin(scorers=1)
    [scorer] = run.scorers
    replica = scorer.follower.replica
    assert replica is not None
    prepare = replica.prepare

    def hurt(delta: object) -> object:
        done = prepare(delta)  # type: ignore[arg-type]
        scorer.hurt.append(replica.served)
        flip_somewhere(run, replica.served.predictor)
        replica.prepare = prepare  # type: ignore[method-assign]
        return done

    replica.prepare = hurt  # type: ignore[assignment,method-assign]
    since = time.monotonic()
    await run.trainer.delta()
    await found_or_written_over(run, scorer, since)
    await run.caught_up()
