"""Deletes versions that nothing needs any more: by hand (`headrace snapshot gc`) and by itself, in the trainer.

A version has a record in the registry and files in the store, and no transaction spans both. So each batch of versions goes in
three steps:

1. One transaction takes the versions' records away and notes the versions in `alias/gc`. It is decided on the newest state, so
   a version that became champion or got an alias or a tag in the last moment stays. From then on every decision that names one
   of the versions is refused, in older releases too, which find no record.
2. The files are deleted, the manifest first.
3. The next transaction clears the note.

What writers have left that were killed, or that was never announced, goes the same way.

A process that dies, or loses the store, between 1 and 3 leaves the note. Whoever deletes next begins with what it names. Two
that delete at once may delete the same files, which does no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from state.alias_records import Doomed
from state.errors import SnapshotCorrupt, SnapshotError, SnapshotNotFound
from state.manifest import Manifest
from state.registry import RegistryState
from state.retention import kept_versions, unannounced, versions_to_delete
from state.settings import SnapshotSettings
from state.upkeep import needed
from stream.errors import RegistryError
from stream.records.heartbeat import Heartbeat
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.log import read_registry
from stream.registry.writer import RegistryWriter
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = [
    "Collected",
    "CollectionPlan",
    "VersionStore",
    "collect",
    "collect_by_itself",
    "plan_collection",
    "require_same_store",
]

logger = logging.getLogger(__name__)

# Announced versions that are compared with the store, newest first, before anything is deleted or entered. One that is there
# shows that the store is the registry's; when none of the newest few is there, the address is wrong or the store is lost.
COMPARED = 5


class VersionStore(Protocol):
    """What deleting and reindexing need of the store (`state.store.SnapshotStore`)."""

    @property
    def url(self) -> str: ...

    def versions(self) -> list[int]: ...

    def numbers(self) -> list[int]: ...

    def manifest(self, version: int) -> Manifest: ...

    def delete(self, version: int) -> None: ...


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """What a deletion would do to the registry and the store as they are now.

    versions  that would be deleted
    size      bytes of their files, as announced
    kept      versions that stay, and why
    pending   versions whose records are gone and whose files an earlier deletion has left
    rests     numbers that the store has something of and that were never announced
    """

    versions: tuple[int, ...]
    size: int
    kept: dict[int, str]
    pending: tuple[int, ...]
    rests: tuple[int, ...]


@dataclass(slots=True)
class Collected:
    """What a deletion has done.

    versions  that were deleted, with those that an earlier deletion had left and those that were never announced
    size      bytes of the announced ones' files; without those that an earlier deletion had left
    foreign   versions whose files in the store are of another version of the same number; they were left alone
    """

    versions: list[int] = field(default_factory=list)
    size: int = 0
    foreign: list[int] = field(default_factory=list)


def plan_collection(
    state: RegistryState, store: VersionStore, live: Iterable[Heartbeat], settings: SnapshotSettings, now_ms: int
) -> CollectionPlan:
    """What a deletion would do. Reads the store, writes nothing, blocks.

    Args:
        now_ms: by Kafka's clock.

    Raises:
        RegistryError: the store isn't the registry's.
        SnapshotError: the store can't be read.
    """
    if state.versions:
        require_same_store(state, store, "Nothing would be deleted.")
    kept = kept_versions(state, now_ms, settings=settings, besides={**_served_by(live), **needed(state)})
    versions = tuple(sorted(state.versions.keys() - kept.keys()))
    size = sum(state.versions[version].size for version in versions)
    pending = tuple(doomed.version for doomed in state.deletion.versions)
    rests = tuple(doomed.version for doomed in _rests(state, store) if doomed.version not in pending)
    return CollectionPlan(versions, size, kept, pending, rests)


async def collect(
    writer: RegistryWriter,
    store: VersionStore,
    settings: SnapshotSettings,
    state: RegistryState,
    live: Iterable[Heartbeat],
    *,
    reason: str,
    batches: int | None = None,
) -> Collected:
    """Delete the versions that `state.retention` lets go, but for those with an alias or a tag or that a live scorer reports.

    Args:
        state: the registry as it was read just now, to compare it with the store. What goes is decided on the newest state.
        live: the last heartbeat of each live scorer.
        reason: why; it stays in the registry.
        batches: stop after so many; None: when nothing is left to delete.

    Raises:
        RegistryError: the store isn't the registry's; nothing was deleted.
        SnapshotError: the store failed. The error says what was deleted until then; the rest goes with the next deletion.
        Fenced, NoAnswer: as every change of the registry.
    """
    if not state.versions:
        return Collected()
    await asyncio.to_thread(require_same_store, state, store, "Nothing was deleted.")
    rests = await asyncio.to_thread(_rests, state, store)
    served = _served_by(live)
    now_ms = await writer.kafka_ms()
    done = Collected()
    ended = ""
    begun = 0

    def choose(state: RegistryState) -> Iterable[int]:
        if batches is not None and begun >= batches:
            return ()
        return versions_to_delete(state, now_ms, settings=settings, besides={**served, **needed(state)})

    while True:
        written = await writer.retire(choose, reason, rests=rests, ended=ended)
        batch = written.outcome
        if not batch.versions:
            return done
        begun += 1
        logger.info("registry: deleting %d versions, %d more to come: %s", len(batch.versions), batch.left, reason)
        await asyncio.to_thread(_delete, store, batch.versions, done)
        done.size += batch.size
        ended = batch.operation
        deleted = {doomed.version for doomed in batch.versions}
        rests = [rest for rest in rests if rest.version not in deleted]
        if batches is not None and begun >= batches:
            rests = []


async def collect_by_itself(
    kafka: KafkaSettings, names: TopicNames, writer: RegistryWriter, store: VersionStore, settings: SnapshotSettings
) -> Collected:
    """Delete versions as the trainer does it from time to time, with its own writer: one batch. Raises as `collect` does.

    Files are deleted in a thread. With some 100,000 versions, which a store of an older release may have, the event loop stands
    still for a second.
    """
    async with HeartbeatReader(kafka, names) as scorers:
        live = await scorers.live()
    state = await read_registry(kafka, names)
    return await collect(writer, store, settings, state, live, reason="by itself", batches=1)


def require_same_store(state: RegistryState, store: VersionStore, otherwise: str) -> None:
    """Raise RegistryError unless the store holds one of the newest announced versions, as it was announced.

    Args:
        otherwise: what the error says was not done.
    """
    newest = sorted(state.versions, reverse=True)[:COMPARED]
    for version in newest:
        try:
            if _is_announced(store.manifest(version), _doomed(state, version)):
                return
        except (SnapshotNotFound, SnapshotCorrupt):
            continue
    raise RegistryError(
        f"{store.url}: expected one of the newest versions that the registry knows ({', '.join(map(str, newest))}), found none "
        f"of them. Is snapshots.url right? `headrace config show` prints it. {otherwise}"
    )


def _served_by(live: Iterable[Heartbeat]) -> dict[int, str]:
    """The versions that live scorers answer with or try to read, and which scorer it is."""
    found: dict[int, str] = {}
    for beat in live:
        if beat.fallback_of is not None:
            found[beat.fallback_of] = f"scorer {beat.worker} tries to read it"
        if beat.version >= 0:
            found[beat.version] = f"scorer {beat.worker} answers with it"
    return found


def _rests(state: RegistryState, store: VersionStore) -> list[Doomed]:
    """What the store has and nobody can move to: what writers left that were killed, or that weren't announced."""
    whole = set(store.versions())  # before the numbers: a version that gets its manifest in between is no rest
    found = []
    for version in unannounced(state, store.numbers(), whole):
        try:
            manifest = store.manifest(version)
        except (SnapshotNotFound, SnapshotCorrupt):
            found.append(Doomed(version, 0, 0))
        else:
            found.append(Doomed(version, manifest.epoch, manifest.created_at_ms))
    return found


def _delete(store: VersionStore, doomed: Iterable[Doomed], done: Collected) -> None:
    for each in doomed:
        try:
            try:
                ours = _is_announced(store.manifest(each.version), each)
            except (SnapshotNotFound, SnapshotCorrupt):
                ours = True  # its manifest is gone already, or damaged
            if not ours:
                logger.warning("%s: version %d isn't the one that was announced; left alone", store.url, each.version)
                done.foreign.append(each.version)
                continue
            store.delete(each.version)
        except SnapshotError as error:
            raise type(error)(
                f"{error} {len(done.versions)} versions were deleted. Version {each.version} and others of its batch have left "
                "the registry; the next `headrace snapshot gc`, or the trainer, deletes their files."
            ) from error
        done.versions.append(each.version)


def _doomed(state: RegistryState, version: int) -> Doomed:
    record = state.versions[version]
    return Doomed(version, record.epoch, record.created_at_ms)


def _is_announced(manifest: Manifest, announced: Doomed) -> bool:
    """Whether the store's version of this number is the one that was announced."""
    return (manifest.epoch, manifest.created_at_ms) == (announced.epoch, announced.created_at_ms)
