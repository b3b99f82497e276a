"""A replica is always whole and as new as the log allows, whatever the log brings."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from stream.scorer import chain_follower
from stream.scorer.chain_follower import ChainFollower
from stream.scorer.replica import Replica
from stream.scorer.serving import Served
from tests.stream.scorer.following_scene import Scorer, quick, scene
from tests.stream.scorer.made_up_chain import Log, Trainer

__all__ = ["quick"]


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


def test_a_scorer_that_missed_the_fork_takes_a_version_of_the_new_chain() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.make()  # never in the log
        trainer.restart(epoch=2)
        trainer.delta(3)
        await it.until(lambda: it.follower.problem.startswith("gap"))
        assert it.at == ("deepfm/1/0", 2)
        trainer.version(2)
        trainer.delta(1)
        it.want(2)
        await it.until_caught_up()
        assert it.named == (2, 1) and it.read == [1, 2]

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
        (lambda trainer, log: (trainer.make(), log.problem("not_a_delta", "damaged beyond recognition")), "gap"),
        (lambda trainer, log: (trainer.make(), log.problem("log_gone", "retention has passed")), "log_gone"),
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


def test_a_record_that_is_no_delta_holds_nobody_up() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        for _ in range(3):
            log.problem("not_a_delta", "somebody else wrote it")
            trainer.delta()
        log.problem("not_a_delta", "somebody else wrote it")
        await it.until(lambda: it.count("deltas_total", outcome="not_a_delta") == 4)
        await it.until_caught_up()
        assert it.follower.problem == "" and it.read == [1] and len(log.opened) == 1

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


def test_the_old_state_answers_until_the_new_one_is_no_older(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(5)
        await it.until_caught_up()
        hold = it.store.held[1] = threading.Event()
        handed_over: list[int] = []
        follow = it.swapper.follow

        def noted(replica: Replica) -> None:
            handed_over.append(replica.progress.point.sequence)
            follow(replica)

        monkeypatch.setattr(it.swapper, "follow", noted)
        it.follower.damaged()
        await it.until(lambda: it.read == [1, 1])
        assert it.at == ("deepfm/1/0", 7)
        hold.set()
        await it.until(lambda: it.count("replica_loads_total", why="memory") == 1)
        await it.until(lambda: it.follower.replica is it.follower._growing)
        assert handed_over == [7], "answers never go back, though the log's end was read before its last delta was applied"

    scene(steps)


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
