"""The trainer's side of the gate: which examples are compared, and the anchor that they are compared with.

Training hands over every batch with the scores from before its update (`Judge.observe`). A sample of it is gathered over
several batches, so that the anchor scores a few hundred rows at once, and goes to the gate as pairs of logits. The gate's own
rule is `state.gate`.

A first label of 0 may be corrected later. The live weights have learned the impression as a non-click by then, so their present
score says too little, and would count against them. So the logits of the first label are remembered, in a table of fixed size
where each impression has one place: it holds the newest 131,072 compared impressions or so. A correction whose impression isn't
there any more is compared by the present scores.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from model.batch import FeatureBatch
from state.gate import Gate, GateState
from state.gate_blocks import sample
from state.gate_report import GateReport
from state.registry import RegistryState, VersionRecord
from state.settings import SnapshotSettings
from stream.trainer.batching import TrainingBatch
from stream.trainer.bookkeeping import State, from_json, to_json
from stream.trainer.evaluation import counts

__all__ = ["Anchor", "Judge", "Predicts", "choose_anchor"]

# Examples looked at together: numpy's calls cost as much for a batch of 128 as for eight of them.
TOGETHER_ROWS = 1_024
# Rows that the anchor scores at once: 38 µs of CPU a row for 64 of them, 24 for 256, 20 for 1,024 (39 fields, MLP 400-400-400).
# A full block and a capture don't wait for so many.
GATHERED_ROWS = 1_024
# Places for the logits of compared first labels; 20 bytes each, 2.6 MB together. At one impression in 16 and 300 impressions/s
# that is two hours.
PLACES = 1 << 17
# Scores over which their spread is measured: fewer vary by chance too little or too much.
SPREAD_EXAMPLES = 1_000
# Logits of a model whose scores are all alike differ by less: a thousandth of a logit is a tenth of a per cent of a click rate.
LEAST_SPREAD = 1e-3
# A score in float32 can't say 1 - p below this; the same limit as that of the metrics.
_CLIP = 1e-7
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the sample must not follow what others draw from the hash


class Predicts(Protocol):
    """What an anchor needs of a `model.predictor.Predictor`."""

    def predict(self, batch: FeatureBatch) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the live weights are compared with. Without a predictor the scores that impressions were shown with stand in."""

    version: int | None
    predictor: Predicts | None


@dataclass(slots=True)
class _Gathered:
    """Compared examples of one batch, not scored by the anchor yet."""

    batch: FeatureBatch
    keys: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    live: npt.NDArray[np.float64]
    served: npt.NDArray[np.float64]
    corrects: npt.NDArray[np.bool_]


class _Remembered:
    """Logits and weights of compared first labels, by the hash of the id; a newer impression takes the place of an older."""

    def __init__(self) -> None:
        self._keys = np.zeros(PLACES, np.uint64)
        self._values = np.zeros((PLACES, 3), np.float32)  # live logit, anchor's logit, weight

    def put(self, keys: npt.NDArray[np.uint64], values: npt.NDArray[np.float64]) -> None:
        at = (keys % PLACES).astype(np.intp)
        self._keys[at], self._values[at] = keys, values

    def take(self, keys: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        """Whether each is there (N,), and its values (N, 3)."""
        at = (keys % PLACES).astype(np.intp)
        return self._keys[at] == keys, self._values[at].astype(np.float64)


class Judge:
    """Feeds the gate. `observe`, `state` and `restore` are for the training thread, everything else for any.

    judge = Judge(settings.snapshots, GateState(line=epoch))
    judge.compare_with(Anchor(12, predictor))
    judge.observe(batch, scores)
        judge.report()
    """

    def __init__(self, settings: SnapshotSettings, state: GateState) -> None:
        self._settings = settings
        self._gate = Gate(settings, state)
        self._lock = threading.Lock()
        self._anchor: Anchor | None = None
        self._observed: list[tuple[TrainingBatch, npt.NDArray[np.float32]]] = []
        self._observed_rows = 0
        self._gathered: list[_Gathered] = []
        self._rows = 0
        self._remembered = _Remembered()
        self._spread: float | None = None
        self._scores = [0.0, 0.0, 0.0]  # count, Σ logit, Σ logit² since the spread was last measured

    @property
    def anchor(self) -> Anchor | None:
        """What is compared with; None before anything is."""
        return self._anchor

    def compare_with(self, anchor: Anchor | None) -> None:
        """Go on with another anchor, or with none; what is gathered for the old one is left out."""
        with self._lock:
            self._take_in()
            self._gathered, self._rows = [], 0
            if self._anchor is not None:
                self._remembered = _Remembered()
            self._anchor = anchor
            self._gate.anchored(None if anchor is None else anchor.version)

    def follow(self, champion_line: int | None) -> None:
        """Tell the gate whose line the champion is of (None: there is no champion)."""
        with self._lock:
            state = self._gate.state
            if champion_line is None or champion_line == state.line:
                self._gate.unopposed(_now_ms())
            elif champion_line not in state.passed:
                self._gate.oppose(champion_line, _now_ms())

    def report(self) -> GateReport:
        """What the gate knows now: of everything observed right after `state`, else of all but the last moments."""
        with self._lock:
            return self._gate.report(self._problems(), self._spread)

    def state(self) -> dict[str, torch.Tensor]:
        """Between two batches: everything observed so far, what is gathered included."""
        with self._lock:
            self._take_in()
            self._score_gathered()
            return {"state": to_json(self._gate.state)}

    def restore(self, state: State) -> None:
        """Go on from what `state` gave; raises ModelError for a layout that it doesn't know."""
        found = from_json(state.get("state"), GateState)
        with self._lock:
            self._gate.state = found

    def observe(self, batch: TrainingBatch, scores: npt.NDArray[np.float32]) -> None:
        """Take in a batch that was learned, with the scores from before the update."""
        with self._lock:
            self._observed.append((batch, scores))
            self._observed_rows += len(batch)
            if self._observed_rows >= TOGETHER_ROWS:
                self._take_in()

    def _take_in(self) -> None:
        observed, self._observed, self._observed_rows = self._observed, [], 0
        if not observed:
            return
        batches = [batch for batch, _ in observed]
        live = _logits(np.concatenate([scores for _, scores in observed]))
        self._measure_spread(live)
        labels = np.concatenate([batch.labels for batch in batches])
        weights = np.concatenate([counts(batch) for batch in batches]).astype(np.float64)
        corrects = None
        if any(batch.corrects is not None for batch in batches):
            none = [np.zeros(len(batch), np.bool_) if batch.corrects is None else batch.corrects for batch in batches]
            corrects = np.concatenate(none)
        if self._anchor is None:
            self._gate.count(labels, corrects, weights, comparable=False)
            return
        served = np.concatenate([batch.served for batch in batches]).astype(np.float64)
        if self._anchor.predictor is None:
            weights = np.where(np.isnan(served), 0.0, weights)  # clicks are seen, but the comparison is of what was served
        self._gate.count(labels, corrects, weights)
        keys = np.concatenate([batch.id_hashes for batch in batches]).view(np.uint64) * _MIX
        hashes = (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53
        rows, share = sample(hashes, labels, corrects, one_in=self._settings.gate_sample, click_share=self._gate.click_share)
        usable = np.isfinite(live[rows]) & (weights[rows] > 0)
        rows, share = rows[usable], share[usable]
        if len(rows):
            self._gathered.append(
                _Gathered(
                    batch=_rows_of([batch.batch for batch in batches], rows),
                    keys=keys[rows],
                    labels=labels[rows].astype(np.float64),
                    weights=weights[rows] * share,
                    live=live[rows],
                    served=served[rows],
                    corrects=np.zeros(len(rows), np.bool_) if corrects is None else corrects[rows],
                )
            )
            self._rows += len(rows)
        if self._rows >= GATHERED_ROWS or self._gate.share_is_due:
            self._score_gathered()
        if self._gate.block_is_full:
            self._gate.close_block(_now_ms())

    def _score_gathered(self) -> None:
        gathered, self._gathered, self._rows = self._gathered, [], 0
        if not gathered or self._anchor is None:
            return
        keys, labels, weights, live, served, corrects = (
            np.concatenate([getattr(each, name) for each in gathered])
            for name in ("keys", "labels", "weights", "live", "served", "corrects")
        )
        # First labels come before their corrections, also where both are gathered here.
        at = np.flatnonzero(~corrects)
        batch = FeatureBatch.concat([each.batch for each in gathered])
        self._pair(batch, at, labels, weights, live, served, keys)
        if not corrects.any():
            return
        at = np.flatnonzero(corrects)
        known, values = self._remembered.take(keys[at])
        was_live, was_anchor, was_weight = values[known].T
        now = labels[at][known]
        self._gate.pair(1 - now, was_weight, was_live, was_anchor, taken_back=True)
        # One label of the impression is taken back, the other counts as one among those of its kind.
        self._gate.pair(now, weights[at][known], was_live, was_anchor)
        # Not remembered, or left out of the stream when it was a non-click: by the present scores.
        unknown = at[~known]
        self._pair(batch, unknown[labels[unknown] > 0.5], labels, weights, live, served, keys, remember=False)

    def _pair(
        self,
        batch: FeatureBatch,
        at: npt.NDArray[np.intp],
        labels: npt.NDArray[np.float64],
        weights: npt.NDArray[np.float64],
        live: npt.NDArray[np.float64],
        served: npt.NDArray[np.float64],
        keys: npt.NDArray[np.uint64],
        *,
        remember: bool = True,
    ) -> None:
        if not len(at) or self._anchor is None:
            return
        predictor = self._anchor.predictor
        whole = len(at) == len(batch)
        scores = served[at] if predictor is None else predictor.predict(batch if whole else batch.take(at))
        anchor = _logits(scores)
        fine = np.isfinite(anchor)
        at, anchor = at[fine], anchor[fine]
        self._gate.pair(labels[at], weights[at], live[at], anchor)
        if remember:
            self._remembered.put(keys[at], np.stack([live[at], anchor, weights[at]], 1))

    def _measure_spread(self, live: npt.NDArray[np.float64]) -> None:
        sums = self._scores
        sums[0] += len(live)
        sums[1] += float(live.sum())
        sums[2] += float((live * live).sum())
        if sums[0] >= SPREAD_EXAMPLES:
            mean = sums[1] / sums[0]
            self._spread = math.sqrt(max(0.0, sums[2] / sums[0] - mean * mean))
            self._scores = [0.0, 0.0, 0.0]

    def _problems(self) -> list[str]:
        if self._spread is None or self._spread >= LEAST_SPREAD:
            return []
        return [
            f"scores don't vary: the logits of the last {SPREAD_EXAMPLES} examples differ by {self._spread:.1g} (one sigma)"
        ]


def choose_anchor(
    registry: RegistryState,
    report: GateReport,
    *,
    watermark_ms: int,
    settings: SnapshotSettings,
    broken: Collection[int] = (),
) -> int | None:
    """Which version to compare with: the one in use, or a newer one when it is time; None when none qualifies.

    An anchor is good (tagged, not rolled back) and at least `anchor_age_ms` (event time) and `anchor_clicks` older than what is
    trained. It is changed for one that is as much newer again, so that a store is read once in that time and not with
    every version, and never while versions are withheld: the good ones of the last moments are those that went wrong.
    Where the champion is of another line, it is the newest good version of that line, or the champion itself.

    Args:
        report: the gate's, of now.
        watermark_ms: how far is trained, event time.
        broken: versions that couldn't be read.
    """
    champion_line = registry.champion_line
    if champion_line is None:
        return None
    is_new_line = champion_line not in (report.line, *report.passed)
    line = champion_line if is_new_line else report.line
    usable = {
        number: record
        for number, record in registry.versions.items()
        if record.line == line
        and record.kind == "full"
        and number not in broken
        and not registry.champion.was_rolled_back(number)
    }
    current = None if report.anchor is None else usable.get(report.anchor)
    good = [record for record in usable.values() if record.good_at_ms is not None]
    if is_new_line:
        if current is None and not good:
            return None if registry.champion.version in broken else registry.champion.version
        return current.version if current is not None else max(record.version for record in good)
    if current is not None and report.flow == "withheld":
        return current.version
    old = [
        record
        for record in good
        if watermark_ms - record.watermark_ms >= settings.anchor_age_ms
        and report.clicks - _clicks(record) >= settings.anchor_clicks
    ]
    newest = max(old, key=lambda record: record.version, default=None)
    if newest is None or current is None:
        chosen = current or newest
        return None if chosen is None else chosen.version
    is_time = newest.watermark_ms - current.watermark_ms >= settings.anchor_age_ms
    is_time = is_time and _clicks(newest) - _clicks(current) >= settings.anchor_clicks
    return newest.version if is_time else current.version


def _clicks(record: VersionRecord) -> int:
    return 0 if record.verdict is None else record.verdict.clicks


def _rows_of(batches: list[FeatureBatch], rows: npt.NDArray[np.intp]) -> FeatureBatch:
    """Some rows (ascending) of batches that are numbered one after the other."""
    starts = np.cumsum([0, *map(len, batches)])
    cuts = np.searchsorted(rows, starts)
    parts = [
        batch.take(rows[first:last] - start)
        for batch, start, first, last in zip(batches, starts, cuts, cuts[1:], strict=False)
        if last > first
    ]
    return FeatureBatch.concat(parts)


def _logits(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    clipped = np.clip(np.asarray(scores, np.float64), _CLIP, 1 - _CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
