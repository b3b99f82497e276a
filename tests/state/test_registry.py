"""The registry's state from its records: any bytes are accepted, and compaction doesn't change the state."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from state.registry import (
    CHAMPION_KEY,
    TRAINER_KEY,
    Champion,
    RegistryState,
    TrainerLease,
    VersionRecord,
    encode_record,
    version_key,
)


@given(st.one_of(st.none(), st.binary(max_size=40), st.just(b"alias/champion"), st.just(b"version/3")), st.binary(max_size=60))
def test_no_bytes_raise_an_error(key: bytes | None, value: bytes) -> None:
    state = RegistryState()
    problem = state.apply(key, value, 7)
    if problem is not None:
        assert "offset 7" in problem and state.problem_count == 1
        assert (state.versions, state.champion, state.trainer) == ({}, Champion(), TrainerLease())


def test_malformed_records_are_reported_and_change_nothing() -> None:
    state = RegistryState()
    good = encode_record(VersionRecord(version=1, metrics={"window_log_loss": 0.5}))
    assert state.apply(b"version/1", good, 0) is None
    cases = [
        (b"version/one", good, "expected version/N with a number, found 'one'"),
        (b"version/2", good, "expected version 2 in the value, found 1"),
        (b"version/1", b"{", "truncated"),
        (b"version/1", b'{"version": "1"}', "Expected `int`, got `str` - at `$.version`"),
        (b"version/1", b'{"version": 1, "metrics": {"a": "b"}}', "at `$.metrics[...]`"),
        (b"version/1", b"\xff", "snapshots offset"),
        (CHAMPION_KEY.encode(), b'{"version": [1]}', "$.version"),
        (TRAINER_KEY.encode(), b"[]", "Expected `object`"),
        (b"nonsense", b"{}", "expected version/N or alias/NAME"),
        (None, b"{}", "expected version/N or alias/NAME"),
        (b"version/1", b"[" * 100_000, "recursion"),
        (b"\xff", b"{}", "utf-8"),
    ]
    for offset, (key, value, says) in enumerate(cases):
        problem = state.apply(key, value, offset)
        assert problem is not None and says in problem and f"offset {offset}" in problem, problem
    assert state.problem_count == len(cases) == len(state.problems)
    assert list(state.versions) == [1] and state.champion.version is None


def test_fields_and_aliases_of_newer_writers_are_ignored() -> None:
    state = RegistryState()
    assert state.apply(b"version/1", b'{"version": 1, "later": {"a": [1]}}', 0) is None
    assert state.apply(b"alias/champion", b'{"version": 1, "later": true}', 1) is None
    assert state.apply(b"alias/shadow", b"not even JSON", 2) is None
    assert state.champion_record == VersionRecord(version=1)


def test_tombstones_remove() -> None:
    state = RegistryState()
    state.apply(b"version/1", encode_record(VersionRecord(version=1)), 0)
    state.apply(b"version/1", None, 1)
    state.apply(b"version/1", None, 2)
    assert state.versions == {}


def test_metrics_that_are_not_finite_are_null_in_the_log() -> None:
    record = VersionRecord(version=1, metrics={"window_auc": math.nan, "window_log_loss": 0.5})
    value = encode_record(record)
    assert json.loads(value)["metrics"] == {"window_auc": None, "window_log_loss": 0.5}
    state = RegistryState()
    state.apply(b"version/1", value, 0)
    assert math.isnan(state.versions[1].metrics["window_auc"])


def test_an_alias_may_come_before_its_version() -> None:
    """Compaction keeps the last record of each key, so a version that was tagged later comes after its alias."""
    state = RegistryState()
    state.apply(CHAMPION_KEY.encode(), encode_record(Champion(version=4)), 3)
    assert state.champion.version == 4 and state.champion_record is None and state.newest == 4
    state.apply(version_key(4).encode(), encode_record(VersionRecord(version=4)), 9)
    assert state.champion_record == VersionRecord(version=4)


def test_the_champion_at_a_given_time() -> None:
    state = RegistryState()
    for version, times in [(1, (100, 500)), (2, (300,)), (3, ())]:
        state.versions[version] = VersionRecord(version=version, champion_at_ms=times)
    assert [state.champion_at(at) for at in (99, 100, 299, 300, 499, 500, 9_999)] == [None, 1, 1, 2, 2, 1, 1]
