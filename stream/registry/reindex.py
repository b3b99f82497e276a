"""Makes the registry's records again from the manifests in the store, after the topic `snapshots` was lost.

What can be made again: every version that is whole in the store, with its metrics, its point of a chain and its gate's report,
the trainer's epoch, and how the trainer was sent back and what it leaves out, also where it hasn't come to yet. What is lost
with the topic: who moved the champion when and why, `good`, aliases, tags, whether auto-promotion was held. What was asked for
after the newest version was written is lost, too. The champion becomes the version that live scorers answer with, and
auto-promotion is held.

Versions are entered in batches, newest first, and the first batch has the champion. A run that dies is run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from state.errors import SnapshotCorrupt, SnapshotNotFound
from state.manifest import Manifest
from state.registry import RegistryState
from stream.errors import RegistryError
from stream.records.heartbeat import Heartbeat
from stream.registry.collect import VersionStore, require_same_store
from stream.registry.writer import RegistryWriter

__all__ = ["NO_CHAMPION", "Reindexing", "plan_reindexing", "reindex"]

# Versions entered by one transaction: 2 kB each.
BATCH = 100
# Manifests read at once: a bucket answers each request after tens of milliseconds, and a store may hold thousands of versions.
READERS = 16

NO_CHAMPION = 0
"""In place of the champion's version: enter the versions, and make none of them champion."""


@dataclass(frozen=True, slots=True)
class Reindexing:
    """What a reindexing would do, or has done.

    lost      the registry knew no version at all
    added     versions that it had no record of
    repaired  versions whose record lacked what the manifest says
    broken    versions in the store whose manifest can't be read, and the error
    champion  the version made champion; None: there was a champion, or none was wanted
    """

    lost: bool
    added: tuple[int, ...]
    repaired: tuple[int, ...]
    broken: dict[int, str]
    champion: int | None


@dataclass(frozen=True, slots=True)
class _Found:
    manifests: dict[int, Manifest]
    broken: dict[int, str]


def plan_reindexing(
    state: RegistryState, store: VersionStore, live: Sequence[Heartbeat], champion: int | None
) -> tuple[Reindexing, dict[int, Manifest]]:
    """What a reindexing would do, and the manifests to do it with. Reads the store, writes nothing, blocks.

    Args:
        champion: the version to make champion if the registry is lost; None: the one that all live scorers answer with;
            NO_CHAMPION: none.

    Raises:
        RegistryError: the store isn't the registry's, or has no version; or which version is to be champion isn't known.
        SnapshotError: the store can't be read.
    """
    there = store.versions()
    if not there:
        raise RegistryError(f"{store.url}: expected versions to enter, found none. Is snapshots.url right?")
    lost = not state.versions and state.champion.version is None
    if not lost:
        require_same_store(state, store, "Nothing was entered.")
        if champion is not None:
            raise RegistryError(
                "--champion: expected a registry that knows no version, found one that does. "
                "Move its champion with `headrace snapshot promote`."
            )
    going = {doomed.version for doomed in state.deletion.versions}
    unknown = [
        version
        for version in there
        if version not in going
        and (not state.versions[version].chain if version in state.versions else lost or version < state.newest)
    ]
    found = _manifests(store, unknown)
    chosen = _champion(found, live, champion, store.url) if lost else None
    added = tuple(version for version in sorted(found.manifests) if version not in state.versions)
    repaired = tuple(
        version
        for version, manifest in sorted(found.manifests.items())
        if version in state.versions
        and manifest.chain
        and (manifest.epoch, manifest.created_at_ms) == (state.versions[version].epoch, state.versions[version].created_at_ms)
    )
    return Reindexing(lost, added, repaired, found.broken, chosen), found.manifests


async def reindex(writer: RegistryWriter, plan: Reindexing, manifests: dict[int, Manifest], reason: str) -> Reindexing:
    """Write what was planned. Each batch is decided on the newest state, and never changes what has come in meanwhile."""
    waiting = sorted((*plan.added, *plan.repaired), reverse=True)
    if plan.champion is not None:
        waiting = [plan.champion, *(version for version in waiting if version != plan.champion)]
    if not plan.lost and not waiting:
        return plan
    added: list[int] = []
    repaired: list[int] = []
    champion = None
    for start in range(0, len(waiting), BATCH):
        batch = {version: manifests[version] for version in waiting[start : start + BATCH]}
        done = (await writer.reindex(batch, reason, champion=plan.champion if start == 0 else None)).outcome
        added += done.added
        repaired += done.repaired
        champion = done.champion if done.champion is not None else champion
    return Reindexing(plan.lost, tuple(sorted(added)), tuple(sorted(repaired)), plan.broken, champion)


def _manifests(store: VersionStore, versions: Iterable[int]) -> _Found:
    found = _Found({}, {})

    def read(version: int) -> None:
        try:
            found.manifests[version] = store.manifest(version)
        except (SnapshotNotFound, SnapshotCorrupt) as error:
            found.broken[version] = str(error)

    with ThreadPoolExecutor(READERS, thread_name_prefix="manifests") as pool:
        for _ in pool.map(read, versions):
            pass
    return found


def _champion(found: _Found, live: Sequence[Heartbeat], wanted: int | None, url: str) -> int | None:
    """The version to make champion in a registry that is lost."""
    if wanted == NO_CHAMPION:
        return None
    if wanted is not None:
        if wanted not in found.manifests:
            raise RegistryError(f"--champion {wanted}: expected a whole version in {url}, found none of that number.")
        return wanted
    served = sorted({beat.version for beat in live if beat.version >= 0})
    known = [version for version in served if version in found.manifests]
    if len(served) == 1 and known:
        return known[0]
    newest = max(found.manifests, default=None)
    says = (
        f"scorers that answer with different versions ({', '.join(map(str, served))})"
        if len(served) > 1
        else f"that they answer with version {served[0]}, which isn't in {url}"
        if served
        else "no live scorer with a version"
    )
    raise RegistryError(
        f"reindex: expected live scorers that answer with one version, to make it champion, found {says}. Name the champion: "
        f"`--champion N` (the newest in the store is {newest}), or `--champion 0` for none."
    )
