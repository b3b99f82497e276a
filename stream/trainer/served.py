"""Watches the scores that impressions were shown with, and rolls back by itself where it is allowed to.

    training ── served scores, labels ──▶ blocks of clicks ──▶ state.served_band ──▶ alarm ──▶ log, metric, a rollback

A rollback holds auto-promotion. While it is held, nothing is rolled back by itself, so there is one such rollback until
somebody resumes. Whatever an operator decides about the champion, the blocks from before that don't count any more, also after
a restart that goes on from a version of before.

Scores of versions that were rolled back come for as long as labels take, and again when the trainer was sent back. They say
nothing of what answers now, so they don't count, and neither do those of a canary's candidate, which is judged by itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.metrics import measure
from state.decisions import rollback_target
from state.errors import Refused, SnapshotError
from state.registry import RegistryState
from state.served_band import BandState, Block, ServedBand, decision_of
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from state.tracks import NUMBERS
from stream.errors import NoAnswer, RegistryError
from stream.registry.checking import check_store
from stream.registry.writer import RegistryWriter
from stream.trainer.bookkeeping import State, from_json, to_json
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import counts
from stream.trainer.metrics import TrainerMetrics

__all__ = ["NAME", "ServedWatch", "act_on_alarm"]

log = logging.getLogger(__name__)

NAME = "served"
"""Under which the watch is in the bookkeeping of versions."""

# Examples of a block that has no clicks enough: 16 bytes each. At a click rate of 0.02 % a block of 200 clicks still fits.
MAX_ROWS = 1_000_000


class _Rows(NamedTuple):
    """Examples that carry the score that they were shown with, N of them."""

    served: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    corrects: npt.NDArray[np.bool_]


class ServedWatch:
    """Gathers blocks of served scores. An observer of training, and a part of its bookkeeping.

    `observe`, `state` and `restore` are for the training thread, the rest is for any.

    Args:
        numbers: of the versions of this trainer's track. Scores of another track's versions don't count.
    """

    def __init__(self, settings: SnapshotSettings, numbers: range = range(1, NUMBERS + 1)) -> None:
        self._settings, self._numbers = settings, numbers
        self._band = ServedBand(settings)
        self._lock = threading.Lock()
        self._rows: list[_Rows] = []
        self._waiting = 0
        self._clicks = 0
        self._left: npt.NDArray[np.int64] = np.zeros((0, 2), np.int64)  # ranges of versions: above, up to and including
        self._candidate = -1

    def follow(self, registry: RegistryState) -> None:
        """Take the registry: judge from nothing after a decision by hand, once auto-promotion isn't held."""
        champion, canary = registry.champion, registry.canary
        self._left = np.array(champion.rolled_back, np.int64).reshape(-1, 2)
        is_tried = canary.mode == "canary" and canary.outcome != "promoted" and canary.version != champion.version
        self._candidate = canary.version if is_tried else -1
        decided = decision_of(champion)
        with self._lock:
            if not champion.hold and decided != self._band.state.under:
                self._rows, self._waiting, self._clicks = [], 0, 0
                self._band.begin_again(decided)

    def observe(self, batch: ExampleColumns, scores: npt.NDArray[np.float32]) -> None:
        """Take the examples of a batch that carry the score that they were shown with."""
        there = np.isfinite(batch.served)
        if self._settings.auto_rollback == "off" or not there.any():
            return
        there &= (batch.versions < 0) | ((batch.versions >= self._numbers.start) & (batch.versions < self._numbers.stop))
        left, versions = self._left, batch.versions[:, None]
        if len(left):
            there &= ~((versions > left[:, 0]) & (versions <= left[:, 1])).any(1)
        if self._candidate > 0:
            there &= (batch.versions != self._candidate) | (batch.deltas > 0)
        corrects = np.zeros(len(batch), np.bool_) if batch.corrects is None else batch.corrects
        rows = _Rows(batch.served[there], batch.labels[there], counts(batch)[there], corrects[there])
        with self._lock:
            self._rows.append(rows)
            self._waiting += int(there.sum())
            self._clicks += int((rows.labels > 0.5).sum())
            if self._clicks >= self._settings.served_block_clicks or self._waiting >= MAX_ROWS:
                self._close_block()

    def _close_block(self) -> None:
        served, labels, weights, corrects = (np.concatenate(column) for column in zip(*self._rows, strict=True))
        self._rows, self._waiting, self._clicks = [], 0, 0
        found = measure(served, labels, weights, corrects)
        if found.positives > 0:
            self._band.judge(Block(found.positives, found.normalised_entropy, found.calibration))

    @property
    def alarm(self) -> str:
        """Why there is an alarm; empty without one."""
        return self._band.state.alarm

    @property
    def under(self) -> str:
        """The decision by hand since which scores are judged."""
        return self._band.state.under

    def manifest_metrics(self) -> Mapping[str, float]:
        """The newest block and its history, under their names in a version's metrics."""
        state = self._band.state
        if state.last is None:
            return {}
        known = {"served_history_ne": state.mean} if state.blocks else {}
        return {"served_block_ne": state.last.normalised_entropy, **known, "served_alarm": float(bool(state.alarm))}

    def state(self) -> dict[str, torch.Tensor]:
        """What is known of the blocks so far, without the block that isn't full."""
        with self._lock:
            return {"state": to_json(self._band.state)}

    def restore(self, state: State) -> None:
        """Go on from what `state` gave. Raises ModelError for an unknown layout."""
        found = from_json(state.get("state"), BandState)
        with self._lock:
            self._band.state = found


async def act_on_alarm(
    watch: ServedWatch,
    registry: RegistryState,
    writer: RegistryWriter,
    store: SnapshotStore,
    settings: SnapshotSettings,
    metrics: TrainerMetrics,
) -> bool:
    """Show the alarm, and roll back to the newest good version if that is wanted and auto-promotion isn't held.

    What operators have decided since the last call is taken note of first.

    Returns:
        Whether it has rolled back.
    """
    watch.follow(registry)
    alarm = watch.alarm
    metrics.served_alarm.set(bool(alarm))
    if not alarm or settings.auto_rollback != "act" or registry.champion.hold:
        return False
    try:
        target = rollback_target(registry, now_ms=0)
        await check_store(store, target, hashes=True)
        written = await writer.rollback_by_itself(target, f"by itself: {alarm}", under=watch.under)
    except (Refused, RegistryError, NoAnswer, SnapshotError) as error:
        log.error("served scores are out of band (%s), and nothing was rolled back: %s", alarm, error)
        return False
    if written is None:
        return False
    metrics.own_rollbacks.inc()
    log.error(
        "served scores are out of band (%s): rolled back from version %s to %d. The trainer goes on learning; `headrace "
        "snapshot resume` lets scorers follow it again",
        *(alarm, written.previous, written.version),
    )
    return True
