"""Decodes events into hashed features, a run of records at a time.

The fast path gives the whole run to Arrow's JSON reader, which reads it into columns. If the fast path can't be sure that it
agrees with `features_reference` on every record of the run, the run is halved and both halves are tried. Runs of a few records
are then decoded one by one by `features_reference`, whose verdict is final. So one bad record slows down few of its neighbours,
and both paths accept the same records and give the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model import features_reference as reference
from model.arrow_json import Doubt, read_json
from model.batch import FeatureBatch, Float32Array, Int64Array
from model.clock import LATEST_MS
from model.columns import KeyColumn, build_batch, encode_columns, fall_back
from model.derived import complete
from model.errors import FeatureError, ModelError
from model.schema import FeatureSchema, FieldSpec
from model.seen_types import SeenTypes, default_type

__all__ = ["BadRecord", "DecodedImpressions", "DecodedRequests", "FeatureBatch", "FeatureDecoder"]

_SLOW_ROWS = 8
"""Runs this short are not halved further: a call of Arrow's reader costs about as much as ten records one by one."""


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


_Decoded = TypeVar("_Decoded", DecodedImpressions, DecodedRequests)


class FeatureDecoder:
    """Decodes impressions and score requests for one schema.

        decoder = FeatureDecoder(schema)
        decoded = decoder.impressions(values, times_ms)   # values: list of bytes
        scores = predictor.predict(decoded.batch)
        for bad in decoded.bad: ...             # bad.index, bad.reason, bad.path, bad.message

    Impressions have all features as they were sent. In requests, fields with `serve_as` have that value.

    Its only state is the type (string or integer) that each categorical field had last. Don't use it from two threads at once.

    Raises:
        ModelError: the schema has no fields.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        if not schema.fields:
            raise ModelError("features.fields is empty: name at least one feature for the model to read")
        self.schema = schema
        self._impression_types = SeenTypes(schema.sent)
        self._context_types = SeenTypes(schema.asked)
        self._candidate_types = SeenTypes(schema.asked)

    def impressions(self, payloads: Sequence[bytes | None], times_ms: Int64Array | None = None) -> DecodedImpressions:
        """Features of a run of impressions. Bad records are in `bad`; none raises an error.

        Args:
            times_ms: (N,), their event times. Only needed when the schema has hours or weekdays.

        Raises:
            ModelError: the schema has hours or weekdays, and no times are given.
        """
        pieces = self._decode(payloads, times_ms, self._fast_impressions, self._slow_impressions, self._guess_impression)
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

    def requests(self, payloads: Sequence[bytes | None], arrived_ms: Int64Array | None = None) -> DecodedRequests:
        """Features of all candidates of a run of score requests. A candidate's own value of a field wins over the context's.

        Args:
            arrived_ms: (N,), times of the requests that don't have one of their own. Only needed when the schema has hours or
                weekdays.

        Raises:
            ModelError: the schema has hours or weekdays, and no times are given.
        """
        pieces = self._decode(payloads, arrived_ms, self._fast_requests, self._slow_requests, self._guess_request)
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
        times_ms: Int64Array | None,
        fast: Callable[[Sequence[bytes], Int64Array | None], _Decoded],
        slow: Callable[[Sequence[bytes | None], Int64Array | None], _Decoded],
        guess: Callable[[bytes], bool],
    ) -> list[tuple[int, _Decoded]]:
        """The run in one or more decoded pieces, in order, each with the position of its first record."""
        if len(payloads) <= _SLOW_ROWS and sum(map(len, filter(None, payloads))) < _SLOW_ROWS * 1024:
            return [(0, slow(payloads, times_ms))]
        whole = [payload or b"" for payload in payloads]
        try:
            return [(0, fast(whole, times_ms))]
        except Doubt:
            pass
        if guess(whole[0]):
            try:
                return [(0, fast(whole, times_ms))]
            except Doubt:
                pass
        if len(payloads) <= _SLOW_ROWS:
            return [(0, slow(payloads, times_ms))]
        half = len(payloads) // 2
        first, second = (None, None) if times_ms is None else (times_ms[:half], times_ms[half:])
        left = self._decode(payloads[:half], first, fast, slow, guess)
        right = self._decode(payloads[half:], second, fast, slow, guess)
        return left + [(start + half, piece) for start, piece in right]

    # Impressions

    def _fast_impressions(self, payloads: Sequence[bytes], times_ms: Int64Array | None = None) -> DecodedImpressions:
        layout = [
            ("score", pa.float64()),
            ("model_version", pa.int64()),
            ("delta", pa.int64()),
            ("shadow_score", pa.float64()),
            ("shadow_version", pa.int64()),
            ("features", self._impression_types.struct),
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
            batch=self._sent(table.column("features").chunk(0).flatten(), times_ms, rows),
            rows=np.arange(rows),
            bad=[],
            served_score=score.astype(np.float32),
            served_version=table.column("model_version").fill_null(-1).to_numpy(),
            served_delta=table.column("delta").fill_null(-1).to_numpy(),
            shadow_score=shadow.astype(np.float32),
            shadow_version=table.column("shadow_version").fill_null(-1).to_numpy(),
        )

    def _slow_impressions(self, payloads: Sequence[bytes | None], times_ms: Int64Array | None = None) -> DecodedImpressions:
        good, rows, bad = _one_by_one(payloads, lambda payload: reference.decode_impression(payload, self.schema))
        return DecodedImpressions(
            batch=self._sent(
                _arrays([impression.values for impression in good], self.schema.sent),
                None if times_ms is None else times_ms[rows],
                len(good),
            ),
            rows=rows,
            bad=bad,
            served_score=np.array([impression.served_score for impression in good], np.float32),
            served_version=np.array([impression.served_version for impression in good], np.int64),
            served_delta=np.array([impression.served_delta for impression in good], np.int64),
            shadow_score=np.array([impression.shadow_score for impression in good], np.float32),
            shadow_version=np.array([impression.shadow_version for impression in good], np.int64),
        )

    def _guess_impression(self, payload: bytes) -> bool:
        return self._impression_types.guess(_part(payload, "features"))

    # Requests

    def _fast_requests(self, payloads: Sequence[bytes], arrived_ms: Int64Array | None = None) -> DecodedRequests:
        candidate = [("id", pa.string()), ("features", self._candidate_types.struct)]
        layout = [
            ("request_id", pa.string()),
            ("deadline_ms", pa.int64()),
            ("timestamp", pa.int64()),
            ("context", self._context_types.struct),
            ("candidates", pa.list_(pa.struct(candidate))),
        ]
        table = read_json(payloads, pa.schema(layout))
        lists = table.column("candidates").chunk(0)
        candidates = lists.flatten()
        ids, features = candidates.flatten()
        deadlines, times_ms = (table.column(name).fill_null(-1).to_numpy() for name in ("deadline_ms", "timestamp"))
        required = (table.column("request_id"), lists, candidates, ids)
        if any(column.null_count for column in required) or any(
            _below_zero(table, each) for each in ("deadline_ms", "timestamp")
        ):
            raise Doubt
        if (times_ms > LATEST_MS).any():
            raise Doubt
        counts = pc.list_value_length(lists).to_numpy().astype(np.int64)
        offsets = np.concatenate(([0], np.cumsum(counts)))
        context = table.column("context").chunk(0).flatten()
        names = ids.to_pylist()
        return DecodedRequests(
            batch=self._asked(features.flatten(), context, counts, _times(times_ms, arrived_ms)),
            offsets=offsets,
            request_ids=table.column("request_id").to_pylist(),
            candidate_ids=[names[offsets[row] : offsets[row + 1]] for row in range(len(payloads))],
            deadlines_ms=deadlines,
            rows=np.arange(len(payloads)),
            bad=[],
        )

    def _slow_requests(self, payloads: Sequence[bytes | None], arrived_ms: Int64Array | None = None) -> DecodedRequests:
        good, rows, bad = _one_by_one(payloads, lambda payload: reference.decode_request(payload, self.schema))
        values = list(chain.from_iterable(request.candidates for request in good))
        counts = np.array([len(request.candidates) for request in good], np.int64)
        own_ms = np.array([request.time_ms for request in good], np.int64)
        times_ms = _times(own_ms, None if arrived_ms is None else arrived_ms[rows])
        return DecodedRequests(
            batch=self._asked(_arrays(values, self.schema.asked), None, counts, times_ms),
            offsets=np.concatenate(([0], np.cumsum(counts))),
            request_ids=[request.request_id for request in good],
            candidate_ids=[request.candidate_ids for request in good],
            deadlines_ms=np.array([request.deadline_ms for request in good], np.int64),
            rows=rows,
            bad=bad,
        )

    def _guess_request(self, payload: bytes) -> bool:
        context = self._context_types.guess(_part(payload, "context"))
        candidate = self._candidate_types.guess(_part(payload, "candidates", 0, "features"))
        return context or candidate

    # Fields

    def _sent(self, columns: Sequence[pa.Array], times_ms: Int64Array | None, rows: int) -> FeatureBatch:
        """The features of impressions, from the values of the fields that they carry."""
        keyed = _encode(columns, self.schema.sent)
        return build_batch(complete(keyed, self.schema, rows, times_ms, served=False), self.schema, rows)

    def _asked(
        self, columns: Sequence[pa.Array], context: Sequence[pa.Array] | None, counts: Int64Array, times_ms: Int64Array | None
    ) -> FeatureBatch:
        """The features of the candidates of R requests, from the values of the fields that are read from them.

        context   values of the requests, which candidates without their own have; None if there are none
        counts    (R,): number of candidates
        times_ms  (R,): when each request was made; None if that isn't known
        """
        keyed = _encode(columns, self.schema.asked)
        owners = np.repeat(np.arange(len(counts)), counts)
        if context is not None:
            shared = _encode(context, self.schema.asked)
            keyed = {name: fall_back(own, shared[name], owners) for name, own in keyed.items()}
        times_ms = None if times_ms is None else times_ms[owners]
        return build_batch(complete(keyed, self.schema, len(owners), times_ms, served=True), self.schema, len(owners))


def _encode(columns: Sequence[pa.Array], fields: Sequence[FieldSpec]) -> dict[str, KeyColumn]:
    """Keys of each field, by name. Raises Doubt about values that no field of its kind has."""
    for spec, column in zip(fields, columns, strict=True):
        if column.null_count == len(column):
            continue
        if spec.kind == "list" and column.flatten().null_count:
            raise Doubt
        if spec.kind == "numeric" and not np.isfinite(column.drop_null().to_numpy()).all():
            raise Doubt
    return dict(zip((spec.name for spec in fields), encode_columns(columns, fields), strict=True))


def _arrays(values: list[list[reference.Value]], fields: Sequence[FieldSpec]) -> list[pa.Array]:
    """Canonical values of N rows, as one column for each field."""
    return [pa.array([row[i] for row in values], default_type(spec)) for i, spec in enumerate(fields)]


def _times(own_ms: Int64Array, arrived_ms: Int64Array | None) -> Int64Array | None:
    """The time of each request, (R,): its own, or else when it arrived; None if neither is known of every request."""
    if arrived_ms is None:
        return None if (own_ms < 0).any() else own_ms
    return np.where(own_ms < 0, arrived_ms, own_ms)


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
