"""Skew: whether impressions carry the features that they were scored with.

An impression that was scored says by which version and with what score. The trainer reads the impression's features, and it can
score them again with the same version. Both scores are the same when the scoring service and whoever sends impressions agree.
They differ where one of the two sends a feature in another unit, with a default, not at all, or as it was at another time. Then
what is learned isn't what is served, and no other metric says so.

    training thread ── a sample of rows ──▶ waiting ──▶ every second, in another thread: score again, compare logits

One version is in memory for that, read from the store: the one that most of the waiting rows were scored with. Another one
takes its place after `RELOAD_S`. Rows of other versions wait, up to a bound, and then fall out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.batch import FeatureBatch
from model.errors import ModelError
from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.errors import SnapshotCorrupt, SnapshotError
from state.manifest import SERVING_FILE
from state.registry import VersionRecord
from state.store import SnapshotStore
from stream.trainer.batching import TrainingBatch
from stream.trainer.metrics import TrainerMetrics

__all__ = ["BOUND", "Skew", "SkewCheck", "load_reference"]

log = logging.getLogger(__name__)

# Rows sampled a second, and gathered before a few are taken at once: some 0.1 ms of the training thread each time.
ROWS_S, TAKEN_AT_ONCE = 100, 16
# Rows that wait for their version: 40 s of the above, some 2 MB at 40 fields.
MAX_WAITING = 4_000
# How often waiting rows are looked at, and another version may be read: once a minute, large ones so seldom that reading takes
# at most a hundredth of the time (40 MB of weights: 0.8 s of CPU).
EVERY_S, RELOAD_S, RELOAD_SHARE = 1.0, 60.0, 0.01
# Weights beyond this are not read: they would stand in the trainer's memory three times while they are made ready.
MAX_BYTES = 1 << 30
# Compared rows that the figures are of, and for how long they count.
WINDOW, KEEP_S = 2_000, 900.0
# A difference of logits beyond this isn't one of arithmetic: equal features differ by less than 0.001 (other batches, 8 digits
# of a score, a GPU on one side). 0.02 is 2 % of the odds.
BOUND = 0.02
# Scores have 8 digits after the point: below this, rounding alone would move a logit by more than 0.0005.
CLIP = 1e-5


@dataclass(frozen=True, slots=True)
class Skew:
    """Differences of served and recomputed logits: mean and 99th percentile of their size, and the share beyond `BOUND`."""

    examples: int
    mean: float
    p99: float
    share: float


@dataclass(frozen=True, slots=True)
class _Rows:
    batch: FeatureBatch
    versions: npt.NDArray[np.int64]
    served: npt.NDArray[np.float32]


class SkewCheck:
    """Observes training. `observe` is for the training thread, `check` for one other, the rest for any.

        skew = SkewCheck(lambda version: load_reference(store, version, schema), metrics)
        skew.observe(batch, scores)
        skew.check(time.monotonic())
        skew.figures()

    Args:
        load: reads a version to score with; raises SnapshotError when it can't.
    """

    def __init__(self, load: Callable[[int], Predictor], metrics: TrainerMetrics) -> None:
        self._load, self._metrics = load, metrics
        self._lock = threading.Lock()
        self._waiting: deque[_Rows] = deque()
        self._rows = 0
        self._allowed, self._since_s = 0.0, time.monotonic()
        self._reference: tuple[int, Predictor] | None = None
        self._unreadable: set[int] = set()
        self._loads_from_s = 0.0
        self._compared: deque[tuple[float, npt.NDArray[np.float64]]] = deque()
        self._told = False

    def observe(self, batch: TrainingBatch, scores: npt.NDArray[np.float32]) -> None:
        """Put a few rows that carry a served score aside."""
        now_s = time.monotonic()
        self._allowed = min(self._allowed + (now_s - self._since_s) * ROWS_S, 2.0 * ROWS_S)
        self._since_s = now_s
        if self._allowed < TAKEN_AT_ONCE:
            return
        there = np.isfinite(batch.served) & (batch.versions >= 0)
        if batch.corrects is not None:
            there &= ~batch.corrects  # its first label was here before
        at = np.flatnonzero(there)[: int(self._allowed)]
        if not len(at):
            return
        self._allowed -= len(at)
        with self._lock:
            self._waiting.append(_Rows(batch.batch.take(at), batch.versions[at], batch.served[at]))
            self._rows += len(at)
            while self._rows > MAX_WAITING:
                self._rows -= len(self._waiting.popleft().served)

    async def run(self) -> None:
        """Compare what waits, for ever. Nothing that fails here is worth a trainer."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await asyncio.to_thread(self.check, time.monotonic())
            except Exception:
                log.exception("served scores could not be compared")

    def check(self, now_s: float) -> None:
        """Score again what waits for the version in memory, and read another version when it is time."""
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
            version, predictor = self._reference
            mine = rows.versions == version
            if mine.any():
                at = np.flatnonzero(mine)
                recomputed = predictor.predict(rows.batch.take(at))
                self._compared.append((now_s, _logits(rows.served[at]) - _logits(recomputed)))
                self._metrics.skew_checked.inc(len(at))
                left &= ~mine
        self._forget(now_s)
        self._tell()
        at = np.flatnonzero(left)
        if len(at):
            with self._lock:
                self._waiting.appendleft(_Rows(rows.batch.take(at), rows.versions[at], rows.served[at]))
                self._rows += len(at)

    def figures(self) -> Skew | None:
        """Of the rows compared lately; None without any."""
        parts = [part for _, part in list(self._compared)]
        if not parts:
            return None
        size = np.abs(np.concatenate(parts))
        return Skew(len(size), float(size.mean()), float(np.quantile(size, 0.99)), float((size > BOUND).mean()))

    def manifest_metrics(self) -> Mapping[str, float]:
        """As a version's metrics carry them."""
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
        """Take the version that most rows were scored with. The one in memory is let go of first: there is one at a time."""
        counts = Counter(rows.versions.tolist())
        for version in self._unreadable & counts.keys():
            del counts[version]
        if not counts:
            return
        [(version, _)] = counts.most_common(1)
        self._loads_from_s = now_s + RELOAD_S
        if self._reference is not None and self._reference[0] == version:
            return
        self._reference = None
        began = time.monotonic()
        try:
            self._reference = (version, self._load(version))
        except (SnapshotError, ModelError, ValueError) as error:
            self._unreadable.add(version)
            self._metrics.skew_failures.inc()
            log.warning("scores of version %d can't be computed again: %s", version, error)
        self._loads_from_s = now_s + max(RELOAD_S, (time.monotonic() - began) / RELOAD_SHARE)

    def _forget(self, now_s: float) -> None:
        """Keep the newest `WINDOW` rows, of the last `KEEP_S`."""
        rows = sum(len(part) for _, part in self._compared)
        while self._compared and (now_s - self._compared[0][0] > KEEP_S or rows - len(self._compared[0][1]) >= WINDOW):
            rows -= len(self._compared.popleft()[1])

    def _tell(self) -> None:
        skew = self.figures()
        if skew is None:
            return
        self._metrics.skewed(skew.examples, skew.mean, skew.p99, skew.share)
        found = skew.examples >= 100 and skew.share > 0.01
        if found and not self._told:
            log.error(
                "skew: %.0f %% of %d served scores aren't what their version computes from the features of their impressions "
                "(99 %% of logits within %.3g). Scoring service and impressions differ in a feature: `headrace doctor`",
                *(100 * skew.share, skew.examples, skew.p99),
            )
        self._told = found


def load_reference(
    store: SnapshotStore, version: int, schema: FeatureSchema, *, announced: VersionRecord | None = None
) -> Predictor:
    """Read a version to score with, as scorers do; on the CPU, beside training.

    Args:
        schema: the trainer's. Rows are hashed by it, so a version of another one can't score them.
        announced: what the registry says of the version; the same number in another store is another version.

    Raises:
        SnapshotError: it is missing, broken, too large, or of another schema.
    """
    manifest = store.manifest(version)
    if announced is not None and announced.created_at_ms != manifest.created_at_ms:
        raise SnapshotCorrupt(f"version {version}: expected the one announced, found another of that number in {store.url}.")
    if manifest.schema_hash != schema.fingerprint():
        raise SnapshotCorrupt(f"version {version}: expected the trainer's feature schema, found another.")
    entry = manifest.files.get(SERVING_FILE)
    if entry is not None and entry.size > MAX_BYTES:
        raise SnapshotCorrupt(f"version {version}: expected at most {MAX_BYTES:,} bytes of weights, found {entry.size:,}.")
    return Predictor(
        schema,
        ModelSettings.model_validate(manifest.model),
        store.serving(version),
        device="cpu",
        negative_rate=manifest.negative_rate,
    )


def _logits(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    clipped = np.clip(scores.astype(np.float64), CLIP, 1 - CLIP)
    return np.log(clipped) - np.log1p(-clipped)
