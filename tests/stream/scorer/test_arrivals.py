"""Which clicks count for a scorer's freshness while its replica follows a chain, starts and heals."""

from __future__ import annotations

import threading

from tests.stream.scorer.following_scene import Scorer, quick, scene
from tests.stream.scorer.made_up_chain import Log, Trainer

__all__ = ["quick"]

NOW_MS = 1 << 45  # taken by the trainer after this scorer began to follow


def test_clicks_count_from_the_first_delta_taken_while_this_scorer_follows() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(arrivals=(1, 2))  # taken long ago: other scorers have answered with these
        trainer.delta(at_ms=NOW_MS, arrivals=(3, 4))
        await it.until_caught_up()
        assert list(it.freshness.take()) == [3, 4]

    scene(steps)


def test_clicks_wait_for_the_replica_that_has_learned_them_and_count_once() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(at_ms=NOW_MS, arrivals=(3,))
        await it.until_caught_up()
        assert list(it.freshness.take()) == [3]
        hold = it.store.held[1] = threading.Event()
        before = it.swapper.current
        it.follower.damaged()
        await it.until(lambda: it.read == [1, 1])
        trainer.delta(at_ms=NOW_MS, arrivals=(4,))
        assert list(it.freshness.take()) == []
        hold.set()
        await it.until(lambda: it.swapper.current is not before)
        await it.until_caught_up()
        assert list(it.freshness.take()) == [4]  # 3 is in a delta that the replica before had

    scene(steps)
