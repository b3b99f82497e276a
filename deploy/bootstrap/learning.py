"""Trains on history by the trainer's own code, with checkpoints from which a run goes on bit for bit after kill -9.

A checkpoint is a version in a store of its own: a local folder. Its offset is the row of the data set to go on at.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from deploy.bootstrap.reader import Columns, HistoryReader, Records
from deploy.bootstrap.source import Source
from deploy.errors import DataSetError
from model.learner import Learner
from model.rows import RowPrecision
from model.settings import ModelSettings
from model.table_settings import TableSettings
from state.errors import SnapshotError
from state.history import History
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.records.dead_letter import DeadLetter
from stream.trainer.batching import BatchCutter
from stream.trainer.bookkeeping import State, from_json, to_json
from stream.trainer.captured import CapturedVersion
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import DecodedRun, hash_ids
from stream.trainer.manifests import new_manifest, write_captured
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.start import Start, restore
from stream.trainer.training import Training

__all__ = ["Checkpoints", "Progress", "Run", "as_run"]

log = logging.getLogger(__name__)

# Whole checkpoints that are kept: if the newest can't be read, the run goes on from the one before.
KEPT = 2
# How often progress is reported.
SHOWN_S = 0.2
# Impressions that were set aside whose ids are kept for the report.
NAMED = 100

OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    examples   impressions learned, those before a restart included
    total      about how many there are; None where that isn't known
    per_s      impressions learned a second since this process began
    """

    examples: int
    total: int | None
    per_s: float


class SetAside:
    """Counts impressions that couldn't be learned. As a part of the bookkeeping it is saved with checkpoints."""

    def __init__(self) -> None:
        self.count = 0
        self.ids: list[str] = []

    def add(self, letters: list[DeadLetter]) -> None:
        """Count impressions that training has set aside."""
        self.count += len(letters)
        room = max(0, NAMED - len(self.ids))
        self.ids += [(letter.key or b"").decode() for letter in letters[:room]]

    def state(self) -> State:
        return {"set_aside": to_json((self.count, self.ids))}

    def restore(self, state: State) -> None:
        self.count, self.ids = from_json(state.get("set_aside"), tuple[int, list[str]])


class Checkpoints:
    """Versions of one run in a local folder. Its name is the run's fingerprint, so no other run goes on from them."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint
        self._store = SnapshotStore(SnapshotSettings(url=str(self.folder)))
        self._writing: threading.Thread | None = None
        self._failed: BaseException | None = None

    def newest(self, new: Callable[[], Learner]) -> tuple[Learner, Start]:
        """A learner with the newest checkpoint that is whole; one that begins from nothing if there is none.

        Args:
            new: makes a learner. One that a damaged checkpoint was put into can't be used any more.
        """
        for version in reversed(self._store.versions()):
            learner = new()
            try:
                manifest = self._store.manifest(version)
                return learner, Start(manifest, version, restore(learner, self._store, Start(manifest, version)))
            except SnapshotError as error:
                log.warning("passing over checkpoint %d: %s", version, error)
        return new(), Start(None, 0)

    def write(self, manifest: Callable[[int], Manifest], captured: CapturedVersion, source: Source) -> None:
        """Write a checkpoint in a thread, and delete old ones. To be called once the one before is written."""

        def work() -> None:
            try:
                write_captured(self._store, manifest(self._store.next_version()), captured, source.schema)
                for old in self._store.versions()[:-KEPT]:
                    self._store.delete(old)
            except BaseException as error:
                self._failed = error
            finally:
                captured.frozen.close()

        self._writing = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._writing.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and self._writing.is_alive()

    def wait(self) -> None:
        """Wait until everything is written. Raises SnapshotError: the last one could not be written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def delete(self) -> None:
        """Delete all of them, once the version is published."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Run:
    """One run of training on history, from its newest checkpoint on.

        run = Run(source, model, Checkpoints(folder, fingerprint))
        if run.learn(on_progress=show):
            captured = run.capture()

    Args:
        window: examples in the metrics' window, as `trainer.metrics_window`.
        checkpoint_s: seconds between two checkpoints.
    """

    def __init__(
        self,
        source: Source,
        model: ModelSettings,
        checkpoints: Checkpoints,
        *,
        table: TableSettings | None = None,
        device: str = "auto",
        row_precision: RowPrecision = "float32",
        window: int = 50_000,
        threads: int = 0,
        checkpoint_s: float = 60.0,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._source, self._model, self._checkpoints = source, model, checkpoints
        self._row_precision: RowPrecision = row_precision
        self._checkpoint_s = checkpoint_s
        self._stopping = False
        learner, start = checkpoints.newest(
            lambda: Learner(source.schema, model, table=table, device=device, row_precision=row_precision)
        )
        self.resumed_at = start.offsets.get(0, 0)
        """Row at which this run went on; 0 if it began from nothing."""
        self.learned_s = 0.0
        """Seconds that `learn` took to the end of its last batch."""
        self.set_aside = SetAside()
        self.evaluation = Evaluation(window)
        self.training = Training(
            learner,
            BatchCutter(model.batch_rows, {0: self.resumed_at}),
            self.evaluation,
            TrainerMetrics(CollectorRegistry()),
            max_batch_age_s=0.0,
            watermark_ms=start.watermark_ms,
            bookkeeping={"bootstrap": self.set_aside},
        )
        self.training.restore(start.bookkeeping)

    def stop(self) -> None:
        """Let `learn` end after the batch under way, with a checkpoint."""
        self._stopping = True

    def learn(self, on_progress: OnProgress | None = None) -> bool:
        """Learn to the end, and write the last checkpoint. Returns False if `stop` has ended it before.

        Raises:
            DataSetError: the data set can't be read, or the pipeline would reject something in it.
            SnapshotError: a checkpoint can't be written.
        """
        training = self.training
        first, began_s = training.examples_seen, time.monotonic()
        checkpoint_s, shown_s = began_s + self._checkpoint_s, began_s
        with HistoryReader(self._source, first_row=self.resumed_at) as reader:
            for columns in reader:
                training.add(as_run(columns, self._source.name))
                while not self._stopping and self._step(more_at_hand=True):
                    now_s = time.monotonic()
                    if on_progress is not None and now_s >= shown_s:
                        shown_s, done = now_s + SHOWN_S, training.examples_seen
                        on_progress(Progress(done, reader.total, (done - first) / max(now_s - began_s, 1e-9)))
                    if now_s >= checkpoint_s and not self._checkpoints.busy:
                        self._write_checkpoint()
                        checkpoint_s = time.monotonic() + self._checkpoint_s
                if self._stopping:
                    break
        while not self._stopping and self._step(more_at_hand=False):
            pass  # the last batch isn't full
        self.learned_s = time.monotonic() - began_s
        self._write_checkpoint()
        self._checkpoints.wait()
        if not training.examples_seen and not self._stopping:
            raise DataSetError(
                f"{self._source.name}: expected at least one impression to learn from, found none. Check --until."
            )
        return not self._stopping

    def capture(self) -> CapturedVersion:
        """What has been learned, as a version holds it."""
        return self.training.capture_version()

    def history(self, fingerprint: str) -> History:
        """What was learned, as the manifest says it."""
        path = self._source.path
        name = self._source.name if path is None else f"{path.name} ({self._source.name})"
        return History(
            source=name,
            examples=self.training.examples_seen,
            until_ms=self.training.watermark_ms,
            fingerprint=fingerprint,
        )

    def manifest(self, captured: CapturedVersion, version: int) -> Manifest:
        """The manifest of a checkpoint."""
        return new_manifest(
            captured,
            version=version,
            parent=None,
            epoch=0,
            point=None,
            metrics={},
            topic_ids={},
            row_precision=self._row_precision,
            schema=self._source.schema,
            model=self._model,
        )

    def _step(self, *, more_at_hand: bool) -> bool:
        if not self.training.step(0.0, more_at_hand=more_at_hand):
            return False
        if letters := self.training.take_set_aside():
            self.set_aside.add(letters)
        return True

    def _write_checkpoint(self) -> None:
        self._checkpoints.wait()  # a learner is frozen for one version at a time
        captured = self.capture()
        self._checkpoints.write(lambda version: self.manifest(captured, version), captured, self._source)


def as_run(columns: Columns, source: str) -> DecodedRun:
    """Impressions of history as a run of examples whose labels are final."""
    rows = len(columns)
    return DecodedRun(
        partition=0,
        after=columns.first_row + rows,
        batch=columns.batch,
        offsets=np.arange(columns.first_row, columns.first_row + rows),
        labels=columns.clicked.astype(np.float32),
        weights=np.ones(rows, np.float32),
        impression_ms=columns.times_ms,
        reached_ms=columns.times_ms,
        served=np.full(rows, np.nan, np.float32),
        versions=np.full(rows, -1, np.int64),
        deltas=np.full(rows, -1, np.int64),
        id_hashes=hash_ids([name.encode() for name in columns.ids]),
        letters=[],
        records=Records(source, columns.first_row, columns.ids, columns.times_ms),
    )
