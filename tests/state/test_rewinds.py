"""The trainer is sent back: what the registry records of it, and which versions are started from after it."""

from __future__ import annotations

import msgspec
import pytest

from state import decisions, upkeep
from state.changes import Rewinding
from state.errors import Refused, StaleEpoch
from state.manifest import Manifest
from state.registry import RegistryState, VersionRecord
from state.rewind_decisions import rewound
from state.rewinds import REWINDS_KEY, Rewinds, SkippedRange, begun, joined
from tests.state.registry_log import Log, a_log


def send_back(log: Log, target: int, *ranges: SkippedRange) -> str:
    cause = log.cause("poisoned")
    log.write(decisions.rollback(log.state, target, cause, rewind=True, skipped=Rewinding(ranges).signed(cause)))
    return cause.operation


def done(log: Log, operation: str, *, up_to: int | None = None, epoch: int | None = None) -> object:
    epoch = log.state.trainer.epoch if epoch is None else epoch
    return log.write(rewound(log.state, operation, epoch=epoch, chain="deepfm/1/1", up_to=up_to, who="t", now_ms=log.now_ms))


def test_versions_above_the_target_are_left_until_and_after_the_trainer_has_gone_back() -> None:
    log = a_log(5, good=(2,))
    operation = send_back(log, 3)
    assert (log.state.champion.version, log.state.champion.hold) == (3, True)
    assert log.state.rewinds.pending is not None and log.state.rewinds.pending.reason == "poisoned"
    log.announce(6)  # the trainer was in the middle of it
    assert log.state.newest_to_start_from == 3
    assert log.state.newest == 6, "numbers never go back"
    assert done(log, operation) is True
    assert log.state.rewinds.pending is None
    assert log.state.champion.was_rolled_back(6)
    log.announce(7)
    assert log.state.newest_to_start_from == 7
    assert [version for version in log.state.versions if log.state.rewinds.left(version)] == [4, 5, 6]


def test_a_trainer_that_says_so_twice_or_too_late_changes_nothing() -> None:
    log = a_log(5)
    operation = send_back(log, 3)
    done(log, operation)
    log.announce(6)
    before = dict(log.compacted)
    assert done(log, operation) is False
    assert log.compacted == before
    with pytest.raises(StaleEpoch, match=r"expected the trainer's epoch 1 \(taken by trainer\), found 0"):
        done(log, operation, epoch=0)
    with pytest.raises(Refused, match="expected operation lost among those asked for"):
        done(log, "lost")
    assert log.state.has_done(operation), "a retry of the rollback finds it"


def test_a_chain_that_begins_with_a_version_keeps_that_one() -> None:
    log = a_log(5)
    operation = send_back(log, 2)
    log.announce(6)
    log.announce(7)
    done(log, operation, up_to=6)
    assert log.state.newest_to_start_from == 7


def test_the_champion_is_gone_back_to_after_a_rollback_and_one_request_replaces_another() -> None:
    log = a_log(5)
    log.rollback(to=4)
    assert decisions.rollback(log.state, 4, log.cause()).records == (), "it was put back already"
    assert decisions.rollback_target(log.state, to=4, now_ms=log.now_ms, or_champion=True) == 4
    moves = len(log.state.champion.moves)
    first = send_back(log, 4)
    assert len(log.state.champion.moves) == moves, "the champion stays"
    second = send_back(log, 2)
    assert done(log, first) is True
    assert log.state.rewinds.pending is not None and log.state.rewinds.pending.operation == second
    done(log, second)
    assert [each.version for each in log.state.rewinds.rewinds] == [4, 2]
    assert log.state.newest_to_start_from == 2


def test_the_line_that_was_left_can_be_gone_back_to_by_name() -> None:
    log = a_log(5)
    done(log, send_back(log, 2))
    log.announce(6)
    log.write(decisions.promote(log.state, 5, log.cause()))
    send_back(log, 5)
    assert log.state.newest_to_start_from == 5


def test_nobody_resumes_before_the_trainer_has_gone_back() -> None:
    log = a_log(5)
    operation = send_back(log, 3)
    with pytest.raises(Refused, match=r"expected a trainer that has gone back to version 3, as me asked at .*, found none yet"):
        decisions.resume(log.state, log.cause())
    done(log, operation)
    log.write(decisions.resume(log.state, log.cause()))
    assert not log.state.champion.hold
    assert log.announce(6).promoted


@pytest.mark.parametrize("version", [3, 2])
def test_a_promotion_is_no_way_round_that_but_for_versions_of_the_line_that_is_to_be_left(version: int) -> None:
    log = a_log(5)
    operation = send_back(log, 3)
    with pytest.raises(Refused, match=rf"promote {version} and resume: expected a trainer that has gone back to version 3"):
        decisions.promote(log.state, version, log.cause(), hold=False)
    if version == 2:
        log.write(decisions.promote(log.state, version, log.cause()))
        assert log.state.champion.hold
    before = log.compacted.copy()
    log.run("headrace snapshot promote 5 --reason 'undo of 3' --resume")
    assert log.served() == (5, False, ""), "the undo of the rollback: who asks for the line that is to be left gets it"
    assert before != log.compacted
    done(log, operation)


def test_a_promotion_may_let_promotion_go_on_once_the_trainer_has_gone_back() -> None:
    log = a_log(5)
    done(log, send_back(log, 3))
    log.write(decisions.promote(log.state, 3, log.cause(), hold=False))
    assert log.served() == (3, False, "")


def test_what_a_trainer_starts_from_is_never_deleted() -> None:
    log = a_log(5)
    send_back(log, 2)
    assert upkeep.needed(log.state)[2] == "champion"
    log.write(decisions.promote(log.state, 5, log.cause()))
    assert upkeep.needed(log.state)[2] == "the trainer is to go back to it"
    done(log, log.state.rewinds.rewinds[-1].operation)
    assert upkeep.needed(log.state)[2] == "the newest that a trainer may start from"


def test_what_is_left_out_stays_with_who_and_why() -> None:
    log = a_log(5)
    send_back(log, 3, SkippedRange(partition=1, first=10, to=20, topic_id="id"))
    send_back(log, 2, SkippedRange(partition=0, first=5, to=9), SkippedRange(partition=1, first=10, to=20, topic_id="id"))
    [first, second] = log.state.rewinds.skipped
    assert (first.partition, first.first, first.to, len(first)) == (0, 5, 9, 4)
    assert (second.partition, second.who, second.why, second.at_ms) == (1, "me", "poisoned", log.now_ms)
    assert begun(log.state.rewinds.skipped, {0: 5, 1: 11}) == (second,)
    assert joined(log.state.rewinds.skipped, [second]) == (first, second)


def test_older_readers_ignore_the_record_and_newer_manifests() -> None:
    log = a_log(2)
    send_back(log, 1, SkippedRange(partition=0, first=5, to=9))
    document = msgspec.json.decode(log.compacted[REWINDS_KEY])
    assert document["skipped"][0]["from"] == 5
    assert REWINDS_KEY.startswith("alias/")
    again = RegistryState()
    assert again.apply(REWINDS_KEY.encode(), log.compacted[REWINDS_KEY], 0) is None
    assert again.rewinds == log.state.rewinds
    assert again.apply(REWINDS_KEY.encode(), None, 1) is None
    assert again.rewinds == Rewinds()
    skipped = (SkippedRange(partition=0, first=5, to=9, who="me"),)
    manifest = Manifest.decode(Manifest(version=3, skipped=skipped).encode(), where="here")
    assert manifest.skipped == skipped == VersionRecord.of(manifest, now_ms=0, who="t", gate="").skipped
    assert Manifest.decode(b'{"version": 3}', where="here").skipped == ()


def test_a_registry_made_again_knows_what_was_left_and_what_is_left_out_ahead() -> None:
    """The topic is lost before training has come to the range that is left out."""
    log = a_log(5, good=(2,))
    ahead = SkippedRange(partition=0, first=5_000, to=6_000)
    operation = send_back(log, 3, ahead)
    done(log, operation)
    before = log.state
    versions = {
        4: Manifest(version=4, epoch=1, created_at_ms=40),  # of the line that was left
        6: Manifest(version=6, epoch=1, created_at_ms=60, offsets={"0": 100}, rewinds=before.rewinds),
        7: Manifest(version=7, epoch=2, created_at_ms=70),  # by a trainer of an older release, which says nothing
    }
    lost = Log()
    lost.write(upkeep.reindex(lost.state, versions, lost.cause("topic lost"), champion=6))
    assert lost.state.rewinds == before.rewinds
    assert [(each.first, each.to) for each in lost.state.rewinds.skipped] == [(5_000, 6_000)]
    assert lost.state.rewinds.left(4) and not lost.state.rewinds.left(6)
    assert lost.state.champion.was_rolled_back(4) and not lost.state.champion.was_rolled_back(6)
    # One that isn't lost knows better.
    log.write(upkeep.reindex(log.state, {1: Manifest(version=1, created_at_ms=1, rewinds=Rewinds())}, log.cause()))
    assert log.state.rewinds == before.rewinds


def test_a_rewind_that_nobody_had_done_is_done_after_the_registry_was_made_again() -> None:
    log = a_log(5)
    send_back(log, 3, SkippedRange(partition=0, first=10, to=20))
    under_way = Manifest(version=6, epoch=1, created_at_ms=60, rewinds=log.state.rewinds)
    lost = Log()
    kept = Manifest(version=3, epoch=1, created_at_ms=30, skipped=(SkippedRange(partition=0, first=1, to=2),))
    lost.write(upkeep.reindex(lost.state, {3: kept, 6: under_way}, lost.cause("topic lost"), champion=3))
    pending = lost.state.rewinds.pending
    assert pending is not None and pending.version == 3 and lost.state.newest_to_start_from == 3
    assert [(each.first, each.to) for each in lost.state.rewinds.skipped] == [(1, 2), (10, 20)]


def test_a_rewind_that_is_asked_for_again_is_the_same_one_until_it_is_done() -> None:
    log = a_log(5)
    ranges = (SkippedRange(partition=0, first=10, to=20, topic_id="T"),)
    operation = send_back(log, 3, *ranges)
    again = decisions.rollback(log.state, 3, log.cause("again"), rewind=True, skipped=ranges)
    assert (again.records, again.outcome.rewind) == ((), operation)
    more = (*ranges, SkippedRange(partition=0, first=20, to=30, topic_id="T"))
    other = decisions.rollback(log.state, 3, log.cause("more"), rewind=True, skipped=more)
    assert other.records and other.outcome.rewind != operation, "it leaves out more"
    done(log, operation)
    once_more = decisions.rollback(log.state, 3, log.cause("once more"), rewind=True, skipped=ranges)
    assert once_more.records and once_more.outcome.rewind != operation, "the trainer has learned since then"
