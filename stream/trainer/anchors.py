"""The weights that the live ones are compared with, without a second table where they are from the same line.

An anchor has to be a version that has proven good and is old. So two moments of the model are kept (`model.moments`):
the present anchor, and one candidate, which takes its place in time. A second candidate would change nothing: the anchor is
replaced by a version that is as much newer as the anchor itself must be old, and the first such version is the candidate. A
candidate that doesn't become good gives way to the next version. So memory is bounded by the serving rows twice, for tables of
which every row is touched within ten minutes, and is mostly a small part of that.

After a restart, and after a rollback past the anchor, the anchor's version is read from the store piece by
piece: only rows that have changed since take memory. Versions of another line have other rows, and are loaded whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from model.anchor import EarlierModel
from model.errors import ModelError, SnapshotMismatch
from model.migration import moved_dense
from model.predictor import Predictor
from model.rows import Rows
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.errors import SnapshotError
from state.gate_report import GateReport
from state.registry import RegistryState, VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.trainer.anchor_rule import choose_anchor, clicks_of
from stream.trainer.captured import Position
from stream.trainer.judge import Anchor, Judge
from stream.trainer.schemas import comparable

__all__ = ["Anchors", "KeepsModels", "WhileTraining"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# How long after `good_after_ms` a version may still be tagged good. The trainer tags each second, and Kafka may be away.
GRACE_MS = 60_000


class KeepsModels(Protocol):
    """What anchors need of a `model.learner.Learner`."""

    def keep(self) -> EarlierModel: ...

    def model_of(self, rows: int, dense: Mapping[str, torch.Tensor], negative_rate: float) -> EarlierModel: ...


class WhileTraining(Protocol):
    """Does something in the training thread, between two batches."""

    async def __call__(self, work: Callable[[], T]) -> T: ...


async def _at_once(work: Callable[[], T]) -> T:
    """For the time before training begins."""
    return work()


@dataclass(slots=True)
class _Candidate:
    """A version that may become the anchor, as of its capture. `lost`: it won't."""

    model: EarlierModel
    created_at_ms: int
    watermark_ms: int
    clicks: int
    lost: bool = False


@dataclass(frozen=True, slots=True)
class _Since:
    """How far the line had come at the anchor."""

    watermark_ms: int
    clicks: int


class Anchors:
    """Keeps the judge's anchor, and what may become it.

        anchors.captured(position, verdict)                     # in the training thread, as a version is captured
        await anchors.follow(registry, watermark_ms, between)   # every few seconds, on the event loop

    When the champion is of another line and its weights can't score these features (another schema, another store), the scores
    that impressions were shown with are used instead of its own. If a field has `serve_as`, nothing is compared then: live
    scores know the values that were sent, and served ones don't.
    """

    def __init__(
        self,
        judge: Judge,
        store: SnapshotStore,
        settings: SnapshotSettings,
        schema: FeatureSchema,
        model: ModelSettings,
        learner: KeepsModels,
        device: str,
    ) -> None:
        self._judge, self._store, self._settings = judge, store, settings
        self._schema, self._model, self._learner, self._device = schema, model, learner, device
        self._broken: set[int] = set()
        self._candidate: _Candidate | None = None
        self._since: _Since | None = None  # of the present anchor, if it is of this line
        self._earlier: EarlierModel | None = None  # of the present anchor
        self._changed = False  # whether a candidate has become the anchor since the start

    @property
    def saved_rows(self) -> int:
        """Rows whose values are held because they changed since the anchor's moment or the candidate's."""
        candidate = self._candidate
        models = (self._earlier, None if candidate is None else candidate.model)
        return sum(model.saved for model in models if model is not None)

    def captured(self, position: Position, verdict: GateReport | None) -> None:
        """A version is captured now: make it the candidate if there is none, and it may become the anchor."""
        if verdict is None or verdict.flow != "flowing" or verdict.problems:
            return
        candidate = self._candidate
        if candidate is not None:
            if not candidate.lost and candidate.model.is_open and self._is_apart(candidate.watermark_ms, candidate.clicks):
                return
            candidate.model.close()
            self._candidate = None
        if self._is_apart(position.watermark_ms, verdict.clicks):
            self._candidate = _Candidate(self._learner.keep(), position.at_ms, position.watermark_ms, verdict.clicks)

    def _is_apart(self, watermark_ms: int, clicks: int) -> bool:
        """Whether a version is so much newer than the anchor that it may take its place."""
        if self._since is None:
            return True
        is_newer = watermark_ms - self._since.watermark_ms >= self._settings.anchor_age_ms
        return is_newer and clicks - self._since.clicks >= self._settings.anchor_clicks

    async def follow(self, registry: RegistryState, watermark_ms: int, between: WhileTraining = _at_once) -> None:
        """Change to the anchor that is due, and compare with it from now on.

        Args:
            between: does something between two batches. Not needed before training begins.
        """
        judge = self._judge
        judge.follow(registry.champion_line)
        report = judge.report()
        kept = self._find_candidate(registry, report.line)
        wanted = self._wanted(registry, report, watermark_ms, kept)
        current = judge.anchor
        if wanted is None:
            by_served = registry.champion_line not in (None, report.line, *report.passed) and not self._schema.constant
            if by_served and (current is None or current.predictor is not None):
                log.warning("gate: the champion can't score these features; the scores that were served are compared instead")
                await between(lambda: self._compare_with(Anchor(None, None), None, None))
            elif not by_served and current is not None:
                await between(lambda: self._compare_with(None, None, None))
            return
        if current is not None and current.version == wanted and (self._earlier is None or self._earlier.is_open):
            return
        record = registry.versions[wanted]
        try:
            if kept is not None and kept.version == wanted:
                await between(lambda: self._promote(wanted))
            elif record.line == report.line:
                await self._read(record, between)
            else:
                anchor = await asyncio.to_thread(self._load, wanted)
                await between(lambda: self._compare_with(anchor, None, None))
        except (SnapshotError, ModelError) as error:
            self._broken.add(wanted)
            log.warning("gate: version %d can't be compared with: %s", wanted, error)
            return
        log.info("gate: comparing with version %d from now on", wanted)

    def _wanted(self, registry: RegistryState, report: GateReport, watermark_ms: int, kept: VersionRecord | None) -> int | None:
        """The version that should be the anchor.

        The candidate comes first. Any other version may become the anchor when there is none, and once after a start, since
        a trainer that has just started has no candidate, and the right version is in the store.
        """
        choose = partial(
            choose_anchor, registry, report, watermark_ms=watermark_ms, settings=self._settings, broken=self._broken
        )
        among_kept = choose(kept=() if kept is None else (kept.version,))
        if among_kept is not None and (self._changed or (kept is not None and among_kept == kept.version)):
            return among_kept
        return choose()

    def _find_candidate(self, registry: RegistryState, line: int) -> VersionRecord | None:
        """The record of the candidate's version; None while it isn't announced. Notes a candidate that won't be an anchor."""
        candidate = self._candidate
        if candidate is None or candidate.lost:
            return None
        of_line = [each for each in registry.versions.values() if each.line == line]
        found = next((each for each in of_line if each.created_at_ms == candidate.created_at_ms), None)
        if found is None:
            candidate.lost = any(each.created_at_ms > candidate.created_at_ms for each in of_line)
            return None
        late_ms = self._settings.good_after_ms + GRACE_MS
        is_late = found.good_at_ms is None and _now_ms() - max(found.champion_at_ms, default=0) > late_ms
        candidate.lost = is_late or registry.champion.was_rolled_back(found.version)
        return None if candidate.lost else found

    def _promote(self, version: int) -> None:
        """The candidate becomes the anchor."""
        candidate = self._candidate
        assert candidate is not None
        self._candidate, self._changed = None, True
        since = _Since(candidate.watermark_ms, candidate.clicks)
        self._compare_with(Anchor(version, candidate.model), candidate.model, since)

    def close(self) -> None:
        """Compare with nothing any more, and free what is saved. Training must have stopped."""
        if self._candidate is not None:
            self._candidate.model.close()
            self._candidate = None
        self._compare_with(None, None, None)

    def _compare_with(self, anchor: Anchor | None, earlier: EarlierModel | None, since: _Since | None) -> None:
        before = self._earlier
        self._judge.compare_with(anchor)
        self._earlier, self._since = earlier, since
        if before is not None:
            before.close()

    async def _read(self, record: VersionRecord, between: WhileTraining) -> None:
        """Read a version of this line from the store, and compare with it. One that this model doesn't come from is loaded.

        Raises:
            SnapshotError: it isn't in the store, or is damaged.
            ModelError: it doesn't fit this model.
        """
        version = record.version
        reader = self._store.read(version)
        dense = await asyncio.to_thread(reader.dense)
        count = await asyncio.to_thread(lambda: reader.row_count)
        since = _Since(record.watermark_ms, clicks_of(record))
        earlier: EarlierModel | None = None
        if self._earlier is not None:  # an earlier model is read through later ones, so the present one has to go first
            await between(lambda: self._compare_with(None, None, None))
        candidate = self._candidate
        if candidate is not None and candidate.watermark_ms <= record.watermark_ms:
            candidate.lost = True
            await between(candidate.model.close)
        try:
            rate = reader.manifest.negative_rate
            dense = moved_dense(comparable(reader.manifest, self._schema), dense, self._model)
            earlier = made = await between(lambda: self._learner.model_of(count, dense, rate))
            pieces = reader.rows(exact=True)  # the live ones have all digits too, and only what differs takes memory
            while (rows := await asyncio.to_thread(_next, pieces)) is not None:
                await between(partial(made.restore, rows))
            await between(lambda: self._compare_with(Anchor(version, made), made, since))
        except SnapshotMismatch as error:
            log.info("gate: version %d has other rows than the live weights, so all of it is loaded: %s", version, error)
            anchor = await asyncio.to_thread(self._load, version)
            await between(lambda: self._compare_with(anchor, None, since))
        except BaseException:
            if earlier is not None:
                await between(earlier.close)
            raise

    def _load(self, version: int) -> Anchor:
        """All weights of a version in memory."""
        manifest = self._store.manifest(version)
        change = comparable(manifest, self._schema)
        model = ModelSettings.of_version(manifest.model)
        serving = moved_dense(change, self._store.serving(version), model)
        rate = manifest.negative_rate
        return Anchor(version, Predictor.of(self._schema, model, serving, device=self._device, negative_rate=rate))


def _next(pieces: Iterator[Rows]) -> Rows | None:
    return next(pieces, None)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
