"""Settings of Python's cyclic garbage collector for a worker that handles thousands of records at a time."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

__all__ = ["tame_collector"]

# How many more objects must have been created than freed before Python looks for cycles among young objects. Python's default
# is 700, and one run of records alone is thousands: a quarter of the join's CPU went into looking at records that had no
# cycles. The hot paths create no cycles (tests/stream/worker/test_collector.py), so this search is only needed after errors and
# rebalances. 200,000 objects are some 50 MB.
YOUNG_OBJECTS = 200_000
# How often to look whether the worker is ready.
FREEZE_LOOK_S = 1.0


async def tame_collector(ready: Callable[[], str | None]) -> None:
    """Make the collector run seldom; once the worker is ready, exclude all that it has loaded by then from later searches."""
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
    while ready() is not None:  # noqa: ASYNC110
        await asyncio.sleep(FREEZE_LOOK_S)
    gc.collect()
    gc.freeze()
