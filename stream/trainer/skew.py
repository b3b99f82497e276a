"""Skew: whether impressions carry the features that they were scored with.

An impression that was scored names the version and the score. The trainer reads the impression's features, and can score them
again with the same version. Both scores are equal when the scoring service and the sender of impressions send the same
features. They differ when one of the two sends a feature in another unit, with a default, not at all, or as it was at another
time. Then the features that are learned aren't those that are served, and no other metric shows it.

    training thread ── a sample of rows ──▶ waiting ──▶ every second, in another thread: score again, compare logits

Only the weights of versions can be read again. A scorer that follows a chain answers with `model_version` and `delta`, the
number of deltas since that version. So an impression is compared if its answer came from the very point of the chain at which
some version was captured: for 250 ms after each version, with the default interval of deltas. An impression without `delta`,
from a producer that doesn't send it, is compared if its version is no point of a chain: then there are no deltas.

For that, one version is read from the store and kept in memory: the one that most of the waiting rows were scored with. After
`RELOAD_S` another version may replace it. Rows of other versions wait, up to a bound, and are then dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.batch import FeatureBatch
from model.errors import ModelError
from model.migration import moved_dense
from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.errors import SnapshotCorrupt, SnapshotError
from state.registry import VersionRecord
from state.store import SnapshotStore
from stream.trainer.columns import ExampleColumns
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.schemas import comparable

__all__ = ["BOUND", "Skew", "SkewCheck", "load_reference"]

log = logging.getLogger(__name__)

# Rows sampled a second, and the least that is taken at once: some 0.1 ms of the training thread each time.
ROWS_S, TAKEN_AT_ONCE = 100, 16
# Rows that wait for their version: 40 s of the above, some 2 MB at 40 fields.
MAX_WAITING = 4_000
# How often waiting rows are compared, and how often another version may be read: once a minute. A large version is read so
# seldom that reading takes at most a hundredth of the time (40 MB of weights: 0.8 s of CPU).
EVERY_S, RELOAD_S, RELOAD_SHARE = 1.0, 60.0, 0.01
# Larger weights are not read: the trainer's memory would hold them three times while they are made ready.
MAX_BYTES = 1 << 30
# How many compared rows count for the figures, and for how long.
WINDOW, KEEP_S = 2_000, 900.0
# A larger difference of logits doesn't come from arithmetic: with equal features logits differ by less than 0.001 (other
# batches, 8 digits of a score, a GPU on one side). 0.02 is 2 % of the odds.
BOUND = 0.02
# Scores have 8 digits after the point. Below this score, rounding alone would move a logit by more than 0.0005.
CLIP = 1e-5


@dataclass(frozen=True, slots=True)
class Skew:
    """Differences of served and recomputed logits: mean and 99th percentile of their size, and the share beyond `BOUND`."""

    examples: int
    mean: float
    p99: float
    share: float


class _Reference(NamedTuple):
    """The version in memory."""

    version: int
    predictor: Predictor


class _Compared(NamedTuple):
    """Differences of the logits of some rows, and when they were compared (monotonic)."""

    at_s: float
    differences: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that carry the score of a version."""

    batch: FeatureBatch
    versions: npt.NDArray[np.int64]
    served: npt.NDArray[np.float32]


class SkewCheck:
    """Observes training. `observe` is for the training thread, `check` for one other, the rest for any.

        skew = SkewCheck(load, registry.version_that_scored, metrics)
        skew.observe(batch, scores)
        skew.check(time.monotonic())
        skew.figures()

    Args:
        load: reads a version to score with. Raises SnapshotError when it can't.
        scored_by: gives the version whose weights an answer came from, by the answer's `model_version` and `delta` (-1 where it
            isn't known); None where there is none. The training thread calls it.
        as_served: gives the features as scorers read them: with the values of `serve_as`, not those that impressions carry.
    """

    def __init__(
        self,
        load: Callable[[int], Predictor],
        scored_by: Callable[[int, int], int | None],
        metrics: TrainerMetrics,
        *,
        as_served: Callable[[FeatureBatch], FeatureBatch] = lambda batch: batch,
    ) -> None:
        self._load, self._scored_by, self._metrics, self._as_served = load, scored_by, metrics, as_served
        self._lock = threading.Lock()
        self._waiting: deque[_Rows] = deque()
        self._rows = 0
        self._allowed, self._since_s = 0.0, time.monotonic()
        self._reference: _Reference | None = None
        self._unreadable: set[int] = set()
        self._loads_from_s = 0.0
        self._compared: deque[_Compared] = deque()
        self._reported = False

    def observe(self, batch: ExampleColumns, scores: npt.NDArray[np.float32]) -> None:
        """Take a few rows that carry the score of a version, to be compared later."""
        now_s = time.monotonic()
        self._allowed = min(self._allowed + (now_s - self._since_s) * ROWS_S, 2.0 * ROWS_S)
        self._since_s = now_s
        if self._allowed < TAKEN_AT_ONCE:
            return
        there = np.isfinite(batch.served) & (batch.versions >= 0)
        versions = self._versions_that_scored(batch, there)
        there &= versions >= 0
        if batch.corrects is not None:
            there &= ~batch.corrects  # the first label was taken before
        at = np.flatnonzero(there)[: int(self._allowed)]
        if not len(at):
            return
        self._allowed -= len(at)
        with self._lock:
            self._waiting.append(_Rows(batch.batch.take(at), versions[at], batch.served[at]))
            self._rows += len(at)
            while self._rows > MAX_WAITING:
                self._rows -= len(self._waiting.popleft().served)

    def _versions_that_scored(self, batch: ExampleColumns, there: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """The version whose weights gave each score, int64 (B,); -1 where there is none, and where `there` (B,) is False."""
        found = np.full(len(batch), -1, np.int64)
        answers, which = np.unique(np.stack((batch.versions[there], batch.deltas[there]), 1), axis=0, return_inverse=True)
        scored = [self._scored_by(version, delta) for version, delta in answers.tolist()]
        found[there] = np.array([-1 if each is None else each for each in scored], np.int64)[which.reshape(-1)]
        return found

    async def run(self) -> None:
        """Compare what waits, until cancelled. A failure is logged and never ends the trainer."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await asyncio.to_thread(self.check, time.monotonic())
            except Exception:
                log.exception("served scores could not be compared")

    def check(self, now_s: float) -> None:
        """Score again the rows of the version in memory, and read another version when it is time."""
        with self._lock:
            taken, self._rows = list(self._waiting), 0
            self._waiting.clear()
        if not taken:
            self._forget(now_s)
            return
        rows = _Rows(
            FeatureBatch.concat([each.batch for each in taken]),
            np.concatenate([each.versions for each in taken]),
            np.concatenate([each.served for each in taken]),
        )
        if now_s >= self._loads_from_s:
            self._choose(rows, now_s)
        left = np.ones(len(rows.served), np.bool_)
        if self._reference is not None:
            mine = rows.versions == self._reference.version
            if mine.any():
                at = np.flatnonzero(mine)
                recomputed = self._reference.predictor.predict(self._as_served(rows.batch.take(at)))
                self._compared.append(_Compared(now_s, _logits(rows.served[at]) - _logits(recomputed)))
                self._metrics.skew_checked.inc(len(at))
                left &= ~mine
        self._forget(now_s)
        self._report()
        at = np.flatnonzero(left)
        if len(at):
            with self._lock:
                self._waiting.appendleft(_Rows(rows.batch.take(at), rows.versions[at], rows.served[at]))
                self._rows += len(at)

    def figures(self) -> Skew | None:
        """The figures of the rows compared lately; None when there are none."""
        parts = [each.differences for each in list(self._compared)]
        if not parts:
            return None
        size = np.abs(np.concatenate(parts))
        return Skew(len(size), float(size.mean()), float(np.quantile(size, 0.99)), float((size > BOUND).mean()))

    def manifest_metrics(self) -> Mapping[str, float]:
        """The figures, under their names in a version's metrics."""
        skew = self.figures()
        if skew is None:
            return {}
        return {
            "skew_examples": skew.examples,
            "skew_logit_mean": skew.mean,
            "skew_logit_p99": skew.p99,
            "skew_share": skew.share,
        }

    def _choose(self, rows: _Rows, now_s: float) -> None:
        """Load the version that most rows were scored with. The one in memory is dropped first: there is one at a time."""
        counts = Counter(rows.versions.tolist())
        for version in self._unreadable & counts.keys():
            del counts[version]
        if not counts:
            return
        [(version, _)] = counts.most_common(1)
        self._loads_from_s = now_s + RELOAD_S
        if self._reference is not None and self._reference.version == version:
            return
        self._reference = None
        began = time.monotonic()
        try:
            self._reference = _Reference(version, self._load(version))
        except (SnapshotError, ModelError, ValueError) as error:
            self._unreadable.add(version)
            self._metrics.skew_failures.inc()
            log.warning("scores of version %d can't be computed again: %s", version, error)
        self._loads_from_s = now_s + max(RELOAD_S, (time.monotonic() - began) / RELOAD_SHARE)

    def _forget(self, now_s: float) -> None:
        """Drop all but the newest `WINDOW` rows of the last `KEEP_S`."""
        rows = sum(len(each.differences) for each in self._compared)
        while self._compared:
            oldest = self._compared[0]
            if now_s - oldest.at_s <= KEEP_S and rows - len(oldest.differences) < WINDOW:
                return
            rows -= len(oldest.differences)
            self._compared.popleft()

    def _report(self) -> None:
        skew = self.figures()
        if skew is None:
            return
        self._metrics.skewed(skew.examples, skew.mean, skew.p99, skew.share)
        found = skew.examples >= 100 and skew.share > 0.01
        if found and not self._reported:
            log.error(
                "skew: %.0f %% of %d served scores aren't what their version computes from the features of their impressions "
                "(99 %% of logits within %.3g). Scoring service and impressions differ in a feature: `headrace doctor`",
                *(100 * skew.share, skew.examples, skew.p99),
            )
        self._reported = found


def load_reference(
    store: SnapshotStore, version: int, schema: FeatureSchema, *, announced: VersionRecord | None = None
) -> Predictor:
    """Read a version to score with, as scorers do, on the CPU.

    Args:
        schema: the trainer's. Rows are hashed by it. A version of another schema can score them if that has fewer fields only.
        announced: the version's record in the registry. The same number in another store is another version.

    Raises:
        SnapshotError: it is missing, broken, too large, or of another schema.
    """
    manifest = store.manifest(version)
    if announced is not None and announced.created_at_ms != manifest.created_at_ms:
        raise SnapshotCorrupt(f"version {version}: expected the one announced, found another of that number in {store.url}.")
    change = comparable(manifest, schema)
    if not change.serves_alike:
        raise SnapshotCorrupt(
            f"version {version}: expected the trainer's values of serve_as, found: {'; '.join(change.explained())}"
        )
    size = manifest.serving_size
    if size > MAX_BYTES:
        raise SnapshotCorrupt(f"version {version}: expected at most {MAX_BYTES:,} bytes of weights, found {size:,}.")
    settings = ModelSettings.of_version(manifest.model)
    return Predictor.of(
        schema,
        settings,
        moved_dense(change, store.serving(version), settings),
        device="cpu",
        negative_rate=manifest.negative_rate,
    )


def _logits(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    clipped = np.clip(scores.astype(np.float64), CLIP, 1 - CLIP)
    return np.log(clipped) - np.log1p(-clipped)
