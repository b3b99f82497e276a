"""Deleting versions and reindexing: what may go, what stays, and what a process that died leaves for the next one."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from state import alias_decisions, decisions, upkeep
from state.alias_records import Doomed
from state.errors import Refused
from state.manifest import Manifest
from state.registry import RegistryState, VersionRecord
from tests.judged import judged
from tests.state.registry_log import GATE, Log, a_log


def everything(state: RegistryState) -> list[int]:
    return list(state.versions)


def retire(log: Log, keep: tuple[int, ...] = (), **how: object) -> upkeep.Retired:
    change = upkeep.retire(log.state, lambda state: state.versions.keys() - keep, log.cause(), **how)  # type: ignore[arg-type]
    return log.write(change)  # type: ignore[return-value]


def manifest(version: int, epoch: int = 1, **more: object) -> Manifest:
    return Manifest(version=version, epoch=epoch, created_at_ms=version * 10, verdict=judged(), **more)  # type: ignore[arg-type]


def test_what_is_needed_stays_whatever_the_policy_is() -> None:
    log = a_log(9, good=(2, 5))
    log.write(alias_decisions.set_alias(log.state, "candidate", 3, log.cause()))
    log.write(alias_decisions.tag(log.state, 4, {"keep": "for the audit"}, log.cause()))
    log.rollback(to=5)  # champion 5, before it 9
    log.announce(10)
    assert upkeep.needed(log.state) == {
        3: "alias candidate",
        4: "tagged: keep",
        5: "champion",
        9: "the champion before this one, to which an undo goes",
        10: "the newest",
    }
    gone = retire(log, keep=(2,))
    assert [doomed.version for doomed in gone.versions] == [1, 6, 7, 8] and gone.left == 0
    assert sorted(log.state.versions) == [2, 3, 4, 5, 9, 10]
    assert log.state.newest == 10


def test_while_versions_are_withheld_the_anchor_stays() -> None:
    log = a_log(5)
    log.announce(6, flow="withheld", anchor=2)
    assert upkeep.needed(log.state)[2] == "rollbacks go to it while versions are withheld"


def test_nobody_moves_to_a_version_that_is_being_deleted() -> None:
    """The records go in the transaction that begins the deletion, so every decision after it is refused."""
    log = a_log(5, good=(1, 2))
    retire(log, keep=(3,))
    for attempt in (
        lambda: decisions.promote(log.state, 1, log.cause()),
        lambda: decisions.rollback(log.state, 1, log.cause()),
        lambda: decisions.rollback_target(log.state, to=1, now_ms=log.now_ms),
        lambda: alias_decisions.set_alias(log.state, "b", 1, log.cause()),
        lambda: alias_decisions.tag(log.state, 1, {"b": ""}, log.cause()),
    ):
        with pytest.raises(Refused, match="version 1: expected an announced version, found one that is being deleted"):
            attempt()
    assert decisions.due_good(log.state, log.now_ms * 2, GATE) == [3, 4, 5]


def test_a_deletion_that_has_not_ended_comes_first() -> None:
    log = a_log(5)
    first = retire(log, keep=(2, 3))
    assert first.versions == (Doomed(1, 1, log.state.deletion.versions[0].created_at_ms),)
    # Another process, or the same one after kill -9: it is told what is to be deleted, and writes nothing.
    change = upkeep.retire(log.state, everything, log.cause())
    assert change.records == () and change.outcome == upkeep.Retired(first.versions, first.operation)
    second = retire(log, ended=first.operation)
    assert [doomed.version for doomed in second.versions] == [2, 3]
    # The first one comes late with what it has ended: the second deletion isn't taken for it.
    late = upkeep.retire(log.state, everything, log.cause(), ended=first.operation)
    assert late.records == () and late.outcome.versions == second.versions
    last = retire(log, ended=second.operation)
    assert last.versions == () and log.state.deletion.versions == () and log.state.deletion.who == "me"
    assert upkeep.retire(log.state, everything, log.cause(), ended=last.operation).records == ()


def test_a_deletion_goes_in_batches_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "BATCH", 40)
    log = a_log(60)
    first = retire(log)
    assert [doomed.version for doomed in first.versions] == list(range(1, 41)) and first.left == 18
    second = retire(log, ended=first.operation)
    assert (len(second.versions), second.left) == (18, 0)
    assert len(log.state.versions) == 2
    assert sum(key.startswith("version/") for key in log.compacted) == 2


def test_tags_that_were_removed_go_with_their_version() -> None:
    log = a_log(4)
    log.write(alias_decisions.tag(log.state, 1, {"x": ""}, log.cause()))
    log.write(alias_decisions.tag(log.state, 1, {}, log.cause(), remove=["x"]))
    assert "alias/tags/1" in log.compacted
    retire(log)
    assert "alias/tags/1" not in log.compacted and log.state.tags == {}


def test_a_lost_registry_is_made_again() -> None:
    log = Log()
    found = {version: manifest(version, epoch=version) for version in (3, 4, 7)}
    done = log.write(upkeep.reindex(log.state, found, log.cause("topic lost"), champion=4))
    assert done == upkeep.Reindexed((3, 4, 7), (), 4)
    champion = log.state.champion
    assert (champion.version, champion.hold, champion.hold_reason, champion.how) == (4, True, "topic lost", "promote")
    assert log.state.versions[4].champion_at_ms == (champion.at_ms,)
    assert log.state.trainer.epoch == 7, "the next trainer takes an epoch that no version has"
    # The rest comes in a second batch, after a crash perhaps: it moves no champion.
    done = log.write(upkeep.reindex(log.state, {1: manifest(1)}, log.cause(), champion=1))
    assert done == upkeep.Reindexed((1,), (), None) and log.state.champion.version == 4
    change = upkeep.reindex(log.state, {**found, 1: manifest(1)}, log.cause(), champion=1)
    assert change.records == ()


def test_a_version_that_its_trainer_is_about_to_announce_is_left_to_it() -> None:
    log = a_log(2)
    change = upkeep.reindex(log.state, {3: manifest(3)}, log.cause())
    assert (change.records, change.outcome.added) == ((), ())
    log.announce(3)
    assert log.state.champion.version == 3


def test_a_version_that_is_being_deleted_is_not_entered_again() -> None:
    log = a_log(4)
    retire(log)
    assert upkeep.reindex(log.state, {1: manifest(1)}, log.cause()).outcome.added == ()


def test_a_record_that_an_older_release_wrote_is_completed() -> None:
    """It tags a version good and drops the fields that it doesn't know."""
    log = a_log(3)
    record = log.state.versions[2]
    assert record.chain == ""
    ours = {
        "epoch": record.epoch,
        "created_at_ms": record.created_at_ms,
        "chain": "deepfm/1/0",
        "sequence": 9,
        "digest": "0" * 16,
        "deltas_offset": 4,
    }
    other = {**ours, "created_at_ms": 1}
    assert upkeep.reindex(log.state, {2: Manifest(version=2, **other)}, log.cause()).records == ()
    done = log.write(upkeep.reindex(log.state, {2: Manifest(version=2, **ours)}, log.cause()))
    assert done == upkeep.Reindexed((), (2,), None)
    after: VersionRecord = log.state.versions[2]
    assert after == replace(record, chain="deepfm/1/0", sequence=9, digest="0" * 16, deltas_offset=4)


def test_what_was_never_announced_goes_unless_it_was_entered_meanwhile() -> None:
    """Below the newest only: the store may have a version above it that its trainer is about to announce."""
    log = a_log(6)
    retire(log, keep=(1, 2, 3, 4, 5))
    rests = [Doomed(4, 0, 0), Doomed(8, 1, 80)]
    assert retire(log, keep=(1, 2, 3, 4, 5), rests=rests).versions == ()
    log.write(upkeep.Change((upkeep.KeyedRecord("version/3", None),), None))
    found = retire(log, keep=(1, 2, 4, 5), rests=[Doomed(3, 1, 30), *rests])
    assert found.versions == (Doomed(3, 1, 30),) and found.size == 0
    assert upkeep.reindex(log.state, {3: manifest(3)}, log.cause()).outcome.added == ()
