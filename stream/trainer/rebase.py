"""What a trainer that restarts must publish again: every row that the log's deltas have touched since its version.

The trainer goes on from a version, and scorers are further: they have applied the deltas after it. `find_base` reads these
deltas. It returns the newest point of their chain, from which the new chain goes on, and the keys of their rows.

A trainer that was sent back (`state.rewinds`) publishes its first delta at once. If retention has deleted deltas after its
version, or one is damaged, its chain begins with a version instead: scorers that are further load that one.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import NamedTuple

import msgspec
import torch

from model.learner import Learner
from model.rows import ModelDelta
from state.manifest import Manifest
from stream.deltas.pieces import DeltaProblem, FoundDelta
from stream.deltas.reader import read_back
from stream.records.delta import Point
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames
from stream.trainer.bookkeeping import State
from stream.trainer.chain import Base, Published, saved_chain
from stream.trainer.start import Start

__all__ = ["Anchored", "Found", "find_base", "go_on_in_place", "where_in_the_log"]

log = logging.getLogger(__name__)


class Anchored(NamedTuple):
    """Where a version is in the log of deltas.

    published  the newest point that scorers could reach by the log when the version was captured
    touched    keys of the rows that the version has changed since that point, int64 (N,); none if the version is that point
    """

    published: Published
    touched: torch.Tensor


class Found(NamedTuple):
    """What a new chain goes on from, and the keys of the rows that must be in its first delta, int64 (N,).

    gone  whether the log doesn't have all deltas after the version, or some are damaged: scorers may be further than `base`
    """

    base: Base
    keys: torch.Tensor
    gone: bool = False


def where_in_the_log(manifest: Manifest, bookkeeping: State) -> Anchored | None:
    """Where a version is in the log of deltas; None for a version that was captured before its chain had begun."""
    if manifest.sequence is not None and manifest.deltas_offset is not None:
        point = Point(manifest.chain, manifest.sequence)
        published = Published(point, manifest.deltas_offset, manifest.row_precision, manifest.schema_hash)
        return Anchored(published, torch.empty(0, dtype=torch.int64))
    saved = saved_chain(bookkeeping)
    if saved is None:
        return None
    published, touched = saved
    if not published.schema_hash:
        published = msgspec.structs.replace(published, schema_hash=manifest.schema_hash)
    return Anchored(published, touched)


async def find_base(manifest: Manifest, at: Anchored, deltas: AsyncIterator[FoundDelta | DeltaProblem]) -> Found:
    """Follow the chain from a version to the newest delta that the log has of it.

    Retention may have deleted deltas of the chain. Then the version's own point is the newest, and scorers that are further
    load the version before they apply the new chain's first delta.

    Args:
        deltas: what the log holds from `at.published.offset` on. Records that are no delta are passed over; if one of the chain
            is damaged, scorers stay before it too.
    """
    newest, touched = at.published, [at.touched]
    offsets, gone, size = {int(name): offset for name, offset in manifest.offsets.items()}, False, 0
    async for each in deltas:
        gone |= isinstance(each, DeltaProblem) and each.reason != "not_a_delta"
        size += _size(each.delta.model) if isinstance(each, FoundDelta) else 0
        if not isinstance(each, FoundDelta) or each.delta.header.parent != newest.point:
            continue  # no delta, or one of another line of weights, or of a trainer that was replaced
        header, model = each.delta.header, each.delta.model
        # A chain of another schema begins with a version, so deltas lead from a point to points of its own schema alone.
        newest = Published(Point(header.chain, header.sequence), each.next_offset, header.dtype, newest.schema_hash)
        offsets = {int(name): offset for name, offset in header.offsets.items()}
        touched += [model.rows.keys.clone(), model.gone.clone()]
    return Found(Base(newest, offsets, size=size), torch.unique(torch.cat(touched)), gone)


async def go_on_in_place(
    learner: Learner, start: Start, kafka: KafkaSettings, names: TopicNames, *, sent_back: bool = False
) -> Base | None:
    """Find what the new chain goes on from, and mark the rows that its first delta must carry.

    Where scorers have rows of another precision than this trainer publishes, every row differs, those too that no delta would
    carry. Where they have another schema, they read other features. In both cases the new chain begins with a version, once
    training has come as far as the old chain.

    None when scorers have nothing to go on from.

    Args:
        sent_back: scorers are to go back to the version, so the first delta doesn't wait for the offsets that they know.

    Raises:
        NoAnswer: Kafka can't be reached.
    """
    if start.manifest is None:
        return None
    at = where_in_the_log(start.manifest, start.bookkeeping)
    if at is None:
        return None
    if start.moved:
        # Another cluster's log: offsets and deltas in it say nothing of this version. Scorers load the next version whole.
        learner.expect(at.touched)
        return Base(at.published, start.offsets, in_place=False)
    found = await find_base(start.manifest, at, read_back(kafka, names, start=at.published.offset))
    learner.expect(found.keys)  # also for a version that is written before the chain begins: it is no point of one
    base = replace(found.base, offsets={}) if sent_back else found.base
    if sent_back and found.gone:
        log.warning(
            "deltas after version %s are gone or damaged: the new chain begins with a version, which scorers load",
            start.version,
        )
        return replace(base, in_place=False)
    before = base.published.row_precision
    if before != learner.row_precision:
        log.warning(
            "snapshots.row_precision is %s, and was %s at delta %d of %s: the new chain begins with a version, which all "
            "scorers load",
            *(learner.row_precision, before, base.published.point.sequence, base.published.point.chain),
        )
        return replace(base, in_place=False)
    if base.published.schema_hash not in ("", learner.schema.fingerprint()):
        log.warning(
            "scorers have other features.fields at delta %d of %s: the new chain begins with a version, which all scorers load",
            *(base.published.point.sequence, base.published.point.chain),
        )
        return replace(base, in_place=False)
    return base


def _size(delta: ModelDelta) -> int:
    """Bytes of a delta's tensors: a little less than its records have, and more where rows are sent as float16."""
    parts = (*delta.rows.parts().values(), delta.gone, *(delta.dense or {}).values())
    return sum(part.nbytes for part in parts)
