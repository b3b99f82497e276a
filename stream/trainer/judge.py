"""The trainer's side of the gate: which examples are compared, and the anchor that they are compared with.

Training hands over every batch with the scores from before its update (`Judge.observe`). A sample is gathered over several
batches, so that the anchor scores a few hundred rows at once. The gate gets pairs of logits; its rule is in `state.gate`.

A first label of 0 may be corrected later. By then the live weights have learned the impression as a non-click, so their present
score is too low, and would count against them. So the logits of the first label are remembered, in a table of fixed size with
one slot for each impression: the table holds the newest 131,072 compared impressions or so. A correction whose impression isn't
in the table any more is compared by the present scores.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from model.batch import FeatureBatch
from state.gate import Doubt, Gate, GateState
from state.gate_blocks import sample
from state.gate_report import Flow, GateReport
from state.settings import SnapshotSettings
from stream.trainer.bookkeeping import State, from_json, to_json
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import counts
from stream.trainer.logits import logits

__all__ = ["Anchor", "Judge", "Predicts"]

log = logging.getLogger(__name__)

# Examples processed together: numpy's calls cost as much for a batch of 128 as for eight of them.
TOGETHER_ROWS = 1_024
# Rows that the anchor scores at once: 38 µs of CPU a row for 64 of them, 24 for 256, 20 for 1,024 (39 fields, MLP 400-400-400).
# A full block and a capture don't wait for that many.
GATHERED_ROWS = 1_024
# Slots for the logits of compared first labels; 20 bytes each, 2.6 MB together. At one impression in 16 and 300 impressions/s
# that is two hours.
SLOTS = 1 << 17
# Number of scores whose spread is measured. The spread of fewer scores depends too much on chance.
SPREAD_EXAMPLES = 1_000
# If logits differ by less, all scores are alike: a thousandth of a logit is a tenth of a per cent of a click rate.
LEAST_SPREAD = 1e-3
_MIX = np.uint64(
    0x9E3779B97F4A7C15
)  # 2**64 / golden ratio: the sample must be independent of others that are drawn by the same hash


class Predicts(Protocol):
    """What an anchor needs: a `model.anchor.AnchorPoint`, or a `model.predictor.Predictor` for a version of another line."""

    def predict(self, batch: FeatureBatch) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the live weights are compared with. Without a predictor, the scores that impressions were shown with are used."""

    version: int | None
    predictor: Predicts | None


@dataclass(slots=True)
class _Gathered:
    """Sampled examples of one batch that the anchor has not scored yet."""

    batch: FeatureBatch
    keys: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    live: npt.NDArray[np.float64]
    served: npt.NDArray[np.float64]
    corrects: npt.NDArray[np.bool_]


@dataclass(slots=True)
class _Spread:
    """Sums over the logits since the spread was last measured."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0


class _Remembered:
    """Logits and weights of compared first labels, by the hash of the id. A newer impression overwrites an older one's slot."""

    def __init__(self) -> None:
        self._keys = np.zeros(SLOTS, np.uint64)
        self._values = np.zeros((SLOTS, 3), np.float32)  # live logit, anchor's logit, weight

    def put(self, keys: npt.NDArray[np.uint64], values: npt.NDArray[np.float64]) -> None:
        at = (keys % SLOTS).astype(np.intp)
        self._keys[at], self._values[at] = keys, values

    def take(self, keys: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        """Whether each key is in the table (N,), and its values (N, 3)."""
        at = (keys % SLOTS).astype(np.intp)
        return self._keys[at] == keys, self._values[at].astype(np.float64)


class Judge:
    """Gives the gate its pairs. `follow` and `report` are for any thread, all else is for the training thread.

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
        self._observed: list[tuple[ExampleColumns, npt.NDArray[np.float32]]] = []
        self._observed_rows = 0
        self._gathered: list[_Gathered] = []
        self._rows = 0
        self._remembered = _Remembered()
        self._spread: float | None = None
        self._sums = _Spread()

    @property
    def anchor(self) -> Anchor | None:
        """What the live weights are compared with; None while there is no anchor."""
        return self._anchor

    def compare_with(self, anchor: Anchor | None) -> None:
        """Go on with another anchor, or with none. Rows gathered for the old anchor are dropped.

        It scores, so it is for the training thread, or for any other one while nothing is trained.
        """
        with self._lock:
            self._take_in()
            self._gathered, self._rows = [], 0
            if self._anchor is not None:
                self._remembered = _Remembered()
            self._anchor = anchor
            self._gate.anchored(None if anchor is None else anchor.version)

    def follow(self, champion_line: int | None) -> None:
        """Set the line of the champion; None when there is no champion."""
        with self._lock:
            state = self._gate.state
            if champion_line is None or champion_line == state.line:
                self._gate.unopposed(_now_ms())
            elif champion_line not in state.passed:
                self._gate.oppose(champion_line, _now_ms())

    @property
    def flow(self) -> Flow:
        """What the blocks of clicks say, whatever doubt there is."""
        return self._gate.state.flow

    @property
    def doubt(self) -> Doubt | None:
        """Why a delta alone isn't sane; None while there is no doubt."""
        return self._gate.state.doubt

    @property
    def released(self) -> str:
        """The operation of the last release by an operator that was carried out."""
        return self._gate.state.released

    def problems(self) -> list[str]:
        """What is wrong with the scores alone; empty when nothing is."""
        return self._problems()

    def question(self, reason: str, watermark_ms: int) -> None:
        """A delta isn't sane: withhold what is learned until `trust`."""
        with self._lock:
            is_news = self._gate.doubt(reason, _now_ms(), watermark_ms)
        if is_news:
            log.error("gate: withheld: %s. Scorers stay at the last delta, training goes on", reason)

    def trust(self, why: str) -> None:
        """A delta is sane: end the doubt about those before it."""
        with self._lock:
            ended = self._gate.trust(_now_ms(), why)
        if ended:
            log.warning("gate: released: %s", why)

    def release(self, operation: str, who: str, why: str) -> bool:
        """An operator releases what is withheld. Returns whether something was; the operation is carried out anyway."""
        with self._lock:
            withheld = self._gate.report().flow == "withheld"
            if withheld:
                self._gate.release(operation, who, why, _now_ms())
            else:
                self._gate.state.released = operation
        if withheld:
            log.warning("gate: released by %s: %s", who, why)
        return withheld

    def report(self) -> GateReport:
        """What the gate knows now: everything observed if `state` was just called, else all but the last batches."""
        with self._lock:
            return self._gate.report(self._problems(), self._spread)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything observed so far, with gathered rows scored. To be called between two batches."""
        with self._lock:
            self._take_in()
            self._score_gathered()
            return {"state": to_json(self._gate.state)}

    def restore(self, state: State) -> None:
        """Go on from what `state` gave. Raises ModelError for an unknown layout."""
        found = from_json(state.get("state"), GateState)
        with self._lock:
            self._gate.state = found

    def observe(self, batch: ExampleColumns, scores: npt.NDArray[np.float32]) -> None:
        """Take a batch that was learned, with the scores from before its update."""
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
        live = logits(np.concatenate([scores for _, scores in observed]))
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
            weights = np.where(np.isnan(served), 0.0, weights)  # only examples with a served score are compared
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
            self._close_block()

    def _close_block(self) -> None:
        state, before = self._gate.state, self._gate.state.flow
        self._gate.close_block(_now_ms())
        if state.flow != before:
            what = "withheld" if state.flow == "withheld" else "flowing"
            log.warning("gate: %s: %s", what, state.reason)

    def _score_gathered(self) -> None:
        gathered, self._gathered, self._rows = self._gathered, [], 0
        if not gathered or self._anchor is None:
            return
        keys, labels, weights, live, served, corrects = (
            np.concatenate([getattr(each, name) for each in gathered])
            for name in ("keys", "labels", "weights", "live", "served", "corrects")
        )
        # First labels are paired before their corrections, also when both are in this batch.
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
        # The pair of the first label was taken back above. The corrected label counts like any other.
        self._gate.pair(now, weights[at][known], was_live, was_anchor)
        # The first label isn't remembered, or its negative was left out of the stream: compare by the present scores.
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
        anchor = logits(scores)
        fine = np.isfinite(anchor)
        at, anchor = at[fine], anchor[fine]
        self._gate.pair(labels[at], weights[at], live[at], anchor)
        if remember:
            self._remembered.put(keys[at], np.stack([live[at], anchor, weights[at]], 1))

    def _measure_spread(self, live: npt.NDArray[np.float64]) -> None:
        sums = self._sums
        sums.count += len(live)
        sums.total += float(live.sum())
        sums.squares += float((live * live).sum())
        if sums.count >= SPREAD_EXAMPLES:
            mean = sums.total / sums.count
            self._spread = math.sqrt(max(0.0, sums.squares / sums.count - mean * mean))
            self._sums = _Spread()

    def _problems(self) -> list[str]:
        if self._spread is None or self._spread >= LEAST_SPREAD:
            return []
        return [
            f"scores don't vary: the logits of the last {SPREAD_EXAMPLES} examples differ by {self._spread:.1g} (one sigma)"
        ]


def _rows_of(batches: list[FeatureBatch], rows: npt.NDArray[np.intp]) -> FeatureBatch:
    """Rows, in ascending order, of several batches whose rows are numbered consecutively."""
    starts = np.cumsum([0, *map(len, batches)])
    cuts = np.searchsorted(rows, starts)
    parts = [
        batch.take(rows[first:last] - start)
        for batch, start, first, last in zip(batches, starts, cuts, cuts[1:], strict=False)
        if last > first
    ]
    return FeatureBatch.concat(parts)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
