"""Which versions are kept, and that nobody misses one that is deleted: rollbacks, the gate, chains, whoever reads just now."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from state import decisions
from state.errors import Refused
from state.registry import Champion, Move, RegistryState, VersionRange, VersionRecord
from state.retention import kept_versions, unannounced, versions_to_delete
from state.settings import SnapshotSettings
from stream.trainer.anchor_rule import choose_anchor
from tests.judged import judged
from tests.state.registry_log import a_log

# Nothing is kept but for the reason that a test is about.
LEAST = SnapshotSettings(keep_versions=1, keep_good=1, keep_ms=0, keep_for_ms=0, anchor_age_ms=0, anchor_clicks=0)
MINUTE_MS = 60_000


def record(version: int, *, good: bool = False, **fields: object) -> VersionRecord:
    made: dict[str, object] = dict(created_at_ms=version * MINUTE_MS, watermark_ms=version * MINUTE_MS, verdict=judged())
    made |= dict(good_at_ms=1) if good else {}
    return VersionRecord(version=version, **(made | fields))  # type: ignore[arg-type]


def state(*records: VersionRecord, champion: Champion | None = None) -> RegistryState:
    return RegistryState(versions={each.version: each for each in records}, champion=champion or Champion())


def kept(registry: RegistryState, now_ms: int = 10**12, **changed: object) -> dict[int, str]:
    return kept_versions(registry, now_ms, settings=LEAST.model_copy(update=changed))


def test_an_empty_registry_keeps_and_deletes_nothing() -> None:
    assert kept(state()) == {} and versions_to_delete(state(), 0, settings=LEAST) == []


def test_what_is_kept_and_what_goes_are_all_versions() -> None:
    registry = state(*map(record, range(1, 30)), champion=Champion(version=7))
    keeps = kept(registry)
    assert sorted([*keeps, *versions_to_delete(registry, 10**12, settings=LEAST)]) == list(range(1, 30))
    assert keeps == {7: "champion", 29: "the newest"}


CASES: dict[str, tuple[RegistryState, dict[str, object], dict[int, str]]] = {
    "the champion, the one before it, the newest": (
        state(*map(record, range(1, 10)), champion=Champion(version=5, previous=3)),
        {},
        {3: "the champion before this one", 5: "champion", 9: "the newest"},
    ),
    "the newest ones": (
        state(*map(record, range(1, 10))),
        {"keep_versions": 3},
        {7: "one of the newest 3", 8: "one of the newest 3", 9: "the newest"},
    ),
    "the young ones": (
        state(*map(record, range(1, 10))),
        {"keep_ms": 10**12 - 6 * MINUTE_MS},
        {7: "young", 8: "young", 9: "the newest"},
    ),
    "the newest of the champion's chain": (
        state(
            *(record(version, chain="deepfm/1/0", sequence=version) for version in range(1, 5)),
            *(record(version, chain="deepfm/2/0", sequence=version) for version in range(5, 8)),
            champion=Champion(version=2),
        ),
        {},
        {2: "champion", 4: "the newest of the champion's chain", 7: "the newest"},
    ),
    "good ones below the champion, without those that were rolled back over": (
        state(
            *(record(version, good=True, verdict=judged(line=2)) for version in range(1, 9)),
            record(9),
            champion=Champion(version=7, rolled_back=(VersionRange(3, 5),)),
        ),
        {"keep_good": 3},
        {
            2: "one of the newest 3 good ones, for rollbacks",
            3: "one of the newest 3 good ones, for rollbacks",
            6: "one of the newest 3 good ones, for rollbacks",
            7: "champion",
            9: "the newest",
        },
    ),
    "the anchor": (
        state(*map(record, range(1, 8)), record(8, verdict=judged(anchor=3))),
        {},
        {3: "the gate's anchor", 8: "the newest"},
    ),
    "what a kept one is based on, to the end": (
        state(*map(record, range(1, 5)), record(5, base=3), record(6), record(7, base=5)),
        {},
        {3: "another one is based on it", 5: "another one is based on it", 7: "the newest"},
    ),
}


@pytest.mark.parametrize(("registry", "settings", "expected"), CASES.values(), ids=CASES)
def test_each_reason(registry: RegistryState, settings: dict[str, object], expected: dict[int, str]) -> None:
    assert kept(registry, **settings) == expected


def test_what_is_kept_besides_keeps_what_it_is_based_on() -> None:
    registry = state(record(1), record(2, base=1), record(3), record(4))
    found = kept_versions(registry, 10**12, settings=LEAST, besides={2: "alias candidate", 77: "deleted long ago"})
    assert found == {1: "another one is based on it", 2: "alias candidate", 4: "the newest"}


def test_bases_that_go_in_a_circle_end() -> None:
    assert set(kept(state(record(1, base=2), record(2, base=1), record(3, base=2)))) == {1, 2, 3}


def test_former_champions_are_kept_at_a_distance_and_for_a_time() -> None:
    now_ms = 100 * MINUTE_MS
    records = [record(version, champion_at_ms=(version * MINUTE_MS,)) for version in range(1, 100)]
    registry = state(*records, champion=Champion(version=99, rolled_back=(VersionRange(69, 70),)))
    found = kept(registry, now_ms, keep_for_ms=60 * MINUTE_MS, keep_every_ms=10 * MINUTE_MS)
    spaced = [version for version, why in found.items() if why.startswith("a former champion")]
    assert spaced == [40, 50, 60, 71, 80, 90]  # 70 was rolled back over


def grow(
    minutes: int, interval_ms: int, settings: SnapshotSettings, check: Callable[[RegistryState, int], None], *, seed: int
) -> tuple[RegistryState, int]:
    """A trainer that writes a version each interval, promoted and tagged good later; some are deleted now and then."""
    chance = random.Random(seed)
    registry, clicks, anchor, most = RegistryState(), 0, None, 0
    for number in range(1, minutes * MINUTE_MS // interval_ms + 1):
        now_ms = number * interval_ms
        clicks += chance.randrange(0, 40 * interval_ms // 5_000)  # 2,000 take 8 minutes
        report = judged(line=1, clicks=clicks, anchor=anchor)
        anchor = choose_anchor(registry, report, watermark_ms=now_ms, settings=settings)
        new = VersionRecord(
            version=number,
            created_at_ms=now_ms,
            watermark_ms=now_ms,
            verdict=judged(line=1, clicks=clicks, anchor=anchor),
            champion_at_ms=(now_ms,),
        )
        registry.versions[number] = new
        registry.champion = Champion(version=number, previous=number - 1 or None, at_ms=now_ms)
        for version in decisions.due_good(registry, now_ms, settings):
            registry.versions[version] = replace(registry.versions[version], good_at_ms=now_ms)
        if chance.random() < 0.1:
            before = sorted(registry.versions)
            for version in versions_to_delete(registry, now_ms, settings=settings):
                del registry.versions[version]
            assert versions_to_delete(registry, now_ms, settings=settings) == [], before
            most = max(most, len(registry.versions))
        check(registry, now_ms)
    return registry, most


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("interval_ms", [5_000, 120_000])
def test_a_day_of_versions_stays_small_and_nobody_misses_one(interval_ms: int, seed: int) -> None:
    settings = SnapshotSettings()
    ages: list[int] = []

    def check(registry: RegistryState, now_ms: int) -> None:
        newest = registry.versions[registry.newest]
        if now_ms < 90 * MINUTE_MS:
            return
        # Rollbacks have three targets, one after another, and one for each of the last two hours' ten minutes.
        assert decisions.rollback_target(registry, now_ms=now_ms) in registry.versions
        for back_ms in (0, 20 * MINUTE_MS, 60 * MINUTE_MS):
            target = registry.champion_at(now_ms - back_ms)
            assert target is not None
            champion_at_ms = registry.versions[target].champion_at_ms[0]
            assert now_ms - back_ms - champion_at_ms <= settings.keep_every_ms + interval_ms
        # The gate has an anchor that it could have had without any deletion, or one not much older.
        assert newest.verdict is not None and newest.verdict.anchor in registry.versions
        ages.append(newest.watermark_ms - registry.versions[newest.verdict.anchor].watermark_ms)

    registry, most = grow(300, interval_ms, settings, check, seed=seed)
    assert most <= 60 and len(registry.versions) < registry.newest
    assert min(ages) >= settings.anchor_age_ms
    # An anchor is replaced by one that is newer by as much as it must be old.
    assert max(ages) <= 3 * settings.anchor_age_ms


def test_rollback_after_rollback_finds_its_target_after_deletions() -> None:
    log = a_log(60, good=tuple(range(1, 55)))
    for _ in range(3):
        for version in versions_to_delete(log.state, log.now_ms + 10**9, settings=SnapshotSettings(keep_good=1)):
            del log.state.versions[version]
        before = log.state.champion.version
        log.rollback()
        assert log.state.champion.version in log.state.versions and log.state.champion.version != before
    with pytest.raises(Refused, match="expected an announced version"):
        log.rollback(to=5)


def test_versions_that_are_withheld_do_not_push_the_anchor_out() -> None:
    log = a_log(30, good=tuple(range(1, 28)))
    for version in range(31, 60):
        log.announce(version, flow="withheld", anchor=12)
    for version in versions_to_delete(log.state, log.now_ms + 10**9, settings=LEAST):
        del log.state.versions[version]
    assert decisions.rollback_target(log.state, now_ms=log.now_ms) == 12


def test_the_oldest_move_is_no_reason_to_keep_a_version() -> None:
    moves = (Move(version=1, previous=None, who="me", at_ms=1, reason="", how="auto", operation="x"),)
    assert set(kept(state(*map(record, range(1, 5)), champion=Champion(version=3, moves=moves)))) == {3, 4}


def test_rests_in_the_store_go_once_a_newer_version_is_announced() -> None:
    registry = state(record(5), record(8))
    # 3 is whole and older than all that the registry knows, so a lost registry may have known it; 9 is being written.
    assert unannounced(registry, numbers=[2, 3, 5, 6, 7, 8, 9, 10], whole=[3, 5, 6, 8, 10]) == [2, 6, 7]
    assert unannounced(state(), numbers=[1, 2], whole=[1]) == []
