"""Publishes what was learned from history: takes a trainer's epoch, writes the version to the store, and announces it.

The version is the first point of a chain, so the trainer that goes on from it sends deltas at once. It has no offsets: that
trainer reads `examples` from the log's beginning, and skips what history has (`stream.trainer.past`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch
from msgspec import structs

from deploy.errors import BootstrapError
from deploy.settings import Settings
from state.chain_name import ChainName
from state.errors import SnapshotError
from state.gate_report import GateReport
from state.history import History
from state.manifest import Manifest
from state.registry import RegistryState
from state.store import SnapshotStore
from state.tracks import MAIN
from stream.deltas.writer import DeltaWriter
from stream.errors import Fenced
from stream.kafka.cluster import describe_cluster
from stream.kafka.groups import group_members
from stream.registry.log import read_registry
from stream.registry.tracks import registered_track
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from stream.trainer.captured import CapturedVersion
from stream.trainer.chain import Chain
from stream.trainer.evaluation import Report, manifest_metrics
from stream.trainer.manifests import new_manifest, write_captured

__all__ = ["Published", "Publishing", "published_before"]


@dataclass(frozen=True, slots=True)
class Published:
    """A version that is announced.

    promoted  whether it became champion
    reason    why, or why not
    """

    version: int
    promoted: bool
    reason: str


class Publishing:
    """Says whether a version of history may be published, and publishes it.

        publishing = Publishing(settings, who="me@host", new_model=False)
        await publishing.require_ready(fingerprint)
        await publishing.publish(captured, report, history)

    Args:
        new_model: the registry may know versions already. The new one begins a line of its own beside the champion's.
    """

    def __init__(self, settings: Settings, *, who: str, new_model: bool = False) -> None:
        self._settings, self._who, self._new_model = settings, who, new_model
        self._names = TopicNames.of(settings.topics, settings.snapshots.track or MAIN)
        self._store = SnapshotStore(settings.snapshots)

    async def require_ready(self, fingerprint: str) -> Published | None:
        """The version of the same history that was published before; None if there is none.

        Raises:
            BootstrapError: a new model wasn't asked for, and a trainer runs or the registry knows versions.
            StreamError: Kafka can't be reached, or topics are missing.
            SnapshotError: the store can't be read.
        """
        await describe_cluster(self._settings.kafka, (self._names.examples, self._names.snapshots, self._names.deltas))
        state = await read_registry(self._settings.kafka, self._names)
        if (before := await asyncio.to_thread(published_before, state, self._store, fingerprint)) is not None:
            return before
        if state.versions and not self._new_model:
            raise BootstrapError(
                f"the registry: expected no version, found {len(state.versions)}, the newest {state.newest}. --new-model "
                "publishes the history as a new model, which is compared with the champion before it can take its place."
            )
        if not self._new_model:
            await self._require_no_trainer()
        return None

    async def publish(self, captured: CapturedVersion, report: Report, history: History) -> Published:
        """Write and announce the version. A trainer that runs is ended by the new epoch.

        Raises:
            BootstrapError: a trainer runs, or took over meanwhile.
            SnapshotError: the store can't be written.
            StreamError: Kafka can't be reached, or the registry rejects the version.
        """
        settings, names = self._settings, self._names
        if not captured.on_chain:
            raise BootstrapError(
                "the weights: expected finite ones of at most a million, found others; the log above names them. Nothing was "
                "published. Lower model.row_learning_rate or model.dense_learning_rate."
            )
        await self._require_no_trainer()
        cluster = await describe_cluster(settings.kafka, (names.examples, names.snapshots, names.deltas))
        registry = RegistryWriter(settings.kafka, names, who=self._who)
        deltas: DeltaWriter | None = None
        try:
            track = await registered_track(settings.kafka, names, self._who)
            epoch = await registry.take_trainer_epoch(above=track.first_number)
            deltas = DeltaWriter(settings.kafka, names, epoch=epoch)
            await deltas.open()
            chain = Chain(
                str(ChainName(names.chains or settings.model.name, epoch, 0)),
                deltas,
                None,
                lambda: torch.empty(0, dtype=torch.int64),
                row_precision=settings.snapshots.row_precision,
            )
            manifest = new_manifest(
                captured,
                version=max(registry.state.newest + 1, self._store.next_version()),
                parent=None,
                epoch=epoch,
                point=chain.begin(),
                metrics=manifest_metrics(report),
                topic_ids={
                    name: cluster.topic_ids[each]
                    for name, each in (("examples", names.examples), ("snapshots", names.snapshots))
                },
                history=history,
                row_precision=settings.snapshots.row_precision,
                schema=settings.features,
                model=settings.model,
            )
            manifest = _of_history(manifest, report, epoch)
            manifest = await asyncio.to_thread(write_captured, self._store, manifest, captured, settings.features)
            announced = await registry.announce(manifest, gate=settings.snapshots)
        except Fenced as error:
            raise BootstrapError(
                f"{error} Stop all trainers until this command has ended, and run it again: it goes on from its checkpoint."
            ) from error
        finally:
            if deltas is not None:
                await deltas.close()
            await registry.close()
        return Published(announced.version, announced.promoted, announced.reason)

    async def _require_no_trainer(self) -> None:
        group = f"{self._names.prefix}{self._settings.trainer.group}{self._names.suffix}-leader"
        members = await group_members(self._settings.kafka, group)
        if members:
            raise BootstrapError(
                f"trainers: expected none while history is published, found {len(members)} "
                f"({', '.join(sorted(set(members)))}). Stop them. Started once this command has ended, they go on from its "
                "version."
            )


def published_before(state: RegistryState, store: SnapshotStore, fingerprint: str) -> Published | None:
    """The version of this history that is in the registry; None if there is none.

    Raises:
        SnapshotError: the newest version can't be read from the store.
    """
    for record in sorted(state.versions.values(), key=lambda each: -each.version):
        try:
            manifest = store.announced(record)
        except SnapshotError:
            if record.version == state.newest:
                raise
            continue
        if manifest.history is None or manifest.history.fingerprint != fingerprint:
            return None
        if not manifest.offsets:
            return Published(record.version, bool(record.champion_at_ms), record.gate)
    return None


def _of_history(manifest: Manifest, report: Report, epoch: int) -> Manifest:
    """The manifest without offsets, and with a report of the gate: a new line that nothing was compared with."""
    seen = report["progressive", "total"]
    verdict = GateReport(
        line=epoch,
        reason="learned from history",
        since_ms=manifest.created_at_ms,
        clicks=seen.positives,
        negatives=seen.examples - seen.positives,
    )
    return structs.replace(manifest, offsets={}, verdict=verdict)
