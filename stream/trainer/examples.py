"""A run of `examples` → columns: features from the values, labels, weights and event times from the headers.

Headers are checked a column at a time. Only when a column doesn't pass is each record looked at, to find the bad ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from model.features import FeatureBatch, FeatureDecoder
from model.hashing import hash_strings, space_seed
from model.schema import FeatureSchema
from stream.join.events import MAX_TIMESTAMP_MS
from stream.kafka.transport import Run
from stream.records.dead_letter import DeadLetter

__all__ = ["DecodedRun", "ExampleDecoder", "hash_ids"]

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Headers = dict[str, bytes]

# The headers of records, without a key, that are no examples (`stream.records.example`).
NO_EXAMPLES = (("kind", b"left_out"), ("kind", b"matched"))
# 18 digits always fit an int64. Milliseconds up to the end of year 9999, which the join takes (`stream.join.events`), have 15.
MAX_DIGITS = 18
# What an example may be; one without the header counts as `first`.
KINDS = frozenset((b"first", b"correction", b"replay"))
# Space of the hashes of impression ids; another name would draw other samples.
_ID_SPACE = "impression id"
# An example of this weight counts as so many. Adagrad keeps the squares: a row that has seen one of weight 10,000 learns as one
# that has seen a hundred million examples from then on, hardly at all.
MAX_WEIGHT = 10_000.0
# A negative sent at this rate may weigh 10,000 as well, for the same reason; `join.negative_rate` has the same bound.
MIN_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class DecodedRun:
    """The usable examples of a run, N of them, in the order of the log, and the records that can't be used.

    offsets        int64 (N,)    in the partition, ascending
    labels         float32 (N,)  1 clicked, 0 not
    weights        float32 (N,)  importance
    impression_ms  int64 (N,)    event time
    reached_ms     int64 (N,)    event time, but none after the example's arrival: what a watermark may go by
    served         float32 (N,)  the score that the impression was shown with, NaN where absent
    versions       int64 (N,)    the version of the model that gave that score, -1 where absent
    id_hashes      int64 (N,)    hash of the impression id (`hash_ids`)
    rates          float64 (N,)  share of negatives that went out when this example did; None where all did
    corrects       bool (N,)     takes back the label that went out before, which was the other one; None where none does
    records        the examples as they were read, N of them
    after          the partition's position after the run, beyond bad records and transaction markers too
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
    id_hashes: Int64Array
    letters: list[DeadLetter]
    records: Sequence[Any]
    rates: Float64Array | None = None
    corrects: BoolArray | None = None

    def __len__(self) -> int:
        return len(self.offsets)


class _Columns(NamedTuple):
    """Of all records, before their features are looked at."""

    labels: Float32Array
    weights: Float32Array
    impression_ms: Int64Array
    rates: Float64Array | None
    corrects: BoolArray | None


class _BadHeader(Exception):
    """A header that is missing or isn't what the contract says."""

    def __init__(self, reason: str, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}" if name == "key" else f"header {name}: {message}")
        self.reason = reason
        self.path = name if name == "key" else f"headers.{name}"


class ExampleDecoder:
    """Decodes runs for one schema. For one thread."""

    def __init__(self, schema: FeatureSchema) -> None:
        self._features = FeatureDecoder(schema)

    def decode(self, run: Run) -> DecodedRun:
        """Columns of a run. Bad records become dead letters (reason codes of `stream.records.dead_letter`), never errors.

        Records of the join's own bookkeeping (`stream.records.example`) are no examples and are passed over.
        """
        records: Sequence[Any] = [record for record in run.records if record.key is not None or not _is_bookkeeping(record)]
        letters: list[DeadLetter] = []
        headers: list[Headers] = [dict(record.headers) for record in records]
        columns = None if any(record.key is None for record in records) else _columns(headers)
        if columns is None:
            records, headers, letters = _sort_out(records, headers)
            columns = _columns(headers)
            assert columns is not None
        decoded = self._features.impressions([record.value for record in records])
        letters.extend(DeadLetter.of(records[bad.index], bad.reason, bad.path, bad.message) for bad in decoded.bad)
        letters.sort(key=lambda letter: letter.offset)
        rows = decoded.rows
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
            id_hashes=hash_ids([record.key for record in records])[rows],
            letters=letters,
            records=records if len(rows) == len(records) else [records[row] for row in rows.tolist()],
            rates=None if columns.rates is None else columns.rates[rows],
            corrects=None if columns.corrects is None else columns.corrects[rows],
        )


def hash_ids(ids: Sequence[bytes | None]) -> Int64Array:
    """A 64-bit hash of each impression id, as int64 (N,): samples of impressions are drawn by it.

    The same id has the same hash in every process, so a first label and its correction fall into the same sample. It is
    another hash than the one by which the join leaves out negatives, so that such a sample isn't tilted by what was left out.
    """
    if not ids:
        return np.empty(0, np.int64)
    column = pa.array([b"" if each is None else each for each in ids], pa.binary())
    return hash_strings(column, np.full(len(ids), space_seed(_ID_SPACE), np.uint64))


def _is_bookkeeping(record: Any) -> bool:
    return any(header in record.headers for header in NO_EXAMPLES)


def _columns(headers: list[Headers]) -> _Columns | None:
    """What the headers of all records say, or None when one of them is bad."""
    try:
        labels = [each["label"] for each in headers]
        weighed = [each["weight"] for each in headers]
        times = [each["impression_ms"] for each in headers]
        # Almost always all 1: then nothing is parsed.
        weights = np.ones(len(headers)) if set(weighed) <= {b"1"} else np.array([float(each) for each in weighed])
        if not set(labels) <= {b"0", b"1"} or not all(map(bytes.isdigit, times)):
            return None
        rated = [each.get("rate") for each in headers]
        rate_of = {each: 1.0 if each is None else float(each) for each in set(rated)}
        if not all(MIN_RATE <= rate <= 1 for rate in rate_of.values()):
            return None
    except (KeyError, TypeError, ValueError):  # TypeError: Kafka knows headers without a value
        return None
    if max(map(len, times), default=0) > MAX_DIGITS:
        return None
    if not ((weights >= 0) & (weights <= MAX_WEIGHT)).all():
        return None
    milliseconds = np.array(times, dtype="S").astype(np.int64) if times else np.empty(0, np.int64)
    if len(milliseconds) and milliseconds.max() > MAX_TIMESTAMP_MS:
        return None
    clicked = np.array([label == b"1" for label in labels], np.float32)
    kinds = [each.get("kind", b"first") for each in headers]
    if not set(kinds) <= KINDS:
        return None
    corrects = [kind == b"correction" for kind in kinds]
    return _Columns(
        clicked,
        weights.astype(np.float32),
        milliseconds,
        rates=np.array([rate_of[each] for each in rated]) if rate_of.keys() - {None} else None,
        corrects=np.array(corrects) if any(corrects) else None,
    )


def _sort_out(records: Sequence[Any], headers: list[Headers]) -> tuple[list[Any], list[Headers], list[DeadLetter]]:
    """The records with good headers, and dead letters for the others."""
    good, kept, letters = [], [], []
    for record, each in zip(records, headers, strict=True):
        try:
            if record.key is None:
                raise _BadHeader("missing_field", "key", "expected the impression id as the record's key, found none")
            _check(each)
        except _BadHeader as error:
            letters.append(DeadLetter.of(record, error.reason, error.path, str(error)))
        else:
            good.append(record)
            kept.append(each)
    return good, kept, letters


def _check(headers: Headers) -> None:
    """The same verdict as `_columns`, on one record."""
    for name in ("label", "weight", "impression_ms"):
        if headers.get(name) is None:
            raise _BadHeader("missing_field", name, "expected it on every example, found none")
    if headers["label"] not in (b"0", b"1"):
        raise _BadHeader("wrong_type", "label", f"expected 0 or 1, found {_shown(headers['label'])}")
    try:
        weight = float(headers["weight"])
    except ValueError as error:
        raise _BadHeader("wrong_type", "weight", f"expected a number, found {_shown(headers['weight'])}") from error
    if not 0 <= weight <= MAX_WEIGHT:
        raise _BadHeader("out_of_range", "weight", f"expected a number from 0 to {MAX_WEIGHT:,.0f}, found {weight}")
    rate = headers.get("rate")
    try:
        kept = 1.0 if rate is None else float(rate)
    except ValueError as error:
        raise _BadHeader("wrong_type", "rate", f"expected a number, found {_shown(headers['rate'])}") from error
    if not MIN_RATE <= kept <= 1:
        raise _BadHeader("out_of_range", "rate", f"expected a number from {MIN_RATE} to 1, found {kept}")
    if headers.get("kind", b"first") not in KINDS:
        raise _BadHeader("wrong_type", "kind", f"expected first, correction or replay, found {_shown(headers['kind'])}")
    time_ms = headers["impression_ms"]
    if not time_ms.isdigit():
        raise _BadHeader("wrong_type", "impression_ms", f"expected epoch milliseconds, found {_shown(time_ms)}")
    if len(time_ms) > MAX_DIGITS or int(time_ms) > MAX_TIMESTAMP_MS:
        wanted = f"expected epoch milliseconds, at most {MAX_TIMESTAMP_MS} (the year 9999)"
        raise _BadHeader("out_of_range", "impression_ms", f"{wanted}, found {_shown(time_ms)}")


def _shown(value: bytes | None) -> str:
    """A header's value for a message, kept short."""
    if value is None:
        return "a header without a value"
    return repr(value if len(value) <= 40 else value[:40] + b"...")
