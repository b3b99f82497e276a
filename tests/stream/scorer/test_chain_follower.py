"""A replica is always whole and as new as the log allows, whatever the log, the store and the registry do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from state.registry import RegistryState, VersionRange
from stream.errors import TopicError
from stream.scorer import chain_follower, swap
from stream.scorer.chain_follower import ChainFollower
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.freshness import Freshness
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.serving import Served
from stream.scorer.swap import Swapper
from tests.stream.scorer.made_up_chain import Log, Store, Trainer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_follower, "LOOK_S", 0.01)
    monkeypatch.setattr(chain_follower, "OVERDUE_S", 0.1)
    for module in (chain_follower, swap):
        monkeypatch.setattr(module, "RETRY_S", 0.01)
        monkeypatch.setattr(module, "MAX_RETRY_S", 0.02)
    monkeypatch.setattr(swap, "PRELOAD_JITTER_S", 0.0)


class Scorer:
    """A follower and a swapper, wired as `stream.scorer.run` does, over a made-up log and store."""

    def __init__(self, trainer: Trainer, store: Store | None = None, *, jitter_s: float = 0.0, spare: int = 100) -> None:
        self.trainer, self.log = trainer, trainer.log
        self.store = store or Store(trainer)
        self.read: list[int] = []
        """Versions read to follow their chain."""
        self.prometheus = CollectorRegistry()
        self.freshness = Freshness(self.prometheus)
        self.scoring = ThreadPoolExecutor(1, "scoring")
        self.spare, self.position = spare, 0
        self.swapper = Swapper(self.store.load, ScorerMetrics(self.prometheus), keep=3, spare_bytes=spare)
        self.follower = ChainFollower(
            lambda record: self.load(record.version),
            self.log.open,
            self._alone,
            self.swapper,
            FollowingMetrics(self.prometheus),
            self.freshness,
            jitter_s=jitter_s,
        )
        self.task = asyncio.ensure_future(self.follower.run())

    def load(self, version: int) -> Served:
        self.read.append(version)
        return self.store.load(version)

    async def _alone(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self.scoring, work)

    def want(self, champion: int, *, hold: bool = False, **changed: Any) -> None:
        self.position += 10
        registry: RegistryState = self.trainer.registry(champion, hold=hold, **changed)
        self.swapper.want(registry, self.position, follow=not hold)
        aside = self.swapper.current is not None and self.swapper.current.size <= self.spare
        self.follower.want(registry, not hold or aside)

    @property
    def at(self) -> tuple[str, int] | None:
        """Chain and sequence of the weights that answer, after a check that they are whole."""
        current = self.swapper.current
        if current is None or current.state.point is None:
            return None
        return str(current.state.point.chain), current.state.point.sequence

    @property
    def named(self) -> tuple[int, int] | None:
        current = self.swapper.current
        return None if current is None else (current.state.version, current.state.delta)

    @property
    def rows(self) -> Any:
        current: Any = self.swapper.current
        return current.predictor.rows

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.002)

    async def until_caught_up(self) -> None:
        """Until the trainer's weights answer."""
        await self.until(lambda: self.at == (self.trainer.chain, self.trainer.sequence))
        assert self.rows == self.trainer.rows

    def count(self, name: str, **labels: str) -> float:
        return self.prometheus.get_sample_value(f"headrace_scorer_{name}", labels) or 0.0

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.swapper.close()
        self.scoring.shutdown()
        if not self.task.cancelled():
            self.task.result()


def scene(steps: Callable[[Scorer, Trainer, Log], Awaitable[None]], **options: Any) -> None:
    """Run steps on a scorer that follows version 1, which is at sequence 2 of a chain."""

    async def run() -> None:
        trainer = Trainer(Log())
        trainer.delta(2)
        trainer.version(1)
        it = Scorer(trainer, **options)
        try:
            it.want(1)
            await it.until_caught_up()
            await steps(it, trainer, trainer.log)
        finally:
            await it.close()

    asyncio.run(run())


def test_deltas_are_applied_and_named_by_the_versions_announced() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        assert it.named == (1, 0) and it.swapper.applied == 10 and it.swapper.is_following
        trainer.delta(3)
        await it.until_caught_up()
        assert it.named == (1, 3) and it.read == [1]
        assert it.swapper.current is not None and it.swapper.current.state.captured_at_ms == 5_000
        assert it.swapper.current.predictor.negative_rate == 0.5, "the share that the weights were learned from"
        trainer.version(2)
        trainer.delta(2)
        await it.until_caught_up()
        assert it.named == (1, 5), "not announced yet"
        it.swapper.changed.clear()
        it.want(2)
        await it.until(lambda: it.named == (2, 2))
        assert it.swapper.applied == 20 and it.swapper.changed.is_set() and it.swapper.since_ms > 0
        assert it.count("deltas_total", outcome="applied") == 5 and it.count("model_version") == 2

    scene(steps)


def test_a_version_may_be_announced_before_its_delta_is_read() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        late = [trainer.make(), trainer.make()]
        trainer.version(2, deltas_offset=log.end + 20)
        it.want(2)
        await asyncio.sleep(0.03)
        assert it.swapper.applied == 10 and it.named == (1, 0), "not in effect, and not called so"
        for delta in late:
            log.append(delta)
        await it.until(lambda: it.named == (2, 0))
        assert it.swapper.applied == 20 and it.read == [1]

    scene(steps)


def test_a_champion_behind_what_is_applied_changes_nothing() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(5)
        trainer.version(2)
        trainer.delta(5)
        it.want(2)
        await it.until_caught_up()
        it.want(1)  # an operator promotes an older version and does not hold
        await it.until(lambda: it.swapper.applied == 30)
        assert it.named == (2, 5) and it.read == [1]

    scene(steps)


def test_a_trainer_that_restarted_opens_a_new_chain_in_place() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(4)
        known = dict(trainer.rows)
        zombie = trainer.make()
        trainer.rows, trainer.sequence = known, trainer.sequence - 1
        trainer.restart(epoch=2)
        trainer.delta(3)
        log.append(zombie)
        await it.until_caught_up()
        assert it.at == ("deepfm/2/0", 3) and it.named == (1, 7), "steps are counted through the fork"
        await it.until(lambda: it.count("deltas_total", outcome="old_chain") == 1)
        trainer.version(2)
        it.want(2)
        await it.until(lambda: it.named == (2, 0))
        it.want(1)  # of the old chain, behind us
        await it.until(lambda: it.swapper.applied == 30)
        assert it.read == [1]

    scene(steps)


def test_a_new_line_is_passed_over_until_it_is_champion() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        other = Trainer(log, chain="deepfm/2/0", line=2, rows={7: 7})
        trainer.records[2] = other.version(2)
        trainer.versions[2] = other.versions[2]
        other.delta(4)
        await it.until(lambda: it.count("deltas_total", outcome="other_chain") == 4)
        assert it.at == ("deepfm/1/0", 2)
        it.want(2)
        await it.until(lambda: it.at == ("deepfm/2/0", 4))
        assert it.rows == other.rows and it.named == (2, 4) and it.read == [1, 2]

    scene(steps)


def test_withheld_deltas_leave_the_last_state_and_its_age() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(1)
        await it.until_caught_up()
        trainer.version(2, sequence=None, deltas_offset=None, chain="")  # captured while withheld: no point of the chain
        it.want(1)
        await asyncio.sleep(0.2)  # twice the time after which a champion that doesn't come is overdue
        assert it.named == (1, 1) and it.read == [1] and it.follower.problem == ""
        trainer.delta(1)  # released: all that changed
        await it.until_caught_up()

    scene(steps)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda trainer, log: trainer.make(), "gap"),
        (lambda trainer, log: log.problem("checksum", "damaged", 1, 0, trainer.make().header.sequence), "checksum"),
        (lambda trainer, log: (trainer.make(), log.problem("not_a_delta", "somebody else wrote it")), "not_a_delta"),
        (lambda trainer, log: log.append(trainer.make(digest="0" * 16)), "wrong_digest"),
        (lambda trainer, log: log.append(trainer.make()._replace(model="other")), "unfit"),
    ],
)
def test_what_can_not_be_applied_is_healed_by_the_next_version_only(damage: Any, reason: str) -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        await it.until_caught_up()
        whole = dict(it.rows)
        trainer.version(2)  # announced, but it doesn't have what is missing
        damage(trainer, log)
        trainer.delta(4)
        it.want(2)
        await it.until(lambda: it.follower.problem != "")
        assert it.follower.problem.startswith(reason) and it.rows == whole and it.named == (2, 0)
        assert it.count("chain_broken") == 1 and len(log.opened) == 2, "read once more from behind the last whole state"
        await asyncio.sleep(0.03)
        assert it.read == [1], "no version has what is missing"
        trainer.version(3)
        trainer.delta(2)
        it.want(3)
        await it.until_caught_up()
        assert it.named == (3, 2) and it.read == [1, 3] and it.follower.problem == ""
        assert it.count("replica_loads_total", why=reason) == 1 and it.count("chain_broken") == 0

    scene(steps)


def test_what_was_wrong_in_one_reading_only_costs_nothing() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        good = trainer.make()
        log.problem("checksum", "flipped on the way", 1, 0, 3)
        await it.until(lambda: it.count("deltas_total", outcome="checksum") >= 1)
        log.items[-1] = log.items[-1]._replace(found=good)
        trainer.delta(2)
        await it.until_caught_up()
        assert it.read == [1] and it.follower.problem == ""

    # The second reading must come after the log was put right.
    original = chain_follower.ChainFollower._session

    async def slow(self: ChainFollower) -> None:
        await asyncio.sleep(0.05)
        await original(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chain_follower.ChainFollower, "_session", slow)
        scene(steps)


def test_duplicates_cost_nothing() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        for item in log.items[1:4]:
            log.append(item.found)
        trainer.delta(1)
        await it.until_caught_up()
        assert it.count("deltas_total", outcome="duplicate") == 3 and len(log.opened) == 1

    scene(steps)


def test_a_format_of_a_newer_release_waits_and_is_reported() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.make()
        log.problem("unknown_format", "expected format 1, found 2", 1, 0, 3)
        trainer.delta(2)
        await it.until(lambda: it.follower.problem.startswith("unknown_format: expected format 1"))
        assert it.at == ("deepfm/1/0", 2) and len(log.opened) == 1

    scene(steps)


def test_memory_that_changed_is_found_at_the_delta_and_read_again() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        it.rows[1] ^= 4  # the next delta changes this row, and its old hash is what it should be no longer
        log.append(trainer.make())
        trainer.delta(3)
        await it.until_caught_up()
        assert it.read == [1, 1] and it.count("replica_loads_total", why="memory") == 1

    scene(steps)


def test_memory_that_a_check_found_wrong_is_read_again() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        await it.until_caught_up()
        trainer.version(2)
        it.want(2)
        before = it.swapper.current
        it.follower.damaged()
        await it.until(lambda: it.swapper.current is not before)
        await it.until_caught_up()
        assert it.read == [1, 2]

    scene(steps)


def test_the_old_state_answers_until_the_new_one_is_no_older() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(5)
        await it.until_caught_up()
        hold = it.store.held[1] = threading.Event()
        seen: set[Any] = set()
        it.follower.damaged()
        await it.until(lambda: it.read == [1, 1])
        seen.add(it.at)
        hold.set()
        await it.until(lambda: seen.add(it.at) is None and it.count("replica_loads_total", why="memory") == 1)
        await it.until(lambda: seen.add(it.at) is None and it.follower.replica is it.follower._growing)
        assert seen == {("deepfm/1/0", 7)}, "answers never go back"

    scene(steps)


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


def test_no_batch_sees_half_a_delta() -> None:
    """A thread reads the weights as answers do, while deltas are applied as fast as they can be."""

    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        served = it.swapper.current
        assert served is not None

        def score(served: Served) -> tuple[Any, int, dict[int, int]]:
            weights: Any = served.predictor
            return served.state, weights.digest, dict(weights.rows)

        trainer.delta(200)
        seen = set()
        while it.at != (trainer.chain, trainer.sequence):
            state, digest, rows = await asyncio.get_running_loop().run_in_executor(it.scoring, score, served)
            assert state.digest == digest and rows[1] == state.point.sequence
            assert state.delta == state.point.sequence - 2 and int(state.recent[-1].digest, 16) == digest
            seen.add(state.point.sequence)
        assert len(seen) > 5

    scene(steps)
