"""Changes of the registry: every sequence of them keeps the invariants, and each undo restores the state before the change."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from state import decisions
from state.decisions import Cause, Change, Undo
from state.errors import Refused, StaleEpoch
from state.manifest import Manifest
from state.registry import RegistryState, encode_record
from state.settings import SnapshotSettings
from tests.judged import judged

GATE = SnapshotSettings(good_after_ms=1_000)


class Log:
    """A registry: its state as a reader has it, and its records as the compacted topic keeps them."""

    def __init__(self) -> None:
        self.state = RegistryState()
        self.compacted: dict[str, bytes] = {}
        self.now_ms = 1_000_000
        self.count = 0

    def write(self, change: Change) -> object:  # type: ignore[type-arg]
        for key, record in change.records:
            value = encode_record(record)
            assert self.state.apply(key.encode(), value, len(self.compacted)) is None
            self.compacted.pop(key, None)
            self.compacted[key] = value
        return change.outcome

    def cause(self, reason: str = "why") -> Cause:
        self.count += 1
        return Cause("me", self.now_ms, reason, f"op{self.count}")

    def announce(  # type: ignore[no-untyped-def]
        self, version: int, epoch: int | None = None, *, settings: SnapshotSettings = GATE, loss: float = 0.5, **verdict: object
    ):
        manifest = Manifest(
            version=version,
            epoch=self.state.trainer.epoch if epoch is None else epoch,
            created_at_ms=self.now_ms,
            examples_seen=1_000,
            metrics={"window_examples": 1_000, "window_log_loss": loss, "window_calibration": 1.0},
            verdict=judged(**verdict),
        )
        return self.write(
            decisions.announce(
                self.state, manifest, settings=settings, who="trainer", now_ms=self.now_ms, operation=f"announce{version}"
            )
        )

    def rollback(self, **where: int) -> decisions.Moved:
        target = decisions.rollback_target(self.state, now_ms=self.now_ms, **where)
        return self.write(decisions.rollback(self.state, target, self.cause()))  # type: ignore[return-value]

    def run(self, command: str) -> None:
        """Run an undo command, from its text."""
        words = shlex.split(command)
        assert words[:2] == ["headrace", "snapshot"]
        verb, rest = words[2], words[3:]
        options = {rest[i]: rest[i + 1] for i in range(len(rest) - 1) if rest[i] in ("--reason", "--hold")}
        if verb == "promote":
            hold = True if "--hold" in options else False if "--resume" in rest else None
            change = decisions.promote(
                self.state, int(rest[0]), self.cause(options["--reason"]), hold=hold, hold_reason=options.get("--hold", "")
            )
            self.write(change)
        elif verb == "hold":
            self.write(decisions.hold(self.state, self.cause(options["--reason"])))
        else:
            assert verb == "resume"
            self.write(decisions.resume(self.state, self.cause()))

    def served(self) -> tuple[int | None, bool, str]:
        champion = self.state.champion
        return champion.version, champion.hold, champion.hold_reason


def a_log(versions: int = 5, good: tuple[int, ...] = ()) -> Log:
    log = Log()
    log.write(decisions.take_epoch(log.state, who="trainer", now_ms=log.now_ms))
    for version in range(1, versions + 1):
        log.now_ms += 5_000
        log.announce(version)
    log.write(decisions.tag_good(log.state, good, now_ms=log.now_ms))
    return log


class Operations(RuleBasedStateMachine):
    """Actions of trainers and operators and steps of the clock, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.largest = 0
        self.epochs = 0

    @initialize()
    def first_trainer(self) -> None:
        self.take_epoch()

    @rule()
    def take_epoch(self) -> None:
        epoch = self.log.write(decisions.take_epoch(self.log.state, who="t", now_ms=self.log.now_ms))
        assert epoch == self.epochs + 1
        self.epochs = epoch  # type: ignore[assignment]

    @rule(by=st.integers(-50, 20_000))
    def time_passes(self, by: int) -> None:
        self.log.now_ms += by  # the clocks of machines differ, so time may go backwards

    @rule(
        ahead=st.integers(-2, 3),
        loss=st.sampled_from([0.5, float("nan")]),
        auto=st.booleans(),
        flow=st.sampled_from(["flowing", "flowing", "withheld"]),
        line=st.sampled_from([1, 1, 2]),
    )
    def announce(self, ahead: int, loss: float, auto: bool, flow: str, line: int) -> None:
        version = self.largest + ahead
        if version < 1:
            return
        settings = GATE.model_copy(update={"auto_promote": auto})
        before, champions = self.log.served(), self.log.state.champion_line
        known = version in self.log.state.versions
        try:
            outcome = self.log.announce(version, settings=settings, loss=loss, flow=flow, line=line)
        except Refused:
            assert version <= self.largest
            return
        if known:  # the same announcement again, within the same millisecond: nothing new
            assert self.log.served() == before
            return
        assert version > self.largest
        self.largest = version
        withheld = flow == "withheld" and champions is not None
        if before[1] or not auto or loss != loss or withheld or champions not in (None, line):
            assert not outcome.promoted and self.log.served() == before
        if outcome.promoted:
            assert self.log.served() == (version, False, before[2])
        assert self.log.state.versions[version].gate == outcome.reason

    @precondition(lambda self: self.epochs > 1)
    @rule()
    def stale_trainer_announces(self) -> None:
        before = dict(self.log.compacted)
        with pytest.raises(StaleEpoch):
            self.log.announce(self.largest + 1, epoch=self.epochs - 1)
        assert self.log.compacted == before

    @rule(version=st.integers(1, 12), hold=st.sampled_from([None, True, False]), why=st.sampled_from(["a 'b'", "--x"]))
    def promote(self, version: int, hold: bool | None, why: str) -> None:
        before = self.log.served()
        try:
            moved = self.log.write(decisions.promote(self.log.state, version, self.log.cause(), hold=hold, hold_reason=why))
        except Refused:
            assert version not in self.log.state.versions or version == before[0]
            return
        assert self.log.state.champion.version == version
        self.check_undo(before, moved.undo)

    @rule(
        where=st.one_of(
            st.just({}),
            st.fixed_dictionaries({"to": st.integers(1, 12)}),
            st.fixed_dictionaries({"back_ms": st.integers(0, 60_000)}),
        )
    )
    def rollback(self, where: dict[str, int]) -> None:
        before = self.log.served()
        good = [
            version
            for version, record in self.log.state.versions.items()
            if record.good_at_ms and before[0] and version < before[0] and not self.log.state.champion.was_rolled_back(version)
        ]
        try:
            moved = self.log.rollback(**where)
        except Refused:
            assert self.log.served() == before
            assert where or not good
            return
        assert before[0] is not None and moved.version < before[0]
        assert self.log.state.champion.hold
        if not where:
            assert moved.version == max(good)
        self.check_undo(before, moved.undo)

    def check_undo(self, before: tuple[int | None, bool, str], undo: Undo | None) -> None:
        """Run the undo on a copy, so that the sequence continues after the change."""
        if before[0] is None:
            assert undo is None
            return
        assert undo is not None
        copy = Log()
        copy.now_ms, copy.count = self.log.now_ms, 10_000
        for key, value in self.log.compacted.items():
            copy.state.apply(key.encode(), value, 0)
        copy.run(undo.command)
        assert copy.served() == before

    @rule()
    def hold_and_resume(self) -> None:
        before = self.log.served()
        held = self.log.write(decisions.hold(self.log.state, self.log.cause("wait")))
        assert self.log.state.champion.hold
        if held.undo is None:
            assert before[1] and self.log.served() == before
        else:
            self.log.run(held.undo.command)
            assert self.log.served() == before

    @rule()
    def resume(self) -> None:
        self.log.write(decisions.resume(self.log.state, self.log.cause()))
        assert not self.log.state.champion.hold

    @rule()
    def tag_what_is_due(self) -> None:
        due = decisions.due_good(self.log.state, self.log.now_ms, GATE)
        for version in due:
            record = self.log.state.versions[version]
            assert record.champion_at_ms and record.champion_at_ms[-1] <= self.log.now_ms - GATE.good_after_ms
            assert not self.log.state.champion.was_rolled_back(version)
        self.log.write(decisions.tag_good(self.log.state, due, now_ms=self.log.now_ms))
        assert decisions.due_good(self.log.state, self.log.now_ms, GATE) == []

    @invariant()
    def the_champion_was_announced(self) -> None:
        champion = self.log.state.champion
        if champion.version is not None:
            record = self.log.state.versions[champion.version]
            assert record.champion_at_ms[-1] == champion.at_ms
            assert not champion.was_rolled_back(champion.version)
            assert self.log.state.champion_at(champion.at_ms) == champion.version

    @invariant()
    def moves_never_go_back_in_time(self) -> None:
        times = [move.at_ms for move in self.log.state.champion.moves]
        assert times == sorted(set(times))

    @invariant()
    def a_new_reader_sees_the_same(self) -> None:
        reader = RegistryState()
        for offset, (key, value) in enumerate(self.log.compacted.items()):
            assert reader.apply(key.encode(), value, offset) is None
        assert repr(reader) == repr(self.log.state) or (  # NaN differs from itself, its text doesn't
            sorted(map(repr, reader.versions.values())) == sorted(map(repr, self.log.state.versions.values()))
            and (reader.champion, reader.trainer) == (self.log.state.champion, self.log.state.trainer)
        )


TestOperations = Operations.TestCase
TestOperations.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)


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
    assert waits.reason.startswith("candidate: of another line than the champion and not compared with it")
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
