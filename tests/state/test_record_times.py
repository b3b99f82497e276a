"""A machine whose clock is ahead isn't believed: no time in a record is later than the record's arrival."""

from __future__ import annotations

import msgspec

from state import decisions
from state.canary import Thresholds
from state.canary_decisions import begin_canary
from state.record_times import TOLERANCE_MS, not_later
from state.registry import RegistryState
from tests.state.registry_log import GATE, a_log

HOUR_MS = 3_600_000


def test_times_of_writing_are_limited_wherever_they_are_and_nothing_else() -> None:
    found = not_later(
        {
            "at_ms": 9_001,
            "champion_at_ms": [1, 7_000],
            "moves": [{"at_ms": 9_001, "reason": "9001"}],
            "created_at_ms": 9_001,
            "n": 9_001,
        },
        5_000,
    )
    assert found == {
        "at_ms": 5_000,
        "champion_at_ms": [1, 5_000],
        "moves": [{"at_ms": 5_000, "reason": "9001"}],
        "created_at_ms": 9_001,
        "n": 9_001,
    }
    assert not_later({"at_ms": 5_000 + TOLERANCE_MS}, 5_000) == {"at_ms": 5_000 + TOLERANCE_MS}, "clocks are never equal"
    assert not_later({"at_ms": 9_001}, None) == {"at_ms": 9_001}
    assert not_later([1, "x", None, {"at_ms": "x"}], 5) == [1, "x", None, {"at_ms": "x"}]


def test_an_operator_whose_clock_is_ahead_spoils_no_history() -> None:
    log = a_log(3)
    before_ms = log.now_ms
    log.arrived_ms = before_ms  # the broker's clock, which doesn't jump
    log.now_ms += HOUR_MS
    log.write(decisions.promote(log.state, 1, log.cause("by a machine an hour ahead")))
    log.write(decisions.hold(log.state, log.cause()))
    log.write(begin_canary(log.state, "shadow", 2, 0.1, Thresholds(), log.cause()))
    log.write(decisions.resume(log.state, log.cause()))
    log.now_ms -= HOUR_MS
    for version in (4, 5):
        log.now_ms += 5_000
        log.arrived_ms = log.now_ms
        log.announce(version)
    assert log.state.champion.at_ms == before_ms + 10_000
    assert log.state.champion.hold_at_ms == log.state.canary.at_ms == before_ms
    assert log.state.champion_at(before_ms + 7_000) == 4, "a rollback to a time finds it"
    assert 4 in decisions.due_good(log.state, log.now_ms, GATE), "and versions are tagged good"
    again = RegistryState()
    for key, value in log.compacted.items():
        assert again.apply(key.encode(), value, 0, log.now_ms) is None
    assert again.champion == msgspec.convert(msgspec.to_builtins(log.state.champion), type(again.champion))
