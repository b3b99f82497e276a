"""The chain of deltas that a trainer publishes: how it begins, and its newest point.

A chain is one line of weights by one trainer. Its deltas are numbered from 1, and each names the point that it is applied on. A
chain begins in one of two ways:

- with a version, when scorers have nothing to go on from: a new model, a version from before there were deltas, rows of
  another precision, or another schema. The version is the chain's point 0, and scorers load it;
- with a *rebase*, when an earlier trainer's chain goes on. The trainer has loaded a version of that chain and trains again what
  came after it. Rows that either trainer has touched since that version may differ. The first delta carries all of these, so
  scorers at the old chain's newest point continue in place.

Until the trainer has come as far as the old chain's newest point, nothing is published: scorers would go back in time. A
trainer that was sent back publishes at once, since scorers are to go back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch

from model.errors import ModelError
from model.rows import ModelDelta, RowPrecision
from stream.deltas.writer import Sent
from stream.records.delta import DeltaHeader, Point
from stream.trainer.bookkeeping import PREFIX, State, from_json, to_json
from stream.trainer.captured import CapturedDelta

NAME = "chain"
"""Under which the chain is in the bookkeeping of versions."""

__all__ = ["NAME", "Base", "Chain", "Published", "PublishesDeltas", "saved_chain"]


class Published(msgspec.Struct, frozen=True):
    """A point that scorers can reach by the log.

    offset         in `deltas`, after the point's delta
    row_precision  how scorers have the rows there
    schema_hash    of the schema that scorers have there; empty in what older releases saved, and means the version's own
    """

    point: Point
    offset: int
    row_precision: RowPrecision = "float32"
    schema_hash: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """What a chain goes on from.

    published  the newest point of the chain before
    offsets    by partition of `examples`: how far training must come before the chain begins; empty: it begins at once
    size       bytes of the weights in the log's deltas between the version that training goes on from and there
    in_place   whether a delta leads from there to the new chain. Otherwise the new chain begins with a version
    """

    published: Published
    offsets: Mapping[int, int]
    in_place: bool = True
    size: int = 0


class PublishesDeltas(Protocol):
    """What a chain needs of a `stream.deltas.writer.DeltaWriter`."""

    @property
    def position(self) -> int:
        """The offset after the last record of the log."""
        ...

    async def publish(self, header: DeltaHeader, delta: ModelDelta) -> Sent:
        """Write a delta in one transaction."""
        ...


class Chain:
    """Publishes one chain. As a part of the bookkeeping it is saved with versions (`stream.trainer.bookkeeping`).

        chain = Chain("deepfm/12/0", writer, base, touched)
        if chain.begins_with_a_version:
            chain.begin()
        await chain.publish(captured)

    Args:
        name: model, epoch and ordinal.
        base: what the chain goes on from; None when it begins with a version.
        touched: gives the keys of all rows that changed since the last delta, int64 (N,).
        row_precision: of all its deltas, and of the digests of its versions.
        schema_hash: of the schema that its versions have.
    """

    def __init__(
        self,
        name: str,
        writer: PublishesDeltas,
        base: Base | None,
        touched: Callable[[], torch.Tensor],
        *,
        row_precision: RowPrecision = "float32",
        schema_hash: str = "",
    ) -> None:
        self.name = name
        self._schema_hash = schema_hash
        self._row_precision: RowPrecision = row_precision
        self._writer, self._base, self._touched = writer, base, touched
        self._published: Published | None = None

    @property
    def published(self) -> Published | None:
        """The newest point of this chain; None before the chain has begun."""
        return self._published

    @property
    def begins_with_a_version(self) -> bool:
        """Whether the chain's next point has to be a version."""
        return self._published is None and (self._base is None or not self._base.in_place)

    def is_ready(self, offsets: Mapping[int, int]) -> bool:
        """Whether training has come as far as the chain that this one goes on from.

        Args:
            offsets: by partition of `examples`: the next offset to train.
        """
        if self._base is None or self._published is not None:
            return True
        return all(offsets.get(partition, end) >= end for partition, end in self._base.offsets.items())

    def begin(self) -> Published:
        """Begin with a version: it is the chain's point 0."""
        assert self.begins_with_a_version
        self._published = Published(Point(self.name, 0), self._writer.position, self._row_precision, self._schema_hash)
        return self._published

    async def publish(self, captured: CapturedDelta) -> Sent:
        """Write the next delta. Returns once it is committed.

        Raises:
            Fenced: another trainer has taken over.
            NoAnswer: Kafka can't be reached. The same delta must be published again.
        """
        header = self._header(captured)
        sent = await self._writer.publish(header, captured.delta)
        point = Point(self.name, header.sequence)
        self._published = Published(point, sent.next_offset, self._row_precision, self._schema_hash)
        return sent

    def _header(self, captured: CapturedDelta) -> DeltaHeader:
        before = self._published or (self._base.published if self._base is not None else None)
        assert before is not None
        position = captured.position
        return DeltaHeader(
            chain=self.name,
            sequence=1 if self._published is None else before.point.sequence + 1,
            parent=before.point,
            rebase=self._published is None,
            offsets={str(partition): offset for partition, offset in sorted(position.offsets.items())},
            watermark_ms=position.watermark_ms,
            examples_seen=position.examples_seen,
            negative_rate=position.negative_rate,
            at_ms=position.at_ms,
            dtype=self._row_precision,
            # What a rebase has learned may be known to scorers already, by the chain before.
            arrivals=() if self._published is None else captured.arrivals,
        )

    def state(self) -> State:
        """The newest point in the log, and the keys of the rows that changed since.

        A trainer needs both to go on from a version that is no point of the chain.
        """
        newest = self._published or (None if self._base is None else self._base.published)
        return {} if newest is None else {"published": to_json(newest), "touched": self._touched()}

    def restore(self, state: State) -> None:
        """Nothing to do: `saved_chain` reads the state, before the chain exists."""


def saved_chain(bookkeeping: State) -> tuple[Published, torch.Tensor] | None:
    """What `Chain.state` saved in a version: the newest point in the log, and keys int64 (N,) of the rows that changed since.

    None when there is none, or in a layout that this version of Headrace doesn't know.
    """
    touched = bookkeeping.get(f"{PREFIX}{NAME}.touched")
    try:
        published = from_json(bookkeeping.get(f"{PREFIX}{NAME}.published"), Published)
    except ModelError:
        return None
    if touched is None or touched.dtype != torch.int64 or touched.dim() != 1:
        return None
    return published, touched
