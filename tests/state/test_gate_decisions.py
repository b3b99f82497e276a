"""An operator's release in the registry."""

from __future__ import annotations

import pytest

from state import gate_decisions
from state.errors import Refused
from state.gate_release import RELEASE_KEY, GateRelease, Released
from state.registry import RegistryState, VersionRecord, encode_record
from tests.judged import judged
from tests.state.registry_log import Log, a_log


def release(log: Log) -> object:
    return log.write(gate_decisions.release(log.state, log.cause("it is real")))


def test_a_release_says_who_why_and_which_line() -> None:
    log = a_log(2)
    log.state.versions[2] = VersionRecord(version=2, verdict=judged(line=4, flow="withheld", reason="worse", since_ms=9))
    done = release(log)
    assert done == Released(4, "worse", 9)
    found = log.state.release
    assert (found.line, found.who, found.reason) == (4, "me", "it is real")
    assert log.state.has_done(found.operation)


def test_a_release_of_what_flows_is_for_what_is_withheld_since_the_newest_version() -> None:
    log = a_log(2)
    assert release(log) == Released(log.state.versions[2].line, None, None)
    assert log.state.release.line == log.state.versions[2].line


def test_a_registry_without_a_report_has_nothing_to_release() -> None:
    for versions in ({}, {3: VersionRecord(version=3)}):
        with pytest.raises(Refused, match="Nothing was released"):
            gate_decisions.release(RegistryState(versions=versions), a_log(1).cause())


def test_a_tombstone_takes_the_release_away() -> None:
    state = RegistryState()
    value = encode_record(GateRelease(line=3, operation="x"))
    assert state.apply(RELEASE_KEY.encode(), value, 0) is None
    assert state.release.line == 3
    assert state.apply(RELEASE_KEY.encode(), None, 1) is None
    assert state.release == GateRelease()
    assert state.aliases == {}
