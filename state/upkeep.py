"""Changes of the registry that keep it in step with the store: versions are deleted, and records are made again from manifests.

As in `state.decisions`, each function looks at the state and returns the records to write.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from state.alias_records import GC_KEY, Deletion, Doomed, tags_key
from state.changes import Cause, Change
from state.decisions import install
from state.manifest import Manifest
from state.registry import TRAINER_KEY, KeyedRecord, RegistryState, TrainerLease, VersionRange, VersionRecord, version_key
from state.rewinds import REWINDS_KEY, Rewinds, joined

__all__ = ["Choose", "Reindexed", "Retired", "needed", "reindex", "retire"]

Choose = Callable[[RegistryState], Iterable[int]]

# Versions deleted by one transaction. Each is 30 bytes in the record of the deletion, and their files are what a process that
# dies leaves for the next one. Each batch looks at all versions: 1 s with 100,000 of them, as a store of 0.1.0 may have.
BATCH = 1_000


@dataclass(frozen=True, slots=True)
class Retired:
    """The versions whose files are to be deleted now, and the operation that took their records away.

    left  versions that the policy lets go besides, which come with the next batch
    size  bytes of their files, as announced; 0 for a deletion that an earlier process began
    """

    versions: tuple[Doomed, ...]
    operation: str
    left: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Reindexed:
    """What a reindexing wrote.

    added     versions that had no record
    repaired  versions whose record lacked what the manifest says
    champion  the version that was made champion; None: the champion stays as it was
    """

    added: tuple[int, ...]
    repaired: tuple[int, ...]
    champion: int | None


def needed(state: RegistryState) -> dict[int, str]:
    """Versions that must not be deleted whatever the policy is, and why."""
    found: dict[int, str] = {}
    champion = state.champion
    withheld = state.withheld
    if withheld is not None and withheld.anchor is not None:
        found[withheld.anchor] = "rollbacks go to it while versions are withheld"
    for version, tags in state.tags.items():
        if tags.tags:
            found[version] = "tagged: " + ", ".join(tags.tags)
    for name, alias in sorted(state.aliases.items()):
        if alias.version is not None:
            found[alias.version] = f"alias {name}"
    if state.canary.runs:
        found[state.canary.version] = f"the candidate of a {state.canary.mode}"
    if champion.previous is not None:
        found[champion.previous] = "the champion before this one, to which an undo goes"
    if state.rewinds.rewinds:
        found[state.newest_to_start_from] = "the newest that a trainer may start from"
        if state.rewinds.pending is not None:
            found[state.rewinds.pending.version] = "the trainer is to go back to it"
    # Numbers never go back: a new version's number is above that of the newest announced.
    found[state.newest] = "the newest"
    if champion.version is not None:
        found[champion.version] = "champion"
    return {version: why for version, why in found.items() if version in state.versions}


def retire(
    state: RegistryState,
    choose: Choose,
    cause: Cause,
    *,
    rests: Collection[Doomed] = (),
    ended: str = "",
) -> Change[Retired]:
    """Take away the records of versions that the policy lets go, so that their files can be deleted. Oldest first, in batches.

    A deletion that hasn't ended comes first: it is the outcome, nothing is written, and its files are to be deleted (again).
    That does no harm where they are gone already.

    Args:
        choose: which versions may go. It is asked about the state as it is in this transaction; what is `needed` stays.
        rests: what the store has and the registry doesn't know: it goes too, unless it has been entered meanwhile.
        ended: the operation of a deletion whose files are gone.
    """
    pending = state.deletion
    if pending.versions and pending.operation != ended:
        return Change((), Retired(pending.versions, pending.operation))
    stay = needed(state)
    chosen = sorted(version for version in choose(state) if version in state.versions and version not in stay)
    unknown = sorted(rest for rest in rests if rest.version not in state.versions and rest.version < state.newest)
    now = tuple(_doomed(state.versions[version]) for version in chosen[:BATCH])
    now += tuple(unknown[: BATCH - len(now)])
    if not now and not pending.versions:
        return Change((), Retired((), ""))
    note = Deletion(versions=now, who=cause.who, at_ms=cause.now_ms, reason=cause.reason, operation=cause.operation)
    records = [KeyedRecord(GC_KEY, note)]
    size = 0
    for version in (doomed.version for doomed in now if doomed.version in state.versions):
        size += state.versions[version].size
        records.append(KeyedRecord(version_key(version), None))
        if version in state.tags:  # tags that were all removed; one that is there keeps the version
            records.append(KeyedRecord(tags_key(version), None))
    return Change(tuple(records), Retired(now, cause.operation, len(chosen) + len(unknown) - len(now), size))


def reindex(
    state: RegistryState, manifests: Mapping[int, Manifest], cause: Cause, *, champion: int | None = None
) -> Change[Reindexed]:
    """Enter versions that are whole in the store and that the registry doesn't know, and complete records of those it knows.

    Versions that are being deleted are left out. So are those above the registry's newest, unless it knows no version at all:
    their trainer is about to announce them. Whoever enters several batches therefore begins with the newest versions.

    A registry that is lost gets its rewinds back, and all that is left out of the log, from what manifests say of them.

    The trainer's epoch becomes the largest of the manifests' if it is smaller, so that the next trainer takes one that no
    version has.

    Args:
        champion: this version becomes champion if the registry knows no version. Auto-promotion is then held, since nobody
            knows whether it was held when the registry was lost.
    """
    lost = not state.versions and state.champion.version is None
    going = {doomed.version for doomed in state.deletion.versions}
    records: list[KeyedRecord] = []
    epoch = max((manifest.epoch for manifest in manifests.values()), default=0)
    if epoch > state.trainer.epoch:
        records.append(KeyedRecord(TRAINER_KEY, TrainerLease(epoch=epoch, who=cause.who, at_ms=cause.now_ms)))
    added: dict[int, VersionRecord] = {}
    repaired: dict[int, VersionRecord] = {}
    for version, manifest in sorted(manifests.items()):
        known = state.versions.get(version)
        if known is not None:
            if (completed := _completed(known, manifest)) != known:
                repaired[version] = completed
        elif version not in going and (lost or version < state.newest):
            added[version] = VersionRecord.of(manifest, now_ms=cause.now_ms, who=cause.who, gate="entered by a reindexing")
    records += [KeyedRecord(version_key(version), entry) for version, entry in (added | repaired).items()]
    rewinds = _rewinds(manifests.values()) if lost else Rewinds()
    if rewinds != Rewinds():
        records.append(KeyedRecord(REWINDS_KEY, rewinds))
    installed = champion if lost and champion in added else None
    if installed is not None:
        left = tuple(VersionRange(each.version, each.up_to) for each in rewinds.rewinds if each.up_to is not None)
        records += install(state, added[installed], cause, rolled_back=left)
    return Change(tuple(records), Reindexed(tuple(added), tuple(repaired), installed))


def _rewinds(manifests: Iterable[Manifest]) -> Rewinds:
    """The rewinds that the newest of these versions knew, with all that any of them says to be left out."""
    known = sorted(manifests, key=lambda each: (each.epoch, each.version))
    newest = next((each.rewinds for each in reversed(known) if each.rewinds is not None), Rewinds())
    said = [ranges for each in known for ranges in (each.skipped, () if each.rewinds is None else each.rewinds.skipped)]
    return replace(newest, skipped=joined(newest.skipped, *said))


def _doomed(record: VersionRecord) -> Doomed:
    return Doomed(record.version, record.epoch, record.created_at_ms)


def _completed(record: VersionRecord, manifest: Manifest) -> VersionRecord:
    """The record with its point of a chain, if the manifest of the same version says one and the record doesn't."""
    same = (record.epoch, record.created_at_ms) == (manifest.epoch, manifest.created_at_ms)
    if not same or record.chain or not manifest.chain:
        return record
    return replace(
        record,
        chain=manifest.chain,
        sequence=manifest.sequence,
        digest=manifest.digest,
        deltas_offset=manifest.deltas_offset,
    )
