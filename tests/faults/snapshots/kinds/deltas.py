"""Deltas that are damaged, lost, doubled or out of order in the log."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from crc32c import crc32c

from state.chain import Problem
from stream.deltas.writer import Sent
from stream.kafka.clients import aiokafka_options
from stream.scorer.replica import LogItem
from tests.faults.snapshots.kinds.base import flipped, kinds, sealed
from tests.faults.snapshots.play import Kind
from tests.faults.snapshots.replay import PREFIX
from tests.faults.snapshots.run import Run
from tests.faults.snapshots.scorer import Scorer

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

Pieces = list[bytes]
HEAD = PREFIX.size + 4


async def hurt(run: Run, mangle: Callable[[Pieces], Pieces], *reasons: str, after: int = 1) -> None:
    """Publish a delta whose records are changed, and others after it; scorers must refuse, and stay at what was whole."""
    await run.begin()
    run.trainer.writer.mangle = mangle
    before = run.trainer.point
    await run.trainer.delta()
    await run.trainer.delta(after)
    await run.refused(*reasons)
    for scorer in run.scorers:
        run.expect(scorer.point == before, f"{scorer.name}: expected to stay at {before}, found {scorer.point}")


def at(pieces: Pieces, index: int, piece: bytes) -> Pieces:
    return [*pieces[:index], piece, *pieces[index + 1 :]]


def bits(name: str, where: Callable[[Run, Pieces], tuple[int, int, int]]) -> None:
    """A kind that flips one bit: `where` gives the piece, and the first and the last byte to choose from."""

    @kind(f"a bit flips in a delta: {name}")
    async def play(run: Run) -> None:
        def mangle(pieces: Pieces) -> Pieces:
            index, first, last = where(run, pieces)
            return at(pieces, index, flipped(pieces[index], run.drawn.randrange(8 * first, 8 * last)))

        await hurt(run, mangle)


def some_piece(run: Run, pieces: Pieces) -> int:
    return run.drawn.randrange(len(pieces))


def header_end(pieces: Pieces) -> int:
    return HEAD + int(PREFIX.unpack_from(pieces[0])[8])


def in_body(pieces: Pieces, index: int) -> tuple[int, int, int]:
    return index, HEAD if index else header_end(pieces), len(pieces[index])


bits("the magic", lambda run, pieces: (some_piece(run, pieces), 0, 4))
bits("the prefix", lambda run, pieces: (some_piece(run, pieces), 4, PREFIX.size))
bits("the checksum", lambda run, pieces: (some_piece(run, pieces), PREFIX.size, HEAD))
bits("the header", lambda run, pieces: (0, HEAD, header_end(pieces)))
bits("keys and weights", lambda run, pieces: in_body(pieces, some_piece(run, pieces)))
bits("anywhere", lambda run, pieces: (index := some_piece(run, pieces), 0, len(pieces[index])))


@kind("a piece of a delta is cut short")
async def _cut(run: Run) -> None:
    def mangle(pieces: Pieces) -> Pieces:
        index = some_piece(run, pieces)
        return at(pieces, index, pieces[index][: run.drawn.randrange(len(pieces[index]))])

    await hurt(run, mangle)


@kind("a piece of a delta is empty")
async def _empty(run: Run) -> None:
    await hurt(run, lambda pieces: at(pieces, some_piece(run, pieces), b""))


@kind("a piece of a delta is missing")
async def _missing_piece(run: Run) -> None:
    def mangle(pieces: Pieces) -> Pieces:
        index = some_piece(run, pieces)
        return [*pieces[:index], *pieces[index + 1 :]]

    await hurt(run, mangle)


@kind("the last piece of a delta is missing, and nothing follows")
async def _missing_end(run: Run) -> None:
    await hurt(run, lambda pieces: pieces[:-1], "missing_piece", after=0)


@kind("two pieces of a delta are exchanged")
async def _exchanged(run: Run) -> None:
    def mangle(pieces: Pieces) -> Pieces:
        first, second = sorted(run.drawn.sample(range(len(pieces)), 2))
        return at(at(pieces, first, pieces[second]), second, pieces[first])

    await hurt(run, mangle)


@kind("a piece of a delta is there twice")
async def _repeated(run: Run) -> None:
    def mangle(pieces: Pieces) -> Pieces:
        index = run.drawn.randrange(len(pieces) - 1)  # once the last one has come, the delta is whole
        return [*pieces[: index + 1], pieces[index], *pieces[index + 1 :]]

    await hurt(run, mangle)


@kind("pieces of two deltas are mixed")
async def _mixed(run: Run) -> None:
    await run.begin()
    kept: Pieces = []

    def keep(pieces: Pieces) -> Pieces:
        kept[:] = pieces
        return []

    def mix(pieces: Pieces) -> Pieces:
        mixed = [piece for pair in zip(kept, pieces, strict=False) for piece in pair]
        return [*mixed, *kept[len(pieces) :], *pieces[len(kept) :]]

    before = run.trainer.point
    run.trainer.writer.mangle = keep
    await run.trainer.delta()
    run.trainer.writer.mangle = mix
    await run.trainer.delta(2)
    await run.refused()
    for scorer in run.scorers:
        run.expect(scorer.point == before, f"{scorer.name}: expected to stay at {before}, found {scorer.point}")


@kind("a delta is missing")
async def _gap(run: Run) -> None:
    await hurt(run, lambda pieces: [], "gap")


@kind("two deltas are exchanged")
async def _other_order(run: Run) -> None:
    await run.begin()
    kept: Pieces = []

    def keep(pieces: Pieces) -> Pieces:
        kept[:] = pieces
        return []

    run.trainer.writer.mangle = keep
    await run.trainer.delta()
    run.trainer.writer.mangle = lambda pieces: [*pieces, *kept]
    await run.trainer.delta(2)
    await run.refused("gap")


@kind("a delta is there twice")
async def _twice(run: Run) -> None:
    await run.begin()
    run.trainer.writer.mangle = lambda pieces: [*pieces, *pieces]
    await run.trainer.delta(2)
    await run.caught_up()
    run.expect(all("duplicate" in scorer.outcomes() for scorer in run.scorers), "expected duplicates to be noticed")
    run.happened.append("passed over")


@kind("older deltas come again")
async def _older(run: Run) -> None:
    await run.begin()
    kept: list[Pieces] = []

    def keep(pieces: Pieces) -> Pieces:
        kept.append(pieces)
        return pieces

    for _ in range(3):
        run.trainer.writer.mangle = keep
        await run.trainer.delta()
    run.trainer.writer.mangle = lambda pieces: [*(piece for old in kept for piece in old), *pieces]
    await run.trainer.delta(2)
    await run.caught_up()
    run.expect(all("duplicate" in scorer.outcomes() for scorer in run.scorers), "expected duplicates to be noticed")
    run.happened.append("passed over")


@kind("a delta of a newer format")
async def _newer_format(run: Run) -> None:
    await hurt(run, lambda pieces: [sealed(piece, format=2) for piece in pieces], "unknown_format")


@kind("a header that claims terabytes")
async def _terabytes(run: Run) -> None:
    def mangle(pieces: Pieces) -> Pieces:
        end = header_end(pieces)
        header = json.loads(pieces[0][HEAD:end]) | {"rows": 1 << 40}
        encoded = json.dumps(header).encode()
        return at(pieces, 0, sealed(pieces[0][:HEAD] + encoded + pieces[0][end:], header_bytes=len(encoded)))

    await hurt(run, mangle, "wrong_size")


@kind("checksums of another body")
async def _other_body(run: Run) -> None:
    """Every piece is right by itself, and the body differs from the header's checksum."""

    def mangle(pieces: Pieces) -> Pieces:
        last = bytearray(pieces[-1])
        last[-1 - run.drawn.randrange(len(last) - HEAD - (0 if len(pieces) > 1 else header_end(pieces)))] ^= 1
        prefix = bytes(last[: PREFIX.size])
        last[PREFIX.size : HEAD] = struct.pack("<I", crc32c(bytes(last[HEAD:]), crc32c(prefix)))
        return at(pieces, len(pieces) - 1, bytes(last))

    await hurt(run, mangle, "body_checksum")


async def write(run: Run, values: Sequence[bytes | None]) -> None:
    """Write records as a stranger does: without a transaction."""
    producer = AIOKafkaProducer(**aiokafka_options(run.where.kafka))
    await producer.start()
    try:
        for value in values:
            await producer.send_and_wait(run.where.names.deltas, value, None if value is not None else b"key", partition=0)
    finally:
        await producer.stop()


@kind("records of a stranger between deltas")
async def _stranger(run: Run) -> None:
    await run.begin()
    values = [b"hello", b"", None, bytes(run.drawn.randbytes(200)), b"HRDL", b"HRDL" + bytes(100)]
    await write(run, run.drawn.sample(values, 4))
    await run.trainer.delta(2)
    run.happened.append("written")


@kind("a torn transaction: pieces that were aborted")
async def _torn(run: Run) -> None:
    await run.begin()

    async def tear(pieces: Pieces, commit: Callable[[Sequence[bytes]], Awaitable[Sent]]) -> Sent:
        producer: Any = run.trainer.writer._producer
        await producer.begin_transaction()
        for piece in pieces[: run.drawn.randrange(1, len(pieces) + 1)]:
            await producer.send_and_wait(run.where.names.deltas, piece, partition=0)
        await producer.abort_transaction()
        run.happened.append("aborted")
        return await commit(pieces)

    for _ in range(2):
        run.trainer.writer.around = tear
        await run.trainer.delta()
    await run.caught_up()


@kind("the answer to a commit is lost")
async def _answer_lost(run: Run) -> None:
    await run.begin()

    async def lose(pieces: Pieces, commit: Callable[[Sequence[bytes]], Awaitable[Sent]]) -> Sent:
        from aiokafka.errors import KafkaConnectionError

        from stream.deltas.writer import _CommitFailed

        if run.drawn.random() < 0.7:
            await commit(pieces)
        run.happened.append("lost")
        raise _CommitFailed from KafkaConnectionError("lost")

    for _ in range(3):
        run.trainer.writer.around = lose
        await run.trainer.delta()
    await run.caught_up()
    run.expect(all("duplicate" not in scorer.outcomes() for scorer in run.scorers), "a delta is in the log twice")


@kind("what is read of a delta is wrong once")
async def _wrong_once(run: Run) -> None:
    await run.begin()
    hit: set[str] = set()

    def once(scorer: Scorer) -> Callable[[LogItem], LogItem]:
        def item(found: LogItem) -> LogItem:
            if scorer.name in hit:
                return found
            hit.add(scorer.name)
            return LogItem(Problem("checksum", "a bit flipped on the way", None, None, None), found.next_offset)

        return item

    for scorer in run.scorers:
        scorer.hooks.items = once(scorer)
    await run.trainer.delta(2)
    await run.caught_up()
    loads = [scorer.count("replica_loads_total", why="checksum") for scorer in run.scorers]
    run.expect(loads == [0.0] * len(loads), f"expected deltas to be read again from Kafka, found versions read: {loads}")
    run.happened.append(f"read wrong by {len(hit)}")


@kind("a scorer is slow, and far behind")
async def _slow(run: Run) -> None:
    await run.begin()
    scorer = run.scorers[0]
    block = asyncio.get_running_loop().run_in_executor(scorer.scoring, _sleep)
    await run.trainer.delta(5)
    await run.version()
    await run.trainer.delta(3)
    await block
    await run.caught_up()
    run.happened.append("stood still")


def _sleep() -> None:
    import time

    time.sleep(0.7)


@kind("damaged deltas again and again")
async def _again_and_again(run: Run) -> None:
    await run.begin()
    for _ in range(3):
        before = {scorer.name: sum(scorer.outcomes().values()) for scorer in run.scorers}
        run.trainer.writer.mangle = lambda pieces: at(pieces, 0, flipped(pieces[0], run.drawn.randrange(8 * HEAD)))
        await run.trainer.delta(2)
        await run.until(
            lambda: all(sum(scorer.outcomes().values()) > before[scorer.name] for scorer in run.scorers),  # noqa: B023
            "expected the damaged delta to be read",
        )
        await run.version()
        await run.trainer.delta()
        await run.caught_up()
    run.happened.append("healed three times")
