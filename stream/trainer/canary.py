"""The trainer's side of a shadow or canary: evidence from examples that carry served scores, and the end of the trial.

Examples say which version gave their score (`model_version`, `delta`), and in the share of a shadow what the candidate would
have said (`shadow_score`, `shadow_version`). Training hands over every batch with the model's own scores from before its update
(`CanaryWatch.observe`). `state.canary_evidence` says what is compared with what, `state.canary_rule` when a trial ends. The
leading trainer enters progress and outcome in the registry; scorers follow that.

A first label of 0 may be corrected later. The examples counted last are remembered with their logits, in a table of fixed size,
so that a correction takes back exactly what was counted. A correction whose first label isn't in the table adds its click only.

The evidence is saved in every version, together with the offsets up to which it goes, so a trainer that restarts counts every
example once. The table isn't saved.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace

from state.canary import Canary
from state.canary_evidence import Evidence
from state.canary_rule import Verdict, judge_canary
from state.canary_running import held_since, running_canary, why_over
from state.gate_blocks import FloatArray
from state.registry import RegistryState
from stream.registry.writer import RegistryWriter
from stream.trainer.bookkeeping import State, from_json, to_json
from stream.trainer.canary_metrics import CanaryMetrics
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import counts
from stream.trainer.remembered import Remembered, logits_of

__all__ = ["CanaryWatch"]

log = logging.getLogger(__name__)

# Examples processed together: numpy's calls cost as much for a batch of 128 as for eight of them.
TOGETHER_ROWS = 1_024
# Progress is written to the registry at most this often. A record of 1 kB every 5 s is 17 MB a day before compaction.
PROGRESS_S = 5.0


class _Rows(NamedTuple):
    """Examples of a trial, (N,) each.

    mine    logits of the score that counts for the side: the candidate's in a shadow, else the one served
    theirs  logits to compare with: the champion's in a shadow, else those of the model in training
    """

    labels: npt.NDArray[np.float32]
    weights: FloatArray
    mine: FloatArray
    theirs: FloatArray
    is_candidate: npt.NDArray[np.bool_]
    corrects: npt.NDArray[np.bool_]
    keys: npt.NDArray[np.uint64]


class CanaryWatch:
    """Gathers evidence and ends trials. `observe`, `state` and `restore` are for the training thread, the rest for the loop."""

    def __init__(self, metrics: CanaryMetrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._canary: Canary | None = None
        self._evidence = Evidence()
        self._remembered: Remembered | None = None
        self._observed: list[tuple[ExampleColumns, npt.NDArray[np.float32]]] = []
        self._rows = 0
        self._written_s = 0.0

    def follow(self, registry: RegistryState) -> None:
        """Take the registry. The evidence of another trial than the one that runs is dropped."""
        canary = running_canary(registry)
        with self._lock:
            if canary is None:
                self._canary, self._remembered, self._observed, self._rows = None, None, [], 0
                return
            self._canary = canary
            if self._evidence.of != canary.operation:
                was_champion = bool(registry.versions[canary.version].champion_at_ms)
                # Such a version has answered before: examples of that time are still to come.
                from_ms = canary.at_ms if was_champion and canary.mode == "canary" else None
                self._evidence = Evidence(of=canary.operation, mode=canary.mode, from_ms=from_ms)
                self._remembered, self._observed, self._rows = None, [], 0

    def observe(self, batch: ExampleColumns, scores: npt.NDArray[np.float32]) -> None:
        """Take a batch that was learned, with the scores from before its update."""
        if self._canary is None:
            return
        with self._lock:
            self._observed.append((batch, scores))
            self._rows += len(batch)
            if self._rows >= TOGETHER_ROWS:
                self._take_in()

    def state(self) -> dict[str, torch.Tensor]:
        """The evidence of all examples observed so far. To be called between two batches."""
        with self._lock:
            self._take_in()
            return {"evidence": to_json(self._evidence)}

    def restore(self, state: State) -> None:
        """Go on from what `state` gave. Raises ModelError for an unknown layout."""
        found = from_json(state.get("evidence"), Evidence)
        with self._lock:
            self._evidence = found

    async def conduct(self, writer: RegistryWriter, registry: RegistryState, now_ms: int | None = None) -> None:
        """Enter the trial's progress in the registry, and end it when it is time.

        Raises:
            RegistryError, NoAnswer: the registry can't be written; the next call tries again.
        """
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        self.follow(registry)
        canary, over = registry.canary, why_over(registry)
        if over:
            log.warning("the %s of version %d is over: %s", canary.mode, canary.version, over)
            await writer.end_canary("stopped", over, of=canary.operation)
        if self._canary is None:
            self._metrics.none()
            return
        canary = self._canary
        verdict = await asyncio.to_thread(self._judged, canary, now_ms)
        self._metrics.judged(canary, verdict.progress)
        if verdict.outcome == "promoted" and held_since(registry):
            waits = f"{verdict.reason}; not promoted while auto-promotion is held ({registry.champion.hold_reason})"
            verdict = verdict._replace(outcome="", progress=replace(verdict.progress, verdict=waits))
        news = canary.progress is None or replace(canary.progress, at_ms=now_ms) != verdict.progress
        if verdict.outcome or (news and time.monotonic() - self._written_s >= PROGRESS_S):
            self._written_s = time.monotonic()
            await writer.note_canary(canary.operation, verdict.progress)
        if verdict.outcome:
            log.warning("the %s of version %d ends, %s: %s", canary.mode, canary.version, verdict.outcome, verdict.reason)
            await writer.end_canary(verdict.outcome, verdict.reason, of=canary.operation)

    def _judged(self, canary: Canary, now_ms: int) -> Verdict:
        with self._lock:
            self._take_in()
            return judge_canary(canary, self._evidence, now_ms)

    def _take_in(self) -> None:
        observed, self._observed, self._rows = self._observed, [], 0
        canary, evidence = self._canary, self._evidence
        if canary is None or not observed:
            return
        found = [
            self._shadowed(batch, canary) if canary.mode == "shadow" else self._served(batch, scores, canary)
            for batch, scores in observed
        ]
        parts = [rows for rows in found if rows is not None]
        if parts:
            self._count(_Rows(*(np.concatenate(column) for column in zip(*parts, strict=True))))
            evidence.close_stretch()

    def _shadowed(self, batch: ExampleColumns, canary: Canary) -> _Rows | None:
        """Examples that both versions have scored."""
        if batch.shadow_scores is None or batch.shadow_versions is None:
            return None
        at = np.flatnonzero(
            (batch.shadow_versions == canary.version) & np.isfinite(batch.shadow_scores) & np.isfinite(batch.served)
        )
        return _rows(batch, at, batch.shadow_scores[at], batch.served[at], np.ones(len(at), np.bool_))

    def _served(self, batch: ExampleColumns, live: npt.NDArray[np.float32], canary: Canary) -> _Rows | None:
        """Examples with a score of either side, from the candidate's first on."""
        evidence = self._evidence
        there = np.isfinite(batch.served) & (batch.versions >= 0) & np.isfinite(live)
        by_candidate = there & (batch.versions == canary.version) & (batch.deltas <= 0)
        if evidence.from_ms is None:
            if not by_candidate.any():
                return None
            evidence.from_ms = int(batch.impression_ms[by_candidate].min())
        at = np.flatnonzero(there & (batch.impression_ms >= evidence.from_ms))
        return _rows(batch, at, batch.served[at], live[at], by_candidate[at])

    def _count(self, rows: _Rows) -> None:
        if self._remembered is None:
            self._remembered = Remembered()
        # First labels are counted before their corrections, also when both are in this batch.
        first = np.flatnonzero(~rows.corrects)
        self._add(rows, first, taken_back=False)
        sides = rows.is_candidate.astype(np.float64)
        values = np.stack([rows.weights, rows.mine, rows.theirs, sides], 1)
        self._remembered.put(rows.keys[first], values[first])
        at = np.flatnonzero(rows.corrects)
        if not len(at):
            return
        known, was = self._remembered.take(rows.keys[at])
        weights, mine, theirs, side = was[known].T
        then = _Rows(
            (1 - rows.labels[at][known]).astype(np.float32),
            weights,
            mine,
            theirs,
            side > 0.5,
            np.zeros(int(known.sum()), np.bool_),
            rows.keys[at][known],
        )
        every = np.arange(len(then.labels))
        self._add(then, every, taken_back=True)
        now = then._replace(labels=rows.labels[at][known], weights=rows.weights[at][known])
        self._add(now, every, taken_back=False)
        # The first label isn't in the table, or its negative was left out of the stream.
        unknown = at[~known]
        self._add(rows, unknown[rows.labels[unknown] > 0.5], taken_back=False)

    def _add(self, rows: _Rows, at: npt.NDArray[np.intp], *, taken_back: bool) -> None:
        if not len(at):
            return
        evidence = self._evidence
        if evidence.mode == "shadow":
            evidence.add_pairs(rows.labels[at], rows.weights[at], rows.mine[at], rows.theirs[at], taken_back=taken_back)
            return
        for is_candidate in (True, False):
            side = at[rows.is_candidate[at] == is_candidate]
            if len(side):
                evidence.add_side(
                    rows.labels[side],
                    rows.weights[side],
                    rows.mine[side],
                    rows.theirs[side],
                    is_candidate=is_candidate,
                    taken_back=taken_back,
                )


def _rows(
    batch: ExampleColumns,
    at: npt.NDArray[np.intp],
    mine: npt.NDArray[np.float32],
    theirs: npt.NDArray[np.float32],
    is_candidate: npt.NDArray[np.bool_],
) -> _Rows | None:
    if not len(at):
        return None
    return _Rows(
        batch.labels[at],
        counts(batch)[at].astype(np.float64),
        logits_of(mine),
        logits_of(theirs),
        is_candidate,
        np.zeros(len(at), np.bool_) if batch.corrects is None else batch.corrects[at],
        batch.id_hashes[at].view(np.uint64),
    )
