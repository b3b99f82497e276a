"""Where a trainer goes on from: the newest version that the registry knows and the store has whole, and its offsets.

A version is announced after it is whole in the store, so a trainer that is killed in between leaves a version that was never
announced. Such a version is not used: its number is skipped, and its examples are trained again from the version before.
Weights and offsets always come from one manifest, so each example counts exactly once either way.

When the trainer has been sent back (`state.rewinds`), versions of the line that it left are passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import ValidationError

from model.errors import SnapshotMismatch
from model.learner import Learner
from model.migration import moved_dense, moved_trainer
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.errors import SnapshotCorrupt, SnapshotError, SnapshotNotFound
from state.manifest import Manifest
from state.registry import RegistryState
from state.store import SnapshotStore
from stream.errors import PositionError
from stream.trainer.bookkeeping import bookkeeping_in
from stream.trainer.schemas import schema_change

__all__ = ["Start", "find_start", "first_positions", "go_on", "restore"]

log = logging.getLogger(__name__)

_ELSEWHERE = (
    "Put the old settings back, or begin a new model from the start of the log: `headrace run trainer --new-model`, once. The "
    "champion stays until the new model has been compared with it."
)
_MOVED = "After a move to another cluster, say where to begin by trainer.examples_from."


@dataclass(frozen=True, slots=True)
class Start:
    """What training goes on from.

    manifest     of the version to restore; None begins a new model at the start of the log
    newest       largest version number ever announced; new versions get larger numbers
    moved        the version was trained on another cluster's `examples`, and its offsets were chosen by hand
    bookkeeping  what the version holds besides the model (`stream.trainer.bookkeeping`)
    """

    manifest: Manifest | None
    newest: int
    bookkeeping: Mapping[str, torch.Tensor] = field(default_factory=dict)
    moved: bool = False

    @property
    def version(self) -> int | None:
        return None if self.manifest is None else self.manifest.version

    @property
    def examples_seen(self) -> int:
        return 0 if self.manifest is None else self.manifest.examples_seen

    @property
    def watermark_ms(self) -> int:
        """Event time of the newest impression trained.

        Older releases could save an event time after the version's creation; the time of creation then replaces it.
        """
        return 0 if self.manifest is None else min(self.manifest.watermark_ms, self.manifest.created_at_ms)

    @property
    def offsets(self) -> dict[int, int]:
        """Next offset to train, of the partitions that the version knows."""
        return {} if self.manifest is None else {int(name): offset for name, offset in self.manifest.offsets.items()}


def go_on(
    learner: Learner,
    registry: RegistryState,
    store: SnapshotStore,
    schema: FeatureSchema,
    model: ModelSettings,
    *,
    topic_ids: Mapping[str, str] | None = None,
    new_model: bool = False,
) -> Start:
    """Choose the version to go on from and load it into the learner. Raises as `find_start` and `restore` do."""
    broken: set[int] = set()
    while True:
        start = find_start(registry, store, schema, model, broken, topic_ids=topic_ids, new_model=new_model)
        try:
            bookkeeping = restore(learner, store, start)
        except SnapshotError as error:
            assert start.version is not None
            log.warning("passing over version %d: %s", start.version, error)
            broken.add(start.version)
        else:
            return replace(start, bookkeeping=bookkeeping)


def find_start(
    registry: RegistryState,
    store: SnapshotStore,
    schema: FeatureSchema,
    model: ModelSettings,
    broken: Collection[int] = (),
    *,
    topic_ids: Mapping[str, str] | None = None,
    new_model: bool = False,
) -> Start:
    """Choose the version to go on from. Reads manifests, and names and sizes of files; `restore` checks hashes.

    A version that is broken in the store, or in `broken`, is skipped for the one before, with a warning.

    Args:
        topic_ids: Kafka's ids of `examples` and `snapshots` as they are now.
        new_model: begin a new model, whatever there is.

    Raises:
        SnapshotMismatch: the newest usable version is of another model, or its schema can't become this one
            (`model.migration`).
        SnapshotError: the store can't be read, or it and the registry don't know of each other's versions.
        PositionError: `examples` was deleted and created again since the version was trained.
    """
    if new_model:
        log.warning("beginning a new model at the start of the log, as asked; leave --new-model out at the next start")
        return Start(None, registry.newest)
    announced = sorted(
        (each for each in registry.versions.values() if each.kind == "full" and not registry.rewinds.left(each.version)),
        key=lambda each: -each.version,
    )
    pending = registry.rewinds.pending
    if pending is not None:
        log.warning("going back to version %d, as %s asked: %s", pending.version, pending.who, pending.reason)
    problems: list[str] = []
    for record in announced:
        if record.version in broken:
            problems.append(f"version {record.version} is broken")
            continue
        try:
            manifest = store.manifest(record.version)
            # The same number in another store, or from before the topic was created again, is another version.
            if manifest.created_at_ms != record.created_at_ms or manifest.epoch != record.epoch:
                raise SnapshotNotFound(f"version {record.version} in {store.url} isn't the one announced")
            wrong = store.verify(record.version, hashes=False)
        except SnapshotError as error:
            wrong = [str(error)]
        if wrong:
            problems.append(wrong[0])
            log.warning("passing over version %d: %s", record.version, wrong[0])
            continue
        _require_fitting(manifest, schema, model)
        _require_same_log(manifest, topic_ids or {})
        return Start(manifest, registry.newest)
    if registry.rewinds.rewinds and registry.versions and not announced:
        raise SnapshotError(
            f"the registry: expected a version at or below {registry.rewinds.rewinds[-1].version}, to which the trainer was "
            f"sent back, found only {len(registry.versions)} of the line that was left. `headrace snapshot list` shows them. "
            "To go on from one of them, send the trainer there: `headrace snapshot rollback --to VERSION --rewind-trainer`."
        )
    there = store.versions()
    if announced:
        found = f"none that is whole ({problems[0]})" if there else "an empty store"
        raise SnapshotError(
            f"{store.url}: expected one of the {len(announced)} versions that the registry knows (newest "
            f"{announced[0].version}), found {found}. Is snapshots.url right? `headrace config show` prints it. A new "
            "model is begun by `headrace run trainer --new-model`, once."
        )
    if there:
        _require_left_over(store.manifest(there[-1]), registry, topic_ids or {}, f"{store.url} holds {len(there)} versions")
        log.warning("%s: none of its %d versions was announced; beginning a new model", store.url, len(there))
    return Start(None, registry.newest)


def _require_same_log(manifest: Manifest, topic_ids: Mapping[str, str]) -> None:
    """Raise PositionError if `examples` was created again since the version was trained.

    Only the id of the topic shows it: the new topic has the same name, and after a while offsets as large as the old one's.
    """
    trained, now = manifest.topic_ids.get("examples"), topic_ids.get("examples")
    if trained and now and trained != now:
        raise PositionError(
            f"examples: expected the topic with id {trained}, which version {manifest.version} was trained on, found id {now}. "
            f"The topic was created again, so the version's offsets mean nothing in it. {_MOVED} {_ELSEWHERE}"
        )


def _require_left_over(manifest: Manifest, registry: RegistryState, topic_ids: Mapping[str, str], there: str) -> None:
    """Raise SnapshotError if versions in the store that were never announced aren't from a trainer of this registry.

    A trainer that dies before its first announcement leaves such versions, so they are no error by themselves.
    """
    written, now = manifest.topic_ids.get("snapshots"), topic_ids.get("snapshots")
    ours = written == now if written and now else manifest.epoch <= registry.trainer.epoch
    if not ours:
        raise SnapshotError(
            f"{there}: expected a registry that knows one of them, found one that knows no version at all. The topic "
            f"`snapshots` was created again (id {now or 'unknown'}, version {manifest.version} was announced to "
            f"{written or 'an unknown one'}), or snapshots.url is another system's. To go on with the store's versions: "
            "`headrace snapshot reindex`. To begin a new model: `headrace run trainer --new-model`, once."
        )


def _require_fitting(manifest: Manifest, schema: FeatureSchema, model: ModelSettings) -> None:
    """Raise SnapshotMismatch if a model of these settings can't go on from the version."""
    try:
        found = ModelSettings.of_version(manifest.model).shape()
    except ValidationError as error:
        names = ", ".join(".".join(map(str, each["loc"])) for each in error.errors())
        raise SnapshotMismatch(
            f"version {manifest.version}: expected model settings of this release, found others: {names}. Start a "
            f"trainer of the release that wrote it. {_ELSEWHERE}"
        ) from error
    expected = model.shape()
    differences = [
        f"model.{name}: expected {_shown(expected.get(name))}, found {_shown(found.get(name))}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    try:
        schema_change(manifest, schema)
    except SnapshotMismatch as error:
        differences.append(str(error))
    if differences:
        raise SnapshotMismatch(
            f"version {manifest.version} can't be trained on with these settings:\n  "
            + "\n  ".join(differences)
            + f"\n{_ELSEWHERE}"
        )


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)


def restore(learner: Learner, store: SnapshotStore, start: Start) -> dict[str, torch.Tensor]:
    """Load weights and trainer state, with hashes checked; a new model needs nothing. Returns the saved bookkeeping.

    Where the learner's schema isn't the version's, it is explained in the log.

    Raises:
        SnapshotError: a file is missing or not what the manifest says.
        SnapshotMismatch: the weights don't fit.
    """
    if start.manifest is None:
        return {}
    version = start.manifest.version
    reader = store.read(version)
    small = reader.small()
    learner.begin_restore(reader.row_count, small)
    for piece in reader.trainer_rows():
        learner.restore_rows(piece.serving, piece.trainer)
    change = schema_change(start.manifest, learner.schema)
    learner.finish_restore(
        moved_dense(change, reader.dense(), learner.settings), moved_trainer(change, small, learner.settings)
    )
    if not change.is_none:
        log.warning("going on from version %d with other features.fields: %s", version, "; ".join(change.explained()))
    learner.negative_rate = start.manifest.negative_rate
    if learner.examples_seen != start.manifest.examples_seen:
        raise SnapshotCorrupt(
            f"version {version}: expected {start.manifest.examples_seen} examples in its weights, as its manifest says, found "
            f"{learner.examples_seen}."
        )
    return bookkeeping_in(small)


def first_positions(
    start: Start,
    topic: str,
    beginnings: Mapping[int, int],
    ends: Mapping[int, int],
    *,
    lost_examples: Literal["stop", "skip"],
) -> dict[int, int]:
    """The offset to begin at in each partition: the version's, or the start of the log.

    Args:
        beginnings, ends: first and next offset of every partition's log.
        lost_examples: what to do when retention has deleted examples that weren't trained.

    Raises:
        PositionError: the log isn't the one that the version was trained on, or has lost examples.
    """
    unknown = sorted(start.offsets.keys() - beginnings.keys())
    if unknown:
        raise PositionError(
            f"{topic}: expected partitions {unknown}, which version {start.version} was trained on, found {len(beginnings)} "
            f"partitions. The topic isn't the one it was trained on. {_ELSEWHERE}"
        )
    positions: dict[int, int] = {}
    for partition, beginning in beginnings.items():
        wanted = start.offsets.get(partition, beginning)
        if wanted > ends[partition]:
            raise PositionError(
                f"{topic} partition {partition}: expected offset {wanted}, up to which version {start.version} is trained, "
                f"found a log that ends at {ends[partition]}. The topic was created again, or lost records. {_ELSEWHERE}"
            )
        if wanted < beginning:
            lost = f"{topic} partition {partition}: expected offset {wanted}, found a log that begins at {beginning}: "
            lost += f"{beginning - wanted} offsets were deleted by retention before they were trained."
            if lost_examples == "stop":
                raise PositionError(
                    f"{lost} To go on without them set HEADRACE_TRAINER__LOST_EXAMPLES=skip; so that it doesn't happen again, "
                    "raise topics.retention_ms."
                )
            log.error("%s Going on without them, as trainer.lost_examples says", lost)
        positions[partition] = max(wanted, beginning)
    return positions
