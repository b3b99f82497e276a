"""Which versions are kept, why, and which may be deleted. Pure: it looks at the registry, not at the store.

Every few seconds or minutes a version is written, and few of them are ever read again. Kept are

| versions | for |
| --- | --- |
| the champion, and the one before it | scorers, and an undo |
| the newest, and the newest of the champion's chain | the trainer's restart, the numbers of new versions, scorers that start |
| the newest `keep_versions`, and all that are younger than `keep_ms` | what somebody looks at, loads or promotes just now |
| the newest `keep_good` good ones below the champion | rollbacks, one after another |
| one champion for each `keep_every_ms` of the last `keep_for_ms` | rollbacks to a time |
| the gate's anchor, and good ones that become the anchor in time | the gate |
| those that a kept one is based on | reading that one |

Aliases and tags keep versions too; the caller adds them (`state.upkeep`). Whoever asks again at the same time, once the others
are deleted, is told that no more may be deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from state.registry import RegistryState, VersionRecord
from state.settings import SnapshotSettings

__all__ = ["kept_versions", "unannounced", "versions_to_delete"]


def versions_to_delete(
    state: RegistryState, now_ms: int, *, settings: SnapshotSettings, besides: Mapping[int, str] | None = None
) -> list[int]:
    """Versions that may be deleted, ascending. `besides` is that of `kept_versions`."""
    return sorted(state.versions.keys() - kept_versions(state, now_ms, settings=settings, besides=besides).keys())


def kept_versions(
    state: RegistryState, now_ms: int, *, settings: SnapshotSettings, besides: Mapping[int, str] | None = None
) -> dict[int, str]:
    """Versions that are kept, with the first reason for each, ascending.

    Args:
        now_ms: time in ms since epoch. A clock that is wrong keeps too many or too few of the young and of the spaced versions,
            and never touches the others.
        besides: versions that are kept anyway, with the reason; what they are based on is kept too.
    """
    records = [state.versions[version] for version in sorted(state.versions)]
    if not records:
        return {}
    reasons: dict[int, str] = dict(besides or {})

    def keep(chosen: Iterable[VersionRecord | int | None], why: str) -> None:
        for each in chosen:
            version = each.version if isinstance(each, VersionRecord) else each
            if version is not None:
                reasons.setdefault(version, why)

    champion = state.champion
    keep([champion.version], "champion")
    keep([champion.previous], "the champion before this one")
    keep(records[-1:], "the newest")
    keep(_newest_of_chain(records, state.champion_record), "the newest of the champion's chain")
    anchors = [records[-1].verdict, state.withheld]
    keep((report.anchor for report in anchors if report is not None), "the gate's anchor")
    keep(records[-settings.keep_versions :], f"one of the newest {settings.keep_versions}")
    # By the registry's time of its announcement: its creation is by the clock of the trainer's machine.
    keep((each for each in records if now_ms - (each.announced_at_ms or each.created_at_ms) < settings.keep_ms), "young")
    good = [each for each in records if each.good_at_ms is not None and not champion.was_rolled_back(each.version)]
    below = [each for each in good if champion.version is None or each.version < champion.version]
    keep(below[-settings.keep_good :], f"one of the newest {settings.keep_good} good ones, for rollbacks")
    keep(_anchors_to_come(good, records[-1], settings), "an anchor of the gate in time to come")
    keep(_former_champions(state, records, now_ms, settings), "a former champion, for rollbacks to a time")
    for version in list(reasons):
        keep(_bases(state, version), "another one is based on it")
    return {version: reasons[version] for version in sorted(reasons) if version in state.versions}


def unannounced(state: RegistryState, numbers: Iterable[int], whole: Collection[int]) -> list[int]:
    """Numbers in the store that no version has and that may be deleted: what writers left that were killed or not announced.

    A folder without a manifest may go once a newer version is announced, since a trainer writes one version at a time. A whole
    version that was never announced may go if an older version and a newer one are announced: otherwise it could be one that a
    lost registry knew.

    Args:
        numbers: of all versions that the store has anything of (`SnapshotStore.numbers`).
        whole: those that have a manifest (`SnapshotStore.versions`). List them before `numbers`: a version that gets its
            manifest in between isn't taken for a rest.
    """
    oldest = min(state.versions, default=0)
    return sorted(
        number
        for number in set(numbers)
        if number < state.newest and number not in state.versions and (number not in whole or number > oldest)
    )


def _newest_of_chain(records: list[VersionRecord], champion: VersionRecord | None) -> list[VersionRecord]:
    if champion is None or not champion.chain:
        return []
    return [each for each in records if each.chain == champion.chain][-1:]


def _former_champions(
    state: RegistryState, records: list[VersionRecord], now_ms: int, settings: SnapshotSettings
) -> list[VersionRecord]:
    """The first version that became champion in each stretch of `keep_every_ms` since the epoch, if it isn't too long ago.

    The stretches are fixed, so whether a version is the first doesn't depend on what was deleted before.
    """
    first: dict[int, VersionRecord] = {}
    for each in records:
        if each.champion_at_ms and not state.champion.was_rolled_back(each.version):
            at_ms = each.champion_at_ms[-1]
            if now_ms - at_ms <= settings.keep_for_ms:
                stretch = at_ms // settings.keep_every_ms
                if stretch not in first or at_ms < first[stretch].champion_at_ms[-1]:
                    first[stretch] = each
    return list(first.values())


def _anchors_to_come(good: list[VersionRecord], newest: VersionRecord, settings: SnapshotSettings) -> list[VersionRecord]:
    """Good versions of the line being trained: the newest that is old enough to be the anchor, and newer ones at a distance.

    The anchor must be `anchor_age_ms` and `anchor_clicks` older than what is trained (`stream.trainer.judge`). The distance is
    half of each. So there is always an anchor, and it is hardly older than without deletions.
    """

    def apart(one: VersionRecord, two: VersionRecord, parts: int) -> bool:
        time_ms, clicks = two.watermark_ms - one.watermark_ms, _clicks(two) - _clicks(one)
        return time_ms * parts >= settings.anchor_age_ms and clicks * parts >= settings.anchor_clicks

    line = [each for each in good if each.line == newest.line]
    old = [index for index, each in enumerate(line) if apart(each, newest, 1)]
    chosen: list[VersionRecord] = []
    for each in line[old[-1] if old else 0 :]:
        if not chosen or apart(chosen[-1], each, 2):
            chosen.append(each)
    return chosen


def _bases(state: RegistryState, version: int) -> Iterator[int]:
    seen = {version}
    while (record := state.versions.get(version)) is not None and record.base is not None and record.base not in seen:
        version = record.base
        seen.add(version)
        yield version


def _clicks(record: VersionRecord) -> int:
    return 0 if record.verdict is None else record.verdict.clicks
