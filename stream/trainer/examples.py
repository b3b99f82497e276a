"""A run of `examples` → columns: features from the values, labels, weights and event times from the headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from model.features import FeatureDecoder
from model.hashing import hash_strings, space_seed
from model.schema import FeatureSchema
from stream.kafka.transport import Run
from stream.records.dead_letter import DeadLetter
from stream.records.example import read_examples
from stream.records.join_notes import is_note
from stream.trainer.columns import BoolArray, ExampleColumns, Float32Array, Int64Array

__all__ = ["DecodedRun", "ExampleDecoder", "hash_ids"]

# Space of the hashes of impression ids. Another name would draw other samples.
_ID_SPACE = "impression id"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRun(ExampleColumns):
    """The usable examples of a run, in the order of the log, and the records that can't be used.

    after          the partition's position after the run; bad records and transaction markers are counted, too
    offsets        int64 (N,)  in the partition, ascending
    """

    partition: int
    after: int
    offsets: Int64Array
    weights: Float32Array
    letters: list[DeadLetter]

    def take(self, kept: BoolArray) -> DecodedRun:
        """The run with those examples only that `kept` (N,) says. Its end and its dead letters stay."""
        return replace(self, offsets=self.offsets[kept], **self._kept(kept))


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
