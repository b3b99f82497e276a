"""A run of `examples` → columns: features from the values, labels, weights and event times from the headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from model.features import FeatureBatch, FeatureDecoder
from model.hashing import hash_strings, space_seed
from model.schema import FeatureSchema
from stream.kafka.transport import Run
from stream.records.dead_letter import DeadLetter
from stream.records.example import read_examples
from stream.records.join_notes import is_note
from stream.records.record import Record

__all__ = ["BoolArray", "DecodedRun", "ExampleDecoder", "Float32Array", "Float64Array", "Int64Array", "hash_ids"]

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Space of the hashes of impression ids. Another name would draw other samples.
_ID_SPACE = "impression id"


@dataclass(frozen=True, slots=True)
class DecodedRun:
    """The usable examples of a run, N of them, in the order of the log, and the records that can't be used.

    offsets        int64 (N,)    in the partition, ascending
    labels         float32 (N,)  1 clicked, 0 not
    weights        float32 (N,)  importance
    impression_ms  int64 (N,)    event time
    reached_ms     int64 (N,)    the earlier of event time and the example's arrival in Kafka; the watermark is the largest of
                                 these, so an event time in the future doesn't move it into the future
    served         float32 (N,)  the score that the impression was shown with, NaN where absent
    versions       int64 (N,)    the version of the model that gave that score, -1 where absent
    deltas         int64 (N,)    number of deltas since that version that the weights contained, -1 where absent
    id_hashes      int64 (N,)    hash of the impression id (`hash_ids`)
    rates          float64 (N,)  share of negatives that the join sent at the time of this example; None when it sent all
    corrects       bool (N,)     whether the example is a correction, which takes back the opposite label sent before; None when
                                 none is
    arrived_ms     int64 (N,)    when the click arrived in Kafka, -1 where there is none or that isn't known; None when it is
                                 known of none
    shadow_scores    float32 (N,)  the score that a version on trial gave beside, NaN where absent; None when all are
    shadow_versions  int64 (N,)    that version, -1 where absent; None when all are
    records        the examples as they were read, N of them
    after          the partition's position after the run; bad records and transaction markers are counted, too
    """

    partition: int
    after: int
    batch: FeatureBatch
    offsets: Int64Array
    labels: Float32Array
    weights: Float32Array
    impression_ms: Int64Array
    reached_ms: Int64Array
    served: Float32Array
    versions: Int64Array
    deltas: Int64Array
    id_hashes: Int64Array
    letters: list[DeadLetter]
    records: Sequence[Record]
    rates: Float64Array | None = None
    corrects: BoolArray | None = None
    arrived_ms: Int64Array | None = None
    shadow_scores: Float32Array | None = None
    shadow_versions: Int64Array | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, kept: BoolArray) -> DecodedRun:
        """The run with those examples only that `kept` (N,) says. Its end and its dead letters stay."""
        return replace(
            self,
            batch=self.batch.take(np.flatnonzero(kept)),
            offsets=self.offsets[kept],
            labels=self.labels[kept],
            weights=self.weights[kept],
            impression_ms=self.impression_ms[kept],
            reached_ms=self.reached_ms[kept],
            served=self.served[kept],
            versions=self.versions[kept],
            deltas=self.deltas[kept],
            id_hashes=self.id_hashes[kept],
            records=list(compress(self.records, kept)),
            rates=None if self.rates is None else self.rates[kept],
            corrects=None if self.corrects is None else self.corrects[kept],
            arrived_ms=None if self.arrived_ms is None else self.arrived_ms[kept],
            shadow_scores=None if self.shadow_scores is None else self.shadow_scores[kept],
            shadow_versions=None if self.shadow_versions is None else self.shadow_versions[kept],
        )


class ExampleDecoder:
    """Decodes runs for one schema. For one thread."""

    def __init__(self, schema: FeatureSchema) -> None:
        self._features = FeatureDecoder(schema)

    def decode(self, run: Run) -> DecodedRun:
        """Columns of a run. Bad records become dead letters (reason codes of `stream.records.dead_letter`), never errors.

        Records that the join writes for itself (`stream.records.join_notes`) are skipped.
        """
        columns = read_examples([record for record in run.records if record.key is not None or not is_note(record)])
        records, letters = columns.records, columns.letters
        decoded = self._features.impressions([record.value for record in records], columns.impression_ms)
        letters.extend(DeadLetter.of(records[bad.index], bad.reason, bad.path, bad.message) for bad in decoded.bad)
        letters.sort(key=lambda letter: letter.offset)
        rows = decoded.rows
        has_shadow = bool((decoded.shadow_version >= 0).any())
        offsets = np.fromiter((record.offset for record in records), np.int64, len(records))
        arrivals = np.fromiter((record.timestamp for record in records), np.int64, len(records))
        return DecodedRun(
            partition=run.partition,
            after=run.after,
            batch=decoded.batch,
            offsets=offsets[rows],
            labels=columns.labels[rows],
            weights=columns.weights[rows],
            impression_ms=columns.impression_ms[rows],
            reached_ms=np.minimum(columns.impression_ms, arrivals)[rows],
            served=decoded.served_score,
            versions=decoded.served_version,
            deltas=decoded.served_delta,
            id_hashes=hash_ids([record.key for record in records])[rows],
            letters=letters,
            records=records if len(rows) == len(records) else [records[row] for row in rows.tolist()],
            rates=None if columns.rates is None else columns.rates[rows],
            corrects=None if columns.corrects is None else columns.corrects[rows],
            arrived_ms=None if columns.arrived_ms is None else columns.arrived_ms[rows],
            shadow_scores=decoded.shadow_score if has_shadow else None,
            shadow_versions=decoded.shadow_version if has_shadow else None,
        )


def hash_ids(ids: Sequence[bytes | None]) -> Int64Array:
    """A 64-bit hash of each impression id, as int64 (N,): samples of impressions are drawn by it.

    The same id has the same hash in every process, so a first label and its correction fall into the same sample. The join
    leaves out negatives by another hash, so such a sample isn't biased by what was left out.
    """
    if not ids:
        return np.empty(0, np.int64)
    column = pa.array([b"" if each is None else each for each in ids], pa.binary())
    return hash_strings(column, np.full(len(ids), space_seed(_ID_SPACE), np.uint64))
