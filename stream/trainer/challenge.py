"""The trainer's side of a challenger: what its track's scores are worth beside those of the track that serves.

Answers to the requests of the track's share carry both scores, impressions repeat them, and examples have them with the label
(`served`, `shadow_score`, `shadow_version`). The track's own trainer counts them while it learns the examples, and enters the
figures in its own registry (`state.comparison`), where `headrace model compare` reads them. So neither the trainer nor the
registry of the track that serves has anything to do with a challenger.

As in `stream.trainer.canary`, corrections take back what was counted, and the sums are saved in every version together with the
offsets up to which they go: a trainer that restarts counts every example once.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.errors import ModelError
from state.canary_evidence import Evidence, Tally
from state.comparison import Comparison, ServedSide
from state.gate_blocks import FloatArray
from state.registry import RegistryState
from state.tracks import Track, numbers_of
from stream.registry.writer import RegistryWriter
from stream.trainer.bookkeeping import State, from_json, to_json
from stream.trainer.challenge_metrics import ChallengeMetrics
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import counts
from stream.trainer.remembered import Remembered, logits_of

__all__ = ["NAME", "ChallengeWatch"]

NAME = "challenge"
"""Under which the watch is in the bookkeeping of versions."""

# Examples processed together: numpy's calls cost as much for a batch of 128 as for eight of them.
TOGETHER_ROWS = 1_024
# The record is written to the track's registry at most this often: 0.7 kB every 5 s.
PROGRESS_S = 5.0
# Bins of a logit, for the AUC: 128 for each unit from -16 to 16, within 1e-3 of the exact AUC. 132 kB in each version.
BINS_A_UNIT, BINS = 128, 4_096


class _Rows(NamedTuple):
    """Examples that both tracks have scored, (N,) each; `mine` are this track's logits, `theirs` those that were served."""

    labels: npt.NDArray[np.float32]
    weights: FloatArray
    mine: FloatArray
    theirs: FloatArray
    corrects: npt.NDArray[np.bool_]
    keys: npt.NDArray[np.uint64]


class ChallengeWatch:
    """Counts what both tracks have scored. An observer of training, and a part of its bookkeeping.

    `observe`, `state` and `restore` are for the training thread, the rest for the event loop.

    Args:
        track: the trainer's. Nothing is counted while it serves, and while it has no share of the requests.
    """

    def __init__(self, track: Track, metrics: ChallengeMetrics) -> None:
        self._name, self._numbers, self._metrics = track.name, numbers_of(track), metrics
        self._lock = threading.Lock()
        self._against = ""  # the track that serves; empty while nothing is counted
        self._evidence = Evidence()
        self._bins = np.zeros((2, 2, BINS))  # this track's and theirs; negatives and positives; by logit
        self._impressions, self._since_ms, self._version = 0.0, 0, -1
        self._remembered: Remembered | None = None
        self._observed: list[ExampleColumns] = []
        self._rows = 0
        self._written_s = 0.0

    def follow(self, tracks: RegistryState) -> None:
        """Take the registry of `main`. Another share, or another track that serves, begins the comparison anew."""
        mine, serving = tracks.tracks.get(self._name), tracks.serving
        self._metrics.serves(self._name, serving.track == self._name)
        with self._lock:
            if mine is None or not mine.share or serving.track == self._name:
                self._against = ""
                if self._evidence.of:
                    self._begin(Evidence())
                return
            self._against = serving.track
            of = f"{mine.share_operation}/{'' if serving.last is None else serving.last.operation}"
            if self._evidence.of != of:
                self._begin(Evidence(of=of, mode="shadow"))

    def observe(self, batch: ExampleColumns, scores: npt.NDArray[np.float32]) -> None:
        """Take a batch that was learned."""
        if not self._against or batch.shadow_versions is None:
            return
        with self._lock:
            self._observed.append(batch)
            self._rows += len(batch)
            if self._rows >= TOGETHER_ROWS:
                self._take_in()

    def state(self) -> dict[str, torch.Tensor]:
        """What is known of all examples observed so far; nothing without a share. To be called between two batches."""
        with self._lock:
            self._take_in()
            if not self._evidence.of:
                return {}
            seen = (self._impressions, self._since_ms, self._version)
            return {
                "evidence": to_json(self._evidence),
                "seen": to_json(seen),
                "bins": torch.from_numpy(self._bins.copy()),
            }

    def restore(self, state: State) -> None:
        """Go on from what `state` gave. Raises ModelError for an unknown layout."""
        evidence, seen = from_json(state.get("evidence"), Evidence), from_json(state.get("seen"), tuple[float, int, int])
        bins = state.get("bins")
        if bins is None or bins.shape != self._bins.shape:
            found = "nothing" if bins is None else f"shape {tuple(bins.shape)}"
            raise ModelError(f"saved comparison: expected bins of shape {self._bins.shape}, found {found}")
        with self._lock:
            self._begin(evidence)
            self._impressions, self._since_ms, self._version = seen
            self._bins[:] = bins.numpy()

    async def report(self, writer: RegistryWriter, tracks: RegistryState, now_ms: int | None = None) -> None:
        """Enter what is known in the track's own registry.

        Raises:
            RegistryError, NoAnswer: the registry can't be written; the next call tries again.
        """
        self.follow(tracks)
        if not self._against:
            self._metrics.compared(None)
            return
        if time.monotonic() - self._written_s < PROGRESS_S:
            return
        self._written_s = time.monotonic()
        found = await asyncio.to_thread(self.comparison, time.time_ns() // 1_000_000 if now_ms is None else now_ms)
        self._metrics.compared(found)
        await writer.note_comparison(found)

    def comparison(self, now_ms: int) -> Comparison:
        """What is known now."""
        with self._lock:
            self._take_in()
            evidence, difference = self._evidence, self._evidence.difference()
            known = math.isfinite(difference.error)
            return Comparison(
                of=evidence.of,
                against=self._against,
                since_ms=self._since_ms,
                at_ms=now_ms,
                impressions=round(self._impressions, 1),
                clicks=round(evidence.candidate.clicks, 1),
                track=_side(evidence.candidate, self._bins[0]),
                serving=_side(evidence.champion, self._bins[1]),
                change=difference.change if known else None,
                error=difference.error if known else None,
                version=None if self._version < 0 else self._version,
            )

    def _begin(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._bins[:] = 0
        self._impressions, self._since_ms, self._version = 0.0, 0, -1
        self._remembered, self._observed, self._rows = None, [], 0

    def _take_in(self) -> None:
        observed, self._observed, self._rows = self._observed, [], 0
        parts = [rows for rows in map(self._scored_by_both, observed) if rows is not None]
        if parts:
            self._count(_Rows(*(np.concatenate(column) for column in zip(*parts, strict=True))))
            self._evidence.close_stretch()

    def _scored_by_both(self, batch: ExampleColumns) -> _Rows | None:
        versions, shadows = batch.shadow_versions, batch.shadow_scores
        if versions is None or shadows is None:
            return None
        mine = (versions >= self._numbers.start) & (versions < self._numbers.stop)
        at = np.flatnonzero(mine & np.isfinite(shadows) & np.isfinite(batch.served))
        if not len(at):
            return None
        self._version = max(self._version, int(versions[at].max()))
        first_ms = int(batch.impression_ms[at].min())
        self._since_ms = min(self._since_ms, first_ms) if self._since_ms else first_ms
        return _Rows(
            batch.labels[at],
            counts(batch)[at].astype(np.float64),
            logits_of(shadows[at]),
            logits_of(batch.served[at]),
            np.zeros(len(at), np.bool_) if batch.corrects is None else batch.corrects[at],
            batch.id_hashes[at].view(np.uint64),
        )

    def _count(self, rows: _Rows) -> None:
        if self._remembered is None:
            self._remembered = Remembered()
        # First labels are counted before their corrections, also when both are in this batch.
        first = np.flatnonzero(~rows.corrects)
        self._add(rows, first, taken_back=False)
        values = np.stack([rows.weights, rows.mine, rows.theirs, np.zeros(len(rows.labels))], 1)
        self._remembered.put(rows.keys[first], values[first])
        at = np.flatnonzero(rows.corrects)
        if not len(at):
            return
        known, was = self._remembered.take(rows.keys[at])
        weights, mine, theirs, _ = was[known].T
        now = rows.labels[at][known]
        then = _Rows((1 - now).astype(np.float32), weights, mine, theirs, np.zeros(len(now), np.bool_), rows.keys[at][known])
        every = np.arange(len(now))
        self._add(then, every, taken_back=True)
        self._add(then._replace(labels=now, weights=rows.weights[at][known]), every, taken_back=False)
        # The first label isn't in the table, or its negative was left out of the stream.
        unknown = at[~known]
        self._add(rows, unknown[rows.labels[unknown] > 0.5], taken_back=False)

    def _add(self, rows: _Rows, at: npt.NDArray[np.intp], *, taken_back: bool) -> None:
        if not len(at):
            return
        labels, weights, sign = rows.labels[at], rows.weights[at], -1.0 if taken_back else 1.0
        self._evidence.add_pairs(labels, weights, rows.mine[at], rows.theirs[at], taken_back=taken_back)
        self._impressions += sign * float(weights.sum())
        clicked = labels > 0.5
        for side, logits in enumerate((rows.mine[at], rows.theirs[at])):
            bins = np.clip(np.floor(logits * BINS_A_UNIT).astype(np.int64) + BINS // 2, 0, BINS - 1)
            found = np.bincount(bins + BINS * clicked, weights, minlength=2 * BINS)
            self._bins[side] += sign * found.reshape(2, BINS)


def _side(tally: Tally, bins: FloatArray) -> ServedSide:
    """The figures of one side, from its sums and its bins (2, `BINS`)."""
    if tally.weight <= 0 or tally.clicks <= 0:
        return ServedSide()
    loss, rate = tally.loss / tally.weight, tally.click_rate
    base = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate)) if rate < 1 else 0.0
    return ServedSide(
        log_loss=loss,
        normalised_entropy=loss / base if base > 0 else None,
        auc=_auc(bins),
        calibration=tally.calibration,
    )


def _auc(bins: FloatArray) -> float | None:
    """Area under the ROC curve from the weights of negatives and positives (2, `BINS`), with ties in a bin as one half."""
    negative, positive = bins
    negatives, positives = negative.sum(), positive.sum()
    if negatives <= 0 or positives <= 0:
        return None
    below = np.cumsum(negative) - negative
    return float(np.clip((positive * (below + negative / 2)).sum() / (negatives * positives), 0, 1))
