"""Changes of the registry, one by one: what each requires, records and undoes."""

from __future__ import annotations

import pytest

from state import decisions
from state.changes import Cause
from state.errors import Refused, StaleEpoch
from state.manifest import Manifest
from state.registry import RegistryState, encode_record
from tests.state.registry_log import GATE, a_log


def test_a_rollback_goes_to_the_newest_good_one_and_comes_back() -> None:
    log = a_log(5, good=(1, 3, 5))
    moved = log.rollback()
    assert (moved.previous, moved.version, moved.held) == (5, 3, True)
    assert log.served() == (3, True, "rolled back: why")
    assert not log.announce(6).promoted
    assert moved.undo.command == "headrace snapshot promote 5 --reason 'undo of 3' --resume"
    log.run(moved.undo.command)
    assert log.served() == (5, False, "")
    assert log.announce(7).promoted


def test_versions_that_were_rolled_back_no_longer_count_as_good() -> None:
    log = a_log(5, good=(1, 3, 4, 5))
    log.rollback(to=3)
    log.run("headrace snapshot resume")
    log.now_ms += 10_000
    log.announce(6)
    assert decisions.due_good(log.state, log.now_ms + 10_000, GATE) == [2, 6]  # neither 4 nor 5
    assert log.rollback().version == 3


def test_a_hold_from_before_outlives_rollback_and_undo() -> None:
    log = a_log(3, good=(2,))
    log.write(decisions.hold(log.state, log.cause("sale")))
    moved = log.rollback()
    assert log.served() == (2, True, "sale")
    assert moved.undo.command == "headrace snapshot promote 3 --reason 'undo of 2'"
    log.run(moved.undo.command)
    assert log.served() == (3, True, "sale")


def test_rollback_by_time() -> None:
    log = a_log(5)  # promoted at 1,005,000, 1,010,000, …
    assert decisions.rollback_target(log.state, before_ms=1_012_000, now_ms=0) == 2
    assert decisions.rollback_target(log.state, back_ms=6_000, now_ms=log.now_ms) == 3
    with pytest.raises(Refused, match=r"expected a champion at 1970-01-01T00:00:01Z, found none remembered. --to can name: 4"):
        decisions.rollback_target(log.state, before_ms=1_000, now_ms=0)
    with pytest.raises(Refused, match=r"rollback to version 5: expected one older than the champion, 5\. --to can name"):
        decisions.rollback_target(log.state, back_ms=0, now_ms=log.now_ms)
    with pytest.raises(Refused, match="expected one of --to, --back and --before, found several"):
        decisions.rollback_target(log.state, to=1, back_ms=0, now_ms=0)


def test_rollback_says_what_can_be_named_when_nothing_is_good() -> None:
    log = a_log(7)
    with pytest.raises(Refused) as raised:
        decisions.rollback_target(log.state, now_ms=0)
    assert str(raised.value) == (
        "rollback from version 7: expected an older version tagged good, found none. --to can name: "
        "6 (champion at 1970-01-01T00:17:10Z), 5 (champion at 1970-01-01T00:17:05Z), 4 (champion at 1970-01-01T00:17:00Z), "
        "3 (champion at 1970-01-01T00:16:55Z), 2 (champion at 1970-01-01T00:16:50Z)."
    )
    with pytest.raises(Refused, match="No older version is announced, so there is nothing to go back to"):
        decisions.rollback_target(a_log(1).state, now_ms=0)
    with pytest.raises(Refused, match="expected a champion to go back from, found none"):
        decisions.rollback_target(RegistryState(), now_ms=0)
    with pytest.raises(Refused, match=r"version 9: expected an announced version, .*\(announced: 1 to 7\)"):
        decisions.rollback_target(log.state, to=9, now_ms=0)


def test_who_may_announce() -> None:
    log = a_log(2)
    log.write(decisions.take_epoch(log.state, who="second", now_ms=log.now_ms))
    with pytest.raises(StaleEpoch, match=r"version 3: expected the trainer's epoch 2 \(taken by second\), found 1"):
        log.announce(3, epoch=1)
    with pytest.raises(Refused, match="expected the trainer's epoch 2, found 9, which nobody took"):
        log.announce(3, epoch=9)
    log.announce(3)
    log.now_ms += 1
    with pytest.raises(Refused, match="version 3: expected a number above 3, the newest announced, found 3"):
        log.announce(3)


def test_announcing_again_is_recognised() -> None:
    log = a_log(2)
    before = dict(log.compacted)
    again = log.announce(2)
    assert again.promoted and again.reason.startswith("promoted: ")
    assert log.compacted == before


def test_the_reason_why_a_version_stays_a_candidate_is_recorded() -> None:
    log = a_log(2)
    assert not log.announce(3, flow="withheld", reason="log loss +7.0 % against version 1's").promoted
    assert log.state.versions[3].gate == "candidate: withheld: log loss +7.0 % against version 1's"
    log.write(decisions.hold(log.state, log.cause("sale")))
    assert log.announce(4).reason.startswith("candidate: held (sale); passed the gate: ")
    log.write(decisions.resume(log.state, log.cause()))
    off = GATE.model_copy(update={"auto_promote": False})
    assert log.announce(5, settings=off).reason.startswith("candidate: snapshots.auto_promote is off; passed")
    assert log.state.champion.version == 2


def test_a_promotion_that_changes_nothing_is_rejected() -> None:
    log = a_log(2)
    with pytest.raises(Refused, match=r"version 2: it is champion already, since 1970-01-01T00:16:50Z\. Nothing was changed"):
        decisions.promote(log.state, 2, log.cause())
    moved = log.write(decisions.promote(log.state, 2, log.cause(), hold=True, hold_reason="pin"))
    assert log.served() == (2, True, "pin") and moved.undo.command.endswith("--resume")  # type: ignore[attr-defined]
    with pytest.raises(Refused, match="version 7: expected an announced version"):
        decisions.promote(log.state, 7, log.cause())


def test_good_needs_time_and_versions_that_flow() -> None:
    log = a_log(2)
    later = log.now_ms + GATE.good_after_ms
    assert decisions.due_good(log.state, later - 1, GATE) == [1]
    assert decisions.due_good(log.state, later, GATE) == [1, 2]
    log.announce(3, flow="withheld")
    assert decisions.due_good(log.state, later, GATE) == []


def test_while_withheld_a_rollback_goes_to_a_version_before_the_fault() -> None:
    """A fault is only noticed some clicks after it began, so versions that were tagged good in between aren't good."""
    log = a_log(5, good=(1, 2, 3, 4))
    log.announce(6, flow="withheld", anchor=2)
    assert decisions.rollback_target(log.state, now_ms=log.now_ms) == 2
    log.announce(7)
    assert log.state.champion.version == 7
    assert decisions.rollback_target(log.state, now_ms=log.now_ms) == 4


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ({"negatives": 0, "clicks": 400}, "candidate: one class only: 400 clicks and 0 non-clicks seen"),
        ({"clicks": 9}, "candidate: 9 clicks and 900 non-clicks seen in 1000 examples; a first champion needs 10 of each"),
        ({"negatives": 9}, "candidate: 100 clicks and 9 non-clicks seen"),
        ({"problems": ("scores don't vary",)}, "candidate: scores don't vary"),
    ],
)
def test_no_first_champion_without_both_classes(verdict: dict[str, object], says: str) -> None:
    log = a_log(0)
    assert log.announce(1, **verdict).reason.startswith(says)
    assert log.state.champion.version is None
    assert log.announce(2).reason == "promoted: the first champion, 100 clicks and 900 non-clicks seen"


def test_one_class_is_never_promoted_over_a_champion_either() -> None:
    log = a_log(1)
    assert log.announce(2, clicks=0).reason == "candidate: one class only: 0 clicks and 900 non-clicks seen"


def test_a_version_that_no_gate_has_seen_is_never_promoted() -> None:
    log = a_log(0)
    manifest = Manifest(version=1, epoch=1, examples_seen=1_000)
    decided = decisions.announce(log.state, manifest, settings=GATE, who="t", now_ms=1, operation="o")
    assert decided.outcome.reason == "candidate: no gate has looked at it"


def test_a_new_line_waits_for_its_verdict() -> None:
    log = a_log(2)
    log.write(decisions.take_epoch(log.state, who="trainer in another folder", now_ms=log.now_ms))
    waits = log.announce(3, line=2, reason="nothing was compared yet")
    assert not waits.promoted
    assert waits.reason.startswith("candidate: of another line than the champion: ")
    assert log.announce(4, line=2, passed=(1,), flow="withheld", reason="worse").reason == "candidate: withheld: worse"
    assert log.announce(5, line=2, passed=(1,)).promoted
    assert log.announce(6, line=2).promoted  # line 2 is the champion's line now
    assert not log.announce(7, line=1).promoted  # and line 1 is another one


def test_a_second_hold_changes_nothing_and_reports_the_first() -> None:
    log = a_log(1)
    log.write(decisions.hold(log.state, Cause("ann", 5_000, "sale until Monday", "first")))
    again = decisions.hold(log.state, Cause("bob", 6_000, "my reason", "second"))
    assert again.records == ()
    assert (again.outcome.reason, again.outcome.who, again.outcome.at_ms) == ("sale until Monday", "ann", 5_000)
    assert (again.outcome.changed, again.outcome.undo) == (False, None)


def test_a_retry_of_a_hold_that_was_written_reports_it_as_its_own_change() -> None:
    log = a_log(1)
    cause = Cause("ann", 5_000, "sale", "first")
    log.write(decisions.hold(log.state, cause))
    again = decisions.hold(log.state, cause).outcome
    assert again.changed and again.undo is not None and again.undo.command == "headrace snapshot resume"
    resume = Cause("ann", 6_000, "", "second")
    log.write(decisions.resume(log.state, resume))
    assert decisions.resume(log.state, resume).outcome.changed
    assert not decisions.resume(log.state, Cause("bob", 7_000, "", "third")).outcome.changed


def test_an_epoch_is_above_the_registrys_and_above_what_the_log_of_deltas_has_seen() -> None:
    state = RegistryState()
    for above, epoch in ((0, 1), (0, 2), (9, 10), (4, 11)):
        change = decisions.take_epoch(state, who="t", now_ms=1, above=above)
        assert change.outcome == epoch
        for key, record in change.records:
            assert state.apply(key.encode(), encode_record(record), 0) is None


def test_a_rollback_that_is_asked_for_again_changes_nothing_and_goes_no_further() -> None:
    """An operator whose answer was lost, or whose scorers didn't all confirm, runs the command with --to again."""
    log = a_log(5, good=(1, 3))
    log.rollback(to=3)
    assert decisions.rollback_target(log.state, to=3, now_ms=0) == 3
    again = decisions.rollback(log.state, 3, log.cause("again"))
    assert again.records == ()
    assert (again.outcome.version, again.outcome.previous, again.outcome.held, again.outcome.undo) == (3, 5, True, None)
    # A version that is champion for another reason was not put back.
    log.run("headrace snapshot promote 4 --reason better --hold sale")
    with pytest.raises(Refused, match="rollback to version 4: expected one older than the champion, 4"):
        decisions.rollback_target(log.state, to=4, now_ms=0)
