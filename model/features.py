"""Decodes events into hashed features, a run of records at a time.

The fast path gives the whole run to Arrow's JSON reader, which reads it into columns. If the fast path can't be sure that it
agrees with `features_reference` on every record of the run, the run is halved and both halves are tried. Runs of a few records
are then decoded one by one by `features_reference`, whose verdict is final. So one bad record slows down few of its neighbours,
and both paths accept the same records and give the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model import features_reference as reference
from model.arrow_json import Doubt, read_json
from model.batch import FeatureBatch, Float32Array, Int64Array
from model.columns import build_batch, encode_columns, fall_back
from model.errors import FeatureError, ModelError
from model.schema import FeatureSchema, FieldSpec

__all__ = ["BadRecord", "DecodedImpressions", "DecodedRequests", "FeatureBatch", "FeatureDecoder"]

_SLOW_ROWS = 8
"""Runs this short are not halved further: a call of Arrow's reader costs about as much as ten records one by one."""

_Types = dict[str, pa.DataType]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that can't be used.

    index    its position in the run
    reason   malformed_json, bad_utf8, wrong_type, nested, not_finite, missing_field or out_of_range
    path     the part of the record that is at fault, as `$.features.price`
    message  what was expected and found
    """

    index: int
    reason: str
    path: str
    message: str


@dataclass(frozen=True, slots=True)
class DecodedImpressions:
    """The good records of a run, and the bad ones.

    batch           features of the good records, B rows
    rows            int64 (B,)    their positions in the run
    served_score    float32 (B,)  the score that the impression was shown with, NaN where absent
    served_version  int64 (B,)    the model version that gave this score, -1 where absent
    served_delta    int64 (B,)    number of deltas since that version that the weights contained, -1 where absent
    shadow_score    float32 (B,)  the score that a version on trial gave beside, NaN where absent
    shadow_version  int64 (B,)    that version, -1 where absent
    """

    batch: FeatureBatch
    rows: Int64Array
    bad: list[BadRecord]
    served_score: Float32Array
    served_version: Int64Array
    served_delta: Int64Array
    shadow_score: Float32Array
    shadow_version: Int64Array


@dataclass(frozen=True, slots=True)
class DecodedRequests:
    """The R good requests of a run, and the bad ones.

    batch          features of all candidates, one row each
    offsets        int64 (R + 1,): the candidates of request r are rows `offsets[r]` to `offsets[r + 1]` of `batch`
    request_ids    R ids
    candidate_ids  the ids of each request's candidates
    deadlines_ms   int64 (R,): milliseconds since the epoch, -1 where absent
    rows           int64 (R,): the requests' positions in the run
    """

    batch: FeatureBatch
    offsets: Int64Array
    request_ids: list[str]
    candidate_ids: list[list[str]]
    deadlines_ms: Int64Array
    rows: Int64Array
    bad: list[BadRecord]


@dataclass(slots=True)
class _Seen:
    """The types (string or integer) that the categorical fields of one `features` object of the records had last."""

    types: _Types = field(default_factory=dict)
    struct: pa.DataType | None = None  # Arrow's type of the whole object; None until it is needed


_Decoded = TypeVar("_Decoded", DecodedImpressions, DecodedRequests)


class FeatureDecoder:
    """Decodes impressions and score requests for one schema.

        decoder = FeatureDecoder(schema)
        decoded = decoder.impressions(values)   # values: list of bytes
        scores = predictor.predict(decoded.batch)
        for bad in decoded.bad: ...             # bad.index, bad.reason, bad.path, bad.message

    Its only state is the type (string or integer) that each categorical field had last. Don't use it from two threads at once.

    Raises:
        ModelError: the schema has no fields.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        if not schema.fields:
            raise ModelError("features.fields is empty: name at least one feature for the model to read")
        self.schema = schema
        self._default_types = [_default_type(spec) for spec in schema.fields]
        self._impression_types = _Seen()
        self._context_types = _Seen()
        self._candidate_types = _Seen()

    def impressions(self, payloads: Sequence[bytes | None]) -> DecodedImpressions:
        """Features of a run of impressions. Bad records are in `bad`; none raises an error."""
        pieces = self._decode(payloads, self._fast_impressions, self._slow_impressions, self._guess_impression)
        return DecodedImpressions(
            batch=FeatureBatch.concat([piece.batch for _, piece in pieces]),
            rows=np.concatenate([piece.rows + start for start, piece in pieces]),
            bad=_all_bad(pieces),
            served_score=np.concatenate([piece.served_score for _, piece in pieces]),
            served_version=np.concatenate([piece.served_version for _, piece in pieces]),
            served_delta=np.concatenate([piece.served_delta for _, piece in pieces]),
            shadow_score=np.concatenate([piece.shadow_score for _, piece in pieces]),
            shadow_version=np.concatenate([piece.shadow_version for _, piece in pieces]),
        )

    def requests(self, payloads: Sequence[bytes | None]) -> DecodedRequests:
        """Features of all candidates of a run of score requests. A candidate's own value of a field wins over the context's."""
        pieces = self._decode(payloads, self._fast_requests, self._slow_requests, self._guess_request)
        counts = np.concatenate([np.diff(piece.offsets) for _, piece in pieces])
        return DecodedRequests(
            batch=FeatureBatch.concat([piece.batch for _, piece in pieces]),
            offsets=np.concatenate(([0], np.cumsum(counts))),
            request_ids=list(chain.from_iterable(piece.request_ids for _, piece in pieces)),
            candidate_ids=list(chain.from_iterable(piece.candidate_ids for _, piece in pieces)),
            deadlines_ms=np.concatenate([piece.deadlines_ms for _, piece in pieces]),
            rows=np.concatenate([piece.rows + start for start, piece in pieces]),
            bad=_all_bad(pieces),
        )

    def _decode(
        self,
        payloads: Sequence[bytes | None],
        fast: Callable[[Sequence[bytes]], _Decoded],
        slow: Callable[[Sequence[bytes | None]], _Decoded],
        guess: Callable[[bytes], bool],
    ) -> list[tuple[int, _Decoded]]:
        """The run in one or more decoded pieces, in order, each with the position of its first record."""
        if len(payloads) <= _SLOW_ROWS and sum(map(len, filter(None, payloads))) < _SLOW_ROWS * 1024:
            return [(0, slow(payloads))]
        whole = [payload or b"" for payload in payloads]
        try:
            return [(0, fast(whole))]
        except Doubt:
            pass
        if guess(whole[0]):
            try:
                return [(0, fast(whole))]
            except Doubt:
                pass
        if len(payloads) <= _SLOW_ROWS:
            return [(0, slow(payloads))]
        half = len(payloads) // 2
        left = self._decode(payloads[:half], fast, slow, guess)
        right = self._decode(payloads[half:], fast, slow, guess)
        return left + [(start + half, piece) for start, piece in right]

    # Impressions

    def _fast_impressions(self, payloads: Sequence[bytes]) -> DecodedImpressions:
        layout = [
            ("score", pa.float64()),
            ("model_version", pa.int64()),
            ("delta", pa.int64()),
            ("shadow_score", pa.float64()),
            ("shadow_version", pa.int64()),
            ("features", self._struct(self._impression_types)),
        ]
        table = read_json(payloads, pa.schema(layout))
        rows = len(payloads)
        score = table.column("score").fill_null(np.nan).to_numpy()
        shadow = table.column("shadow_score").fill_null(np.nan).to_numpy()
        if table.column("features").null_count or any(((each < 0) | (each > 1)).any() for each in (score, shadow)):
            raise Doubt
        if any(_below_zero(table, name) for name in ("model_version", "delta", "shadow_version")):
            raise Doubt
        return DecodedImpressions(
            batch=self._batch(table.column("features").chunk(0).flatten()),
            rows=np.arange(rows),
            bad=[],
            served_score=score.astype(np.float32),
            served_version=table.column("model_version").fill_null(-1).to_numpy(),
            served_delta=table.column("delta").fill_null(-1).to_numpy(),
            shadow_score=shadow.astype(np.float32),
            shadow_version=table.column("shadow_version").fill_null(-1).to_numpy(),
        )

    def _slow_impressions(self, payloads: Sequence[bytes | None]) -> DecodedImpressions:
        good, rows, bad = _one_by_one(payloads, lambda payload: reference.decode_impression(payload, self.schema))
        return DecodedImpressions(
            batch=self._batch(self._arrays([impression.values for impression in good])),
            rows=rows,
            bad=bad,
            served_score=np.array([impression.served_score for impression in good], np.float32),
            served_version=np.array([impression.served_version for impression in good], np.int64),
            served_delta=np.array([impression.served_delta for impression in good], np.int64),
            shadow_score=np.array([impression.shadow_score for impression in good], np.float32),
            shadow_version=np.array([impression.shadow_version for impression in good], np.int64),
        )

    def _guess_impression(self, payload: bytes) -> bool:
        return self._guess(self._impression_types, _part(payload, "features"))

    # Requests

    def _fast_requests(self, payloads: Sequence[bytes]) -> DecodedRequests:
        candidate = [("id", pa.string()), ("features", self._struct(self._candidate_types))]
        layout = [
            ("request_id", pa.string()),
            ("deadline_ms", pa.int64()),
            ("context", self._struct(self._context_types)),
            ("candidates", pa.list_(pa.struct(candidate))),
        ]
        table = read_json(payloads, pa.schema(layout))
        lists = table.column("candidates").chunk(0)
        candidates = lists.flatten()
        ids, features = candidates.flatten()
        deadlines = table.column("deadline_ms").fill_null(-1).to_numpy()
        required = (table.column("request_id"), lists, candidates, ids)
        if any(column.null_count for column in required) or _below_zero(table, "deadline_ms"):
            raise Doubt
        counts = pc.list_value_length(lists).to_numpy().astype(np.int64)
        offsets = np.concatenate(([0], np.cumsum(counts)))
        context = table.column("context").chunk(0).flatten()
        names = ids.to_pylist()
        return DecodedRequests(
            batch=self._batch(features.flatten(), context, np.repeat(np.arange(len(payloads)), counts)),
            offsets=offsets,
            request_ids=table.column("request_id").to_pylist(),
            candidate_ids=[names[offsets[row] : offsets[row + 1]] for row in range(len(payloads))],
            deadlines_ms=deadlines,
            rows=np.arange(len(payloads)),
            bad=[],
        )

    def _slow_requests(self, payloads: Sequence[bytes | None]) -> DecodedRequests:
        good, rows, bad = _one_by_one(payloads, lambda payload: reference.decode_request(payload, self.schema))
        values = list(chain.from_iterable(request.candidates for request in good))
        return DecodedRequests(
            batch=self._batch(self._arrays(values)),
            offsets=np.concatenate(([0], np.cumsum([len(request.candidates) for request in good]))).astype(np.int64),
            request_ids=[request.request_id for request in good],
            candidate_ids=[request.candidate_ids for request in good],
            deadlines_ms=np.array([request.deadline_ms for request in good], np.int64),
            rows=rows,
            bad=bad,
        )

    def _guess_request(self, payload: bytes) -> bool:
        context = self._guess(self._context_types, _part(payload, "context"))
        candidate = self._guess(self._candidate_types, _part(payload, "candidates", 0, "features"))
        return context or candidate

    # Fields

    def _struct(self, seen: _Seen) -> pa.DataType:
        """Arrow's type for a features object, with categorical fields of the type that they had last."""
        if seen.struct is None:
            types = zip(self.schema.fields, self._default_types, strict=True)
            seen.struct = pa.struct([(spec.name, seen.types.get(spec.name, default)) for spec, default in types])
        return seen.struct

    def _guess(self, seen: _Seen, features: Any) -> bool:
        """Reads the types of the categorical fields off one features object. True if a type has changed."""
        if not isinstance(features, dict):
            return False
        before = dict(seen.types)
        for spec in self.schema.fields:
            value = features.get(spec.name)
            if spec.kind == "categorical" and isinstance(value, str | int) and not isinstance(value, bool):
                seen.types[spec.name] = pa.string() if isinstance(value, str) else pa.int64()
        if before == seen.types:
            return False
        seen.struct = None
        return True

    def _arrays(self, values: list[list[reference.Value]]) -> list[pa.Array]:
        """Canonical values of N rows, as one column for each field."""
        return [pa.array([row[i] for row in values], default) for i, default in enumerate(self._default_types)]

    def _batch(
        self,
        columns: Sequence[pa.Array],
        context: Sequence[pa.Array] | None = None,
        context_rows: Int64Array | None = None,
    ) -> FeatureBatch:
        for spec, column in zip((*self.schema.fields, *self.schema.fields), (*columns, *(context or ())), strict=False):
            if column.null_count == len(column):
                continue
            if spec.kind == "list" and column.flatten().null_count:
                raise Doubt
            if spec.kind == "numeric" and not np.isfinite(column.drop_null().to_numpy()).all():
                raise Doubt
        keyed = encode_columns(columns, self.schema.fields)
        if context is not None and context_rows is not None:
            shared = encode_columns(context, self.schema.fields)
            keyed = [fall_back(own, other, context_rows) for own, other in zip(keyed, shared, strict=True)]
        return build_batch(keyed, self.schema, len(columns[0]))


def _default_type(spec: FieldSpec) -> pa.DataType:
    return {"categorical": pa.string(), "numeric": pa.float64(), "list": pa.list_(pa.string())}[spec.kind]


def _part(payload: bytes, *path: str | int) -> Any:
    """The part of a record at `path`; None if there is none or the record can't be parsed."""
    try:
        value: Any = reference.parse(payload)
        for step in path:
            value = value[step]
    except (FeatureError, LookupError, TypeError):
        return None
    return value


def _all_bad(pieces: Iterable[tuple[int, _Decoded]]) -> list[BadRecord]:
    return [
        BadRecord(record.index + start, record.reason, record.path, record.message)
        for start, piece in pieces
        for record in piece.bad
    ]


_Record = TypeVar("_Record")


def _one_by_one(
    payloads: Sequence[bytes | None], decode: Callable[[bytes | None], _Record]
) -> tuple[list[_Record], Int64Array, list[BadRecord]]:
    good: list[_Record] = []
    rows: list[int] = []
    bad: list[BadRecord] = []
    for index, payload in enumerate(payloads):
        try:
            good.append(decode(payload))
        except FeatureError as error:
            bad.append(BadRecord(index, error.reason, error.path, str(error)))
        else:
            rows.append(index)
    return good, np.array(rows, np.int64), bad


def _below_zero(table: pa.Table, name: str) -> bool:
    least = pc.min(table.column(name)).as_py()
    return least is not None and least < 0
