"""Checks from time to time that the weights in memory are still those that were put there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from model.predictor import Predictor
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.serving import Served

__all__ = ["memory_is_right", "scrub_regularly"]

log = logging.getLogger(__name__)

# Share of the time that a regular check computes in: one core has requests to answer meanwhile.
DUTY = 0.1


async def memory_is_right(predictor: Predictor, *, duty: float = 1.0) -> bool:
    """Whether the weights have the digest that was kept as they were changed. Computed in threads, slice by slice."""
    steps = predictor.scrub()
    while True:
        began = time.perf_counter()
        right = await asyncio.to_thread(next, steps, True)
        if right is not None:
            return right
        await asyncio.sleep((time.perf_counter() - began) * (1 / duty - 1))


async def scrub_regularly(
    weights: Callable[[], list[Served]], damaged: Callable[[Served], None], metrics: FollowingMetrics, *, scrub_s: float
) -> None:
    """Check all weights every `scrub_s`, until cancelled.

    Args:
        weights: those in memory now.
        damaged: called for weights that have changed by themselves.
    """
    while True:
        await asyncio.sleep(scrub_s)
        for each in weights():
            right = await memory_is_right(each.predictor, duty=DUTY)
            metrics.scrubbed(right)
            if not right:
                log.error(
                    "version %d, delta %d: expected the digest %016x of the weights in memory, found another: memory has "
                    "changed by itself. The weights are read again; if this comes again, test the machine's memory",
                    *(each.version, each.state.delta, each.predictor.digest),
                )
                damaged(each)
