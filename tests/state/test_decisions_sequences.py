"""Any sequence of changes of the registry keeps its invariants, and each undo restores what was before."""

from __future__ import annotations

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from state import alias_decisions, decisions, upkeep
from state.alias_records import Alias
from state.changes import Undo
from state.errors import Refused, StaleEpoch
from state.registry import RegistryState
from tests.state.registry_log import GATE, Log


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
        copy = self.copy()
        copy.run(undo.command)
        assert copy.served() == before

    def copy(self) -> Log:
        copy = Log()
        copy.now_ms, copy.count = self.log.now_ms, 10_000
        for key, value in self.log.compacted.items():
            copy.state.apply(key.encode(), value, 0)
        return copy

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

    @rule(name=st.sampled_from(["a", "b"]), version=st.integers(1, 12))
    def set_alias(self, name: str, version: int) -> None:
        before = self.log.state.aliases.get(name, Alias()).version
        try:
            moved = self.log.write(alias_decisions.set_alias(self.log.state, name, version, self.log.cause()))
        except Refused:
            assert version not in self.log.state.versions
            return
        assert self.log.state.aliases[name].version == version and moved.changed == (before != version)
        if moved.undo is not None:
            self.check_alias_undo(name, before, moved.undo)

    @rule(name=st.sampled_from(["a", "b"]))
    def remove_alias(self, name: str) -> None:
        before = self.log.state.aliases.get(name, Alias()).version
        try:
            moved = self.log.write(alias_decisions.remove_alias(self.log.state, name, self.log.cause()))
        except Refused:
            assert name not in self.log.state.aliases
            return
        if moved.undo is not None:
            self.check_alias_undo(name, before, moved.undo)

    def check_alias_undo(self, name: str, before: int | None, undo: str) -> None:
        copy = self.copy()
        copy.run(undo)
        assert copy.state.aliases[name].version == before

    @rule(version=st.integers(1, 12), value=st.sampled_from(["", "x"]), remove=st.booleans())
    def tag(self, version: int, value: str, remove: bool) -> None:
        try:
            self.log.write(
                alias_decisions.tag(
                    self.log.state, version, {} if remove else {"t": value}, self.log.cause(), remove=["t"] * remove
                )
            )
        except Refused:
            assert version not in self.log.state.versions
            return
        assert ("t" in self.log.state.tags_of(version)) is not remove

    @rule(keep=st.sets(st.integers(1, 12)), ends=st.booleans())
    def delete(self, keep: set[int], ends: bool) -> None:
        """A policy that lets everything else go; a process that ends its deletion, or dies before."""
        served, pending = self.log.served(), self.log.state.deletion
        aliases = {name: alias.version for name, alias in self.log.state.aliases.items()}
        needed, before = upkeep.needed(self.log.state), set(self.log.state.versions)
        done = self.log.write(
            upkeep.retire(
                self.log.state,
                lambda state: state.versions.keys() - keep,
                self.log.cause(),
                ended=pending.operation if ends else "",
            )
        )
        assert self.log.served() == served
        assert {name: alias.version for name, alias in self.log.state.aliases.items()} == aliases
        if pending.versions and not ends:
            assert done.versions == pending.versions and self.log.state.versions.keys() == before
        else:
            assert self.log.state.versions.keys() == (before & keep) | needed.keys()
            assert {doomed.version for doomed in done.versions} == before - self.log.state.versions.keys()

    @invariant()
    def what_has_a_name_is_there(self) -> None:
        state = self.log.state
        assert {alias.version for alias in state.aliases.values()} - {None} <= state.versions.keys()
        assert {version for version, tags in state.tags.items() if tags.tags} <= state.versions.keys()
        assert not {doomed.version for doomed in state.deletion.versions} & state.versions.keys()
        assert state.newest == self.largest

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
            and (reader.aliases, reader.tags) == (self.log.state.aliases, self.log.state.tags)
            and reader.deletion == self.log.state.deletion
        )


TestOperations = Operations.TestCase
TestOperations.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
