"""What a trainer that restarts must publish again: every row that the log's deltas have touched since its version.

The trainer goes on from a version, and scorers are further: they have applied the deltas after it. `find_base` reads these
deltas. It returns the newest point of their chain, from which the new chain goes on, and the keys of their rows.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import NamedTuple

import torch

from state.manifest import Manifest
from stream.records.delta import Delta, Point
from stream.trainer.chain import Base, Published

__all__ = ["Found", "find_base"]

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """What a new chain goes on from, and the keys of the rows that must be in its first delta, int64 (N,)."""

    base: Base
    keys: torch.Tensor


async def find_base(
    manifest: Manifest, saved: tuple[Published, torch.Tensor] | None, deltas: AsyncIterator[tuple[int, Delta]]
) -> Found | None:
    """Follow the chain from a version to the newest delta in the log.

    Args:
        manifest: of the version that the trainer goes on from.
        saved: what the version's bookkeeping holds (`stream.trainer.chain.saved_base`): it counts for a version that is no point
            of a chain.
        deltas: the log's deltas and the offsets after them, in the order of the log, from the version's offset on.

    Returns:
        None when the version isn't reached by a chain: the new chain then begins with a version.
    """
