"""The registry's state from its records: any bytes are accepted, and compaction doesn't change the state."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from state.alias_records import Alias, Deletion, VersionTags
from state.manifest import Manifest
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
        (b"alias/candidate", b'{"version": "1"}', "Expected `int | null`, got `str` - at `$.version`"),
        (b"alias/tags/1", b'{"version": 2}', "expected version 1 in the value, found 2"),
        (b"alias/gc", b'{"versions": [1]}', "$.versions[0]"),
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
    assert state.apply(b"alias/candidate", b'{"version": 1, "later": [1]}', 2) is None
    for key in (b"alias/split/candidate", b"alias/tags/seven", b"alias/", b"alias/Shadow"):
        assert state.apply(key, b"not even JSON", 3) is None
    assert state.champion_record == VersionRecord(version=1)
    assert state.aliases == {"candidate": Alias(version=1)} and state.aliases_of(1) == ["candidate"]


def test_tombstones_remove() -> None:
    state = RegistryState()
    state.apply(b"version/1", encode_record(VersionRecord(version=1)), 0)
    state.apply(b"version/1", None, 1)
    state.apply(b"version/1", None, 2)
    assert state.versions == {}
    state.apply(b"alias/candidate", encode_record(Alias(version=1)), 3)
    state.apply(b"alias/tags/1", encode_record(VersionTags(version=1)), 4)
    state.apply(b"alias/gc", encode_record(Deletion(operation="x")), 5)
    assert (list(state.aliases), list(state.tags), state.deletion.operation) == (["candidate"], [1], "x")
    for offset, key in enumerate((b"alias/candidate", b"alias/tags/1", b"alias/gc"), 6):
        state.apply(key, None, offset)
    assert (state.aliases, state.tags, state.deletion) == ({}, {}, Deletion())


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


def test_a_champion_that_is_held_is_not_followed() -> None:
    assert Champion(version=3).follows and not Champion(version=3, hold=True).follows


def test_a_record_says_the_point_of_the_chain() -> None:
    manifest = Manifest(version=7, chain="deepfm/12/0", sequence=400, digest="00000000000000ff", deltas_offset=801)
    state = RegistryState()
    state.apply(b"version/7", encode_record(VersionRecord.of(manifest, now_ms=1, who="t", gate="g")), 0)
    record = state.versions[7]
    assert (record.chain, record.sequence, record.digest, record.deltas_offset) == ("deepfm/12/0", 400, "00000000000000ff", 801)
    old = VersionRecord.of(Manifest(version=8), now_ms=1, who="t", gate="g")
    assert (old.chain, old.sequence, old.digest, old.deltas_offset) == ("", None, "", None)


def test_a_copy_stays_as_it_is_while_the_state_goes_on() -> None:
    state = RegistryState()
    assert state.apply(b"version/1", b'{"version":1}', 0) is None
    copy = state.copy()
    assert copy == state
    state.apply(b"version/2", b'{"version":2}', 1)
    state.apply(b"alias/blue", b'{"version":2}', 2)
    state.apply(b"alias/tags/2", b'{"version":2}', 3)
    state.apply(b"nonsense", b"", 4)
    assert (list(copy.versions), copy.aliases, copy.tags, list(copy.problems)) == ([1], {}, {}, [])
