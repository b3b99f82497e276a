"""The registry's record of a shadow or canary: who may begin one, what ends it, what undoes it."""

from __future__ import annotations

import shlex

import msgspec
import pytest

from state import decisions, upkeep
from state.alias_decisions import set_alias
from state.canary import CANARY_KEY, Progress, Side, Thresholds
from state.canary_decisions import begin_canary, command_of, end_canary, note_progress
from state.canary_running import running_canary, why_over
from state.changes import Change
from state.errors import Refused
from state.registry import RegistryState
from tests.state.registry_log import Log, a_log


@pytest.fixture
def log() -> Log:
    """Versions 1 to 3, of which 3 is champion; then 4, a candidate."""
    log = a_log(3)
    log.write(decisions.hold(log.state, log.cause()))
    log.announce(4)
    return log


def begin(log: Log, mode: str = "canary", version: int = 4, share: float = 0.05, **limits: float):  # type: ignore[no-untyped-def]
    thresholds = Thresholds(**limits)  # type: ignore[arg-type]
    return log.write(begin_canary(log.state, mode, version, share, thresholds, log.cause()))  # type: ignore[arg-type]


def test_a_trial_is_one_record_that_old_readers_ignore(log: Log) -> None:
    begun = begin(log, clicks=50)
    canary = running_canary(log.state)
    assert canary is not None and (canary.mode, canary.version, canary.share) == ("canary", 4, 0.05)
    assert (canary.who, canary.reason, canary.thresholds.clicks, canary.runs) == ("me", "why", 50, True)
    assert begun.undo == "headrace snapshot canary stop --reason undo --yes"
    # A reader that doesn't know the key takes it for another record below alias/, and never for an alias.
    assert "/" in CANARY_KEY.removeprefix("alias/") and not log.state.aliases
    again = RegistryState()
    for key, value in log.compacted.items():
        assert again.apply(key.encode(), value, 0) is None
    assert again.canary == log.state.canary


def test_fields_of_a_newer_release_are_ignored(log: Log) -> None:
    begin(log)
    newer = msgspec.json.decode(log.compacted[CANARY_KEY]) | {"colour": "blue"}
    assert log.state.apply(CANARY_KEY.encode(), msgspec.json.encode(newer), 0) is None
    assert running_canary(log.state) is not None


@pytest.mark.parametrize(
    ("version", "share", "found"),
    [(9, 0.05, "announced version"), (3, 0.05, "the champion itself"), (4, 0.0, "a share"), (4, 0.6, "at most 50%")],
)
def test_what_cannot_be_tried_is_refused(log: Log, version: int, share: float, found: str) -> None:
    with pytest.raises(Refused, match=found):
        begin(log, version=version, share=share)
    assert not log.state.canary.runs


def test_a_shadow_may_score_everything_and_a_second_trial_is_refused(log: Log) -> None:
    begin(log, "shadow", share=1.0)
    with pytest.raises(Refused, match="found a shadow of version 4"):
        begin(log)


def test_a_rolled_back_version_is_no_candidate(log: Log) -> None:
    log.rollback(to=1)
    with pytest.raises(Refused, match="nobody has rolled back"):
        begin(log, version=2)


def test_promoted_it_becomes_champion_in_the_same_transaction_and_the_hold_stays(log: Log) -> None:
    canary = begin(log).canary
    change = end_canary(log.state, "promoted", log.cause("not worse"), of=canary.operation)
    assert [key for key, _ in change.records][-2:] == ["alias/champion", CANARY_KEY]
    done = log.write(change)
    champion = log.state.champion
    assert (champion.version, champion.previous, champion.reason, champion.hold) == (4, 3, "not worse", True)
    assert (done.canary.outcome, done.canary.ended_reason) == ("promoted", "not worse")  # type: ignore[attr-defined]
    assert running_canary(log.state) is None
    log.run(done.undo)  # type: ignore[attr-defined]
    assert log.state.champion.version == 3


@pytest.mark.parametrize("outcome", ["taken_back", "undecided", "stopped"])
def test_ended_otherwise_the_champion_stays_and_the_undo_begins_it_again(log: Log, outcome: str) -> None:
    begin(log, share=0.025, clicks=50, loss_margin=0.02, calibration_margin=0.2, ctr_margin=0.1, limit_ms=60_000)
    before = log.state.champion
    done = log.write(end_canary(log.state, outcome, log.cause("worse")))  # type: ignore[arg-type]
    assert log.state.champion == before and log.state.canary.outcome == outcome
    assert shlex.split(done.undo) == [  # type: ignore[attr-defined]
        *("headrace", "snapshot", "canary", "4", "--share", "2.5%", "--reason", "why", "--clicks", "50", "--loss-margin", "2%"),
        *("--calibration-margin", "20%", "--ctr-margin", "10%", "--limit", "60000ms"),
    ]
    assert end_canary(log.state, "promoted", log.cause()).records == ()


def test_a_late_decision_never_ends_or_changes_another_trial(log: Log) -> None:
    first = begin(log).canary
    log.write(end_canary(log.state, "stopped", log.cause()))
    begin(log, share=0.1)
    assert end_canary(log.state, "promoted", log.cause(), of=first.operation).records == ()
    assert note_progress(log.state, first.operation, Progress(at_ms=1)).records == ()
    assert log.state.canary.share == 0.1 and log.state.canary.runs


def test_progress_is_noted_once(log: Log) -> None:
    canary = begin(log).canary
    progress = Progress(at_ms=5, candidate=Side(clicks=3), verdict="more clicks are needed")
    log.write(note_progress(log.state, canary.operation, progress))
    assert log.state.canary.progress == progress
    assert note_progress(log.state, canary.operation, progress).records == ()
    assert command_of(log.state.canary) == command_of(canary)


def test_a_rollback_ends_it_in_the_same_transaction_whatever_the_clocks_say_also_when_it_is_undone(log: Log) -> None:
    log.now_ms += 3_600_000  # the machine of whoever begins it is an hour ahead
    canary = begin(log).canary
    log.now_ms -= 3_600_000
    moved = log.rollback(to=2)
    ended = log.state.canary
    assert running_canary(log.state) is None
    assert (ended.outcome, ended.ended_reason, ended.operation) == (
        *("stopped", "the champion was rolled back: why"),
        canary.operation,
    )
    assert moved.undo is not None
    log.run(moved.undo.command)
    assert running_canary(log.state) is None
    begin(log)
    assert running_canary(log.state) is not None, "an older rollback doesn't end it"


def test_a_rollback_by_an_older_release_ends_it_too(log: Log) -> None:
    begin(log)
    log.now_ms += 10
    change = decisions.rollback(log.state, 2, log.cause())
    log.write(Change(tuple(each for each in change.records if each.key != CANARY_KEY), None))
    assert running_canary(log.state) is None and why_over(log.state) == "the champion was rolled back"


def test_a_promotion_that_was_decided_before_a_rollback_never_moves_the_champion(log: Log) -> None:
    canary = begin(log).canary
    log.rollback(to=2)
    assert end_canary(log.state, "promoted", log.cause("better"), of=canary.operation).records == ()
    assert log.served()[:2] == (2, True)


def test_a_promotion_of_a_trial_that_is_over_only_ends_it(log: Log) -> None:
    canary = begin(log).canary
    log.now_ms += 10
    change = decisions.rollback(log.state, 2, log.cause())  # by an older release, which leaves the record as it is
    log.write(Change(tuple(each for each in change.records if each.key != CANARY_KEY), None))
    log.write(end_canary(log.state, "promoted", log.cause("better"), of=canary.operation))
    assert log.served()[:2] == (2, True)
    assert (log.state.canary.outcome, log.state.canary.ended_reason) == ("stopped", "the champion was rolled back")


def test_a_promotion_is_refused_after_a_hold_that_was_set_during_the_trial_whatever_the_clocks_say(log: Log) -> None:
    canary = begin(log).canary
    log.write(decisions.resume(log.state, log.cause()))
    log.now_ms -= 3_600_000
    log.write(decisions.hold(log.state, log.cause("sale")))
    with pytest.raises(Refused, match=r"expected auto-promotion to be as it was .* found it held by me since .* \(sale\)"):
        end_canary(log.state, "promoted", log.cause("better"), of=canary.operation)
    log.write(decisions.resume(log.state, log.cause()))
    log.write(end_canary(log.state, "promoted", log.cause("better"), of=canary.operation))
    assert log.state.champion.version == 4


def test_a_rollback_just_before_doesnt_end_it_on_machines_whose_clocks_differ(log: Log) -> None:
    log.now_ms += 5_000
    log.rollback(to=2)
    log.now_ms -= 5_000
    begin(log, version=4)
    assert running_canary(log.state) is not None


def test_a_promotion_by_hand_and_a_deletion_end_it(log: Log) -> None:
    begin(log)
    del log.state.versions[4]
    assert why_over(log.state) == "version 4 is deleted"


def test_a_promotion_by_hand_ends_it(log: Log) -> None:
    begin(log)
    log.write(decisions.promote(log.state, 4, log.cause()))
    assert why_over(log.state) == "version 4 is champion"


def test_the_candidate_is_not_deleted_while_it_is_tried(log: Log) -> None:
    begin(log)
    log.announce(5)
    assert upkeep.needed(log.state)[4] == "the candidate of a canary"
    log.write(end_canary(log.state, "stopped", log.cause()))
    assert 4 not in upkeep.needed(log.state)


def test_an_alias_of_that_name_is_another_thing(log: Log) -> None:
    log.write(set_alias(log.state, "canary", 2, log.cause()))
    begin(log)
    assert log.state.aliases["canary"].version == 2 and log.state.canary.version == 4


def test_a_retry_finds_what_it_has_done(log: Log) -> None:
    canary = begin(log).canary
    assert log.state.has_done(canary.operation)
    done = log.write(end_canary(log.state, "stopped", log.cause()))
    assert log.state.has_done(done.canary.ended_operation)  # type: ignore[attr-defined]
