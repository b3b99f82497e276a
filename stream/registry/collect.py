"""Deletes versions that nothing needs any more: by hand (`headrace snapshot gc`) and by itself, in the trainer.

A version has a record in the registry and files in the store, and no transaction spans both. So each batch of versions goes in
three steps:

1. One transaction takes the versions' records away and notes the versions in `alias/gc`. It is decided on the newest state, so
   a version that became champion or got an alias or a tag in the last moment stays. From then on every decision that names one
   of the versions is refused, in older releases too, which find no record.
2. The files are deleted, the manifest first.
3. The next transaction clears the note.

A process that dies, or loses the store, between 1 and 3 leaves the note. Whoever deletes next begins with what it names. Two
that delete at once may delete the same files, which does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from state.alias_records import Doomed
from state.errors import SnapshotCorrupt, SnapshotError, SnapshotNotFound
from state.manifest import Manifest
from state.registry import RegistryState
from state.upkeep import needed
from stream.errors import RegistryError
from stream.records.heartbeat import Heartbeat
from stream.registry.writer import RegistryWriter

__all__ = [
    "Collected",
    "CollectionPlan",
    "Policy",
    "VersionStore",
    "collect",
    "plan_collection",
    "require_same_store",
]

logger = logging.getLogger(__name__)

# Announced versions that are compared with the store, newest first, before anything is deleted or entered. One that is there
# shows that the store is the registry's; when none of the newest few is there, the address is wrong or the store is lost.
COMPARED = 5

Policy = Callable[[RegistryState, int], Iterable[int]]
"""Which versions may go, given the registry and the time (ms since epoch): `state.retention`."""


class VersionStore(Protocol):
    """What deleting and reindexing need of the store (`state.store.SnapshotStore`)."""

    @property
    def url(self) -> str: ...

    def versions(self) -> list[int]: ...

    def manifest(self, version: int) -> Manifest: ...

    def delete(self, version: int) -> None: ...


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """What a deletion would do to the registry and the store as they are now.

    versions  that would be deleted
    size      bytes of their files, as announced
    kept      versions that stay although the policy lets them go, and why
    pending   versions whose records are gone and whose files an earlier deletion has left
    """

    versions: tuple[int, ...]
    size: int
    kept: dict[int, str]
    pending: tuple[int, ...]


@dataclass(slots=True)
class Collected:
    """What a deletion has done.

    versions  that were deleted, with those that an earlier deletion had left
    size      bytes of their files, as announced; without those that an earlier deletion had left
    foreign   versions whose files in the store are of another version of the same number; they were left alone
    """

    versions: list[int] = field(default_factory=list)
    size: int = 0
    foreign: list[int] = field(default_factory=list)


def _served_by(live: Iterable[Heartbeat]) -> dict[int, str]:
    """The versions that live scorers answer with or try to read, and which scorer it is."""
    found: dict[int, str] = {}
    for beat in live:
        if beat.fallback_of is not None:
            found[beat.fallback_of] = f"scorer {beat.worker} tries to read it"
        if beat.version >= 0:
            found[beat.version] = f"scorer {beat.worker} answers with it"
    return found


def plan_collection(state: RegistryState, live: Iterable[Heartbeat], policy: Policy) -> CollectionPlan:
    """What a deletion would do. Pure."""
    wanted = {version for version in policy(state, _now_ms()) if version in state.versions}
    stay = _served_by(live) | needed(state)
    versions = tuple(sorted(wanted - stay.keys()))
    size = sum(state.versions[version].size for version in versions)
    kept = {version: stay[version] for version in sorted(wanted & stay.keys())}
    return CollectionPlan(versions, size, kept, tuple(doomed.version for doomed in state.deletion.versions))


async def collect(
    writer: RegistryWriter,
    store: VersionStore,
    policy: Policy,
    state: RegistryState,
    live: Iterable[Heartbeat],
    *,
    reason: str,
) -> Collected:
    """Delete the versions that the policy lets go, but for those that something needs or that a live scorer reports.

    Args:
        state: the registry as it was read just now, to compare it with the store. What goes is decided on the newest state.
        live: the last heartbeat of each live scorer.
        reason: why; it stays in the registry.

    Raises:
        RegistryError: the store isn't the registry's; nothing was deleted.
        SnapshotError: the store failed. The error says what was deleted until then; the rest goes with the next deletion.
        Fenced, NoAnswer: as every change of the registry.
    """
    if not state.versions and not state.deletion.versions:
        return Collected()
    await asyncio.to_thread(require_same_store, state, store, "Nothing was deleted.")
    keep = _served_by(live)
    done = Collected()
    ended = ""
    while True:
        written = await writer.retire(lambda state: policy(state, _now_ms()), reason, keep=keep, ended=ended)
        batch = written.outcome
        if not batch.versions:
            return done
        logger.info("registry: deleting %d versions, %d more to come: %s", len(batch.versions), batch.left, reason)
        await asyncio.to_thread(_delete, store, batch.versions, done)
        done.size += batch.size
        ended = batch.operation


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


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
