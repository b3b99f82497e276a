"""What answers while the champion moves, is pinned, or can't be reached: rollback, resume, slow and broken stores, no topic."""

from __future__ import annotations

import asyncio
import threading

import pytest

from state.registry import VersionRange
from stream.errors import TopicError
from stream.scorer import chain_follower
from tests.stream.scorer.following_scene import Scorer, quick, scene
from tests.stream.scorer.made_up_chain import Log, Store, Trainer

__all__ = ["quick"]


def test_a_rollback_pins_and_the_replica_goes_on_aside() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        trainer.version(2)
        it.want(2)
        await it.until(lambda: it.named == (2, 0))
        await it.until(lambda: 1 in it.swapper._ready)  # what a rollback would go to is there already
        trainer.delta(2)
        await it.until_caught_up()
        it.want(1, hold=True, rolled_back=(VersionRange(1, 2),))
        assert it.named == (1, 0) and not it.swapper.is_following, "at once"
        trainer.delta(2)
        await it.until(lambda: it.follower.replica is not None and it.follower.replica.progress.point.sequence == 9)
        assert it.named == (1, 0) and it.rows == trainer.versions[1], "exactly that version"
        it.want(1)  # resume
        assert it.at == ("deepfm/1/0", 9) and it.named == (2, 4) and it.swapper.applied == it.position, "at once"
        assert it.read == [1]

    scene(steps)


def test_a_resume_never_brings_weights_back_that_the_trainer_was_sent_back_from() -> None:
    """The registry is read before the log here: the replica aside is still where the trainer was when it was sent back."""

    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        trainer.version(2)
        it.want(2)
        await it.until(lambda: it.named == (2, 0) and 1 in it.swapper._ready)
        it.want(1, hold=True, rolled_back=(VersionRange(1, 2),))
        trainer.restart(epoch=2)
        late = trainer.make()
        trainer.gone_back(1, "deepfm/2/0")
        it.want(1)
        confirmed = it.swapper.applied
        await asyncio.sleep(0.05)
        assert it.named == (1, 0) and it.rows == trainer.versions[1] and not it.swapper.is_following
        assert it.swapper.applied == confirmed < it.position, "the resume isn't confirmed yet"
        log.append(late)
        await it.until_caught_up()
        await it.until(lambda: it.swapper.is_following and it.swapper.applied == it.position)
        assert it.read == [1]

    scene(steps)


def test_a_resume_waits_for_the_version_with_which_the_trainer_began_when_it_was_sent_back() -> None:
    """Retention had deleted deltas, so no delta leads from the replica aside to the new chain."""

    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        trainer.version(2)
        it.want(2)
        await it.until(lambda: it.named == (2, 0) and 1 in it.swapper._ready)
        it.want(1, hold=True, rolled_back=(VersionRange(1, 2),))
        await it.until(lambda: it.swapper.applied == it.position)
        trainer.rows, trainer.chain, trainer.sequence = {1: 10, 7: 7}, "deepfm/2/0", 0
        trainer.gone_back(1, "deepfm/2/0")
        trainer.version(3)
        hold = it.store.held[3] = threading.Event()
        it.want(1)
        await it.until(lambda: it.read == [1, 3])
        assert it.named == (1, 0) and it.rows == trainer.versions[1] and it.swapper.applied < it.position
        hold.set()
        await it.until_caught_up()
        await it.until(lambda: it.named == (3, 0) and it.swapper.applied == it.position)

    scene(steps)


def test_a_start_after_a_resume_never_answers_by_weights_that_the_trainer_was_sent_back_from() -> None:
    async def run() -> None:
        trainer = Trainer(Log())
        trainer.delta(2)
        trainer.version(1)
        trainer.delta(3)
        trainer.version(2)
        trainer.restart(epoch=2)
        late = trainer.make()
        trainer.gone_back(1, "deepfm/2/0")
        it = Scorer(trainer)
        it.want(1)
        await it.until(lambda: it.named is not None)
        assert it.named == (1, 0) and it.rows == trainer.versions[1], "exactly that version: the log's end leads no further"
        trainer.log.append(late)
        await it.until_caught_up()
        await it.until(lambda: it.swapper.is_following)
        assert it.store.asked == [2, 1]
        await it.close()

    asyncio.run(run())


def test_a_start_while_a_version_is_pinned_follows_aside() -> None:
    async def run() -> None:
        trainer = Trainer(Log())
        trainer.delta(2)
        trainer.version(1)
        trainer.delta(2)
        trainer.version(2)
        it = Scorer(trainer)
        it.want(1, hold=True)
        await it.until(lambda: it.named == (1, 0))
        trainer.delta(1)
        await it.until(lambda: it.follower.replica is not None and it.follower.replica.progress.point.sequence == 5)
        assert it.named == (1, 0) and it.rows == trainer.versions[1] and it.read == [2]
        it.want(1)
        assert it.named == (2, 1), "at once"
        await it.close()

    asyncio.run(run())


def test_without_memory_to_spare_a_resume_reads_the_newest_version() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        trainer.version(2)
        it.want(2)
        await it.until(lambda: it.named == (2, 0))
        it.want(1, hold=True)
        await it.until(lambda: it.swapper.current is not None and not it.swapper.current.is_replica)
        assert it.follower.replica is None and it.store.asked == [1, 1]
        trainer.delta(2)
        it.want(1)
        await it.until_caught_up()
        assert it.store.asked == [1, 1, 2] and it.named == (2, 2)

    scene(steps, spare=0)


def test_a_rollback_does_not_wait_for_a_heal() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        trainer.version(2)
        it.want(2)
        await it.until(lambda: 1 in it.swapper._ready)
        hold = it.store.held[2] = threading.Event()
        it.follower.damaged()
        await it.until(lambda: it.read[-1] == 2)
        it.want(1, hold=True, rolled_back=(VersionRange(1, 2),))
        assert it.named == (1, 0) and it.swapper.applied == it.position
        hold.set()
        await it.until(lambda: it.follower.replica is it.follower._growing)
        assert it.named == (1, 0), "what was healed stays aside"

    scene(steps)


def test_without_the_topic_versions_are_served_as_they_are() -> None:
    async def run() -> None:
        trainer = Trainer(Log())
        trainer.version(1)
        trainer.log.broken = TopicError("deltas: expected the topic, found none")
        it = Scorer(trainer)
        it.want(1)
        await it.swapper.first_load_ended()
        await it.until(lambda: it.named == (1, 0))
        assert not it.swapper.is_following and it.swapper.applied == 10
        assert it.follower.problem == "deltas: expected the topic, found none"
        trainer.sequence = 5
        trainer.version(2)
        it.want(2)
        await it.until(lambda: it.named == (2, 0) and it.swapper.applied == 20)
        it.log.broken = None
        await it.until(lambda: it.swapper.is_following)
        trainer.delta()
        await it.until_caught_up()
        await it.close()

    asyncio.run(run())


def test_a_log_that_never_brings_the_champion_is_replaced_by_versions() -> None:
    """The topic was deleted, or created again: nothing comes any more."""

    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.sequence = 50
        trainer.rows[9] = 9
        trainer.version(2, deltas_offset=10_000)
        it.want(2)
        await it.until(lambda: it.named == (2, 0))
        assert it.rows == trainer.rows and it.count("replica_loads_total", why="behind") == 1

    scene(steps)


def test_a_log_that_can_no_longer_be_opened_leaves_the_replica_until_a_newer_champion() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        log.broken = TopicError("gone")
        log.problem("checksum", "m")  # makes it read again
        await it.until(lambda: it.follower.problem == "gone")
        assert it.swapper.is_following and it.named == (1, 0)
        trainer.make()
        trainer.version(2)
        it.want(2)
        await it.until(lambda: it.named == (2, 0) and it.swapper.applied == 20)
        assert not it.swapper.is_following
        log.broken = None
        trainer.delta(3)  # the delta before version 2 isn't in the log, so the version is read
        await it.until_caught_up()
        assert it.swapper.is_following and it.follower.problem == "" and it.read == [1, 2]

    scene(steps)


def test_a_log_that_comes_back_is_read_on() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        log.broken = TopicError("away")
        log.problem("checksum", "m")
        await it.until(lambda: it.follower.problem == "away")
        log.items.pop()
        trainer.delta(3)
        trainer.version(2)
        it.want(2)
        await it.until(lambda: it.named == (2, 0) and not it.swapper.is_following)
        log.broken = None
        await it.until(lambda: it.swapper.is_following)
        await it.until_caught_up()
        assert it.follower.problem == "" and it.read == [1], "no version was needed"

    scene(steps)


def test_a_start_with_a_slow_store_waits_and_then_catches_up() -> None:
    async def run() -> None:
        trainer = Trainer(Log())
        trainer.version(1)
        it = Scorer(trainer)
        hold = it.store.held[1] = threading.Event()
        it.want(1)
        await it.until(lambda: it.read == [1])
        trainer.delta(20)
        assert it.swapper.current is None
        hold.set()
        await it.until_caught_up()
        assert it.read == [1]
        await it.close()

    asyncio.run(run())


def test_a_start_tries_older_versions_of_the_chain_and_then_the_champion_alone() -> None:
    async def run() -> None:
        trainer = Trainer(Log())
        for version in (1, 2, 3):
            trainer.delta(2)
            trainer.version(version)
        it = Scorer(trainer)
        it.store.broken = {3}
        it.want(1)
        await it.until_caught_up()
        assert it.named == (3, 0) and it.read == [3, 2], "weights go by the log, names by the registry"
        await it.close()

        it = Scorer(trainer)
        it.store.broken = {1, 2, 3}
        it.want(1)
        await it.until(lambda: it.swapper.fallback is not None)
        assert it.swapper.fallback == (1, "version 1 is broken") and it.swapper.current is None
        it.store.broken = {1, 2}
        await it.until_caught_up()
        assert it.swapper.fallback is None
        await it.close()

    asyncio.run(run())


def test_a_hundred_scorers_and_one_bad_delta_read_the_store_once_each_when_a_version_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    def uniform(low: float, high: float) -> float:
        waits.append(high)
        return (len(waits) % 100) / 100 * high

    async def run() -> None:
        trainer = Trainer(Log())
        trainer.delta(2)
        trainer.version(1)
        store = Store(trainer)
        many = [Scorer(trainer, store, jitter_s=0.2, spare=0) for _ in range(100)]
        for it in many:
            it.want(1)
        for it in many:
            await it.until_caught_up()
        assert len(store.asked) == 100, "each has started"
        monkeypatch.setattr(chain_follower.random, "uniform", uniform)
        trainer.delta(1, digest="0" * 16)
        trainer.delta(3)
        for it in many:
            await it.until(lambda it=it: it.follower.problem.startswith("wrong_digest"))
        await asyncio.sleep(0.3)
        assert len(store.asked) == 100, "nobody reads the store for a delta that is bad for everybody"
        assert {it.at for it in many} == {("deepfm/1/0", 2)}
        trainer.version(2)
        for it in many:
            it.want(2)
        for it in many:
            await it.until_caught_up()
        assert len(store.asked) == 200 and waits.count(0.2) == 100, "one read each, after a random wait"
        for it in many:
            await it.close()

    asyncio.run(run())
