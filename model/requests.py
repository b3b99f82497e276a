"""Decoding of score requests, also fast for a few of them.

`FeatureDecoder` reads a run of records through Arrow, with at least one call for each field: some milliseconds, however little
there is to read. That is little for hundreds of requests, but most of the work for one. So a few requests are parsed by
msgspec, and all their values are hashed in one call. Requests that this fast path can't decide with certainty go to
`FeatureDecoder`, which decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from model.batch import FeatureBatch
from model.clock import LATEST_MS
from model.columns import KeyColumn, absent_column, build_batch, fall_back, number_column
from model.derived import complete
from model.features import DecodedRequests, FeatureDecoder
from model.hashing import hash_strings, space_seed
from model.schema import FeatureSchema, FieldSpec

__all__ = ["RequestDecoder"]

# Bytes up to which the fast path is faster than Arrow, for requests of 34 fields and 50 candidates (8 KB each).
FEW_BYTES = 128 * 1024
# Brackets in parts of a request that nothing reads. Both parsers accept this depth (Python's recursion limit is near 1,000).
SURE_DEPTH = 100
EXACT_INTEGER = 1 << 53  # every smaller integer is an exact double; `FeatureDecoder` decides about larger ones

Int64s = npt.NDArray[np.int64]
Features = dict[str, Any]


class _Doubt(Exception):
    """The fast path can't decide about these requests."""


class _Candidate(msgspec.Struct):
    id: str
    features: dict[str, Any] | None = None


class _Request(msgspec.Struct):
    request_id: str
    candidates: list[_Candidate]
    context: dict[str, Any] | None = None
    deadline_ms: int | None = None
    timestamp: int | None = None


class RequestDecoder:
    """As `FeatureDecoder.requests`, with the same verdicts and the same keys. Not for two threads at once."""

    def __init__(self, schema: FeatureSchema) -> None:
        self.schema = schema
        self._many = FeatureDecoder(schema)
        self._parse = msgspec.json.Decoder(_Request).decode

    def requests(self, payloads: Sequence[bytes], arrived_ms: Int64s | None = None) -> DecodedRequests:
        """The features of all candidates of a run of score requests.

        Args:
            arrived_ms: (N,), times of the requests that don't have one of their own. Only needed when the schema has hours or
                weekdays.

        Raises:
            ModelError: the schema has hours or weekdays, and no times are given.
        """
        if payloads and sum(map(len, payloads)) <= FEW_BYTES:
            try:
                return self._few(payloads, arrived_ms)
            except (_Doubt, msgspec.DecodeError, UnicodeError, RecursionError, OverflowError, pa.ArrowException):
                pass
        return self._many.requests(payloads, arrived_ms)

    def _few(self, payloads: Sequence[bytes], arrived_ms: Int64s | None = None) -> DecodedRequests:
        for payload in payloads:
            payload.decode()  # msgspec doesn't check the parts that it skips
        requests = [self._parse(payload) for payload in payloads]
        deadlines = [-1 if request.deadline_ms is None else request.deadline_ms for request in requests]
        if any(request.deadline_ms is not None and not 0 <= request.deadline_ms < 1 << 63 for request in requests):
            raise _Doubt
        if any(request.timestamp is not None and not 0 <= request.timestamp <= LATEST_MS for request in requests):
            raise _Doubt
        counts = np.array([len(request.candidates) for request in requests], np.int64)
        candidates = list(chain.from_iterable(request.candidates for request in requests))
        own = [candidate.features or {} for candidate in candidates]
        shared = [request.context or {} for request in requests]
        self._check_depth(payloads, len(candidates), chain(own, shared))
        owners = np.repeat(np.arange(len(requests)), counts)
        times_ms = self._times(requests, arrived_ms, owners)
        return DecodedRequests(
            batch=self._batch(self._columns(own, shared, owners), len(own), times_ms),
            offsets=np.concatenate(([0], np.cumsum(counts))),
            request_ids=[request.request_id for request in requests],
            candidate_ids=[[candidate.id for candidate in request.candidates] for request in requests],
            deadlines_ms=np.array(deadlines, np.int64),
            rows=np.arange(len(requests)),
            bad=[],
        )

    def _times(self, requests: Sequence[_Request], arrived_ms: Int64s | None, owners: Int64s) -> Int64s | None:
        """The time of each candidate's request, (N,); None where the schema doesn't read it, or it isn't known of all."""
        if not self.schema.reads_time:
            return None
        arrivals = [None] * len(requests) if arrived_ms is None else arrived_ms.tolist()
        pairs = zip(requests, arrivals, strict=True)
        times_ms = [arrived if request.timestamp is None else request.timestamp for request, arrived in pairs]
        return None if None in times_ms else np.array(times_ms, np.int64)[owners]

    def _batch(self, columns: list[KeyColumn], rows: int, times_ms: Int64s | None) -> FeatureBatch:
        if len(self.schema.asked) < len(self.schema.fields):
            named = dict(zip((field.name for field in self.schema.asked), columns, strict=True))
            columns = complete(named, self.schema, rows, times_ms, served=True)
        return build_batch(columns, self.schema, rows)

    def _check_depth(self, payloads: Sequence[bytes], candidates: int, features: Iterable[Features]) -> None:
        """Raises _Doubt when there are many more brackets than those of the parts that were read."""
        opened = sum(payload.count(b"{") + payload.count(b"[") for payload in payloads)
        known = len(payloads) + candidates + sum(1 + sum(type(value) is list for value in each.values()) for each in features)
        if opened - known > SURE_DEPTH:
            raise _Doubt

    def _columns(self, own: list[Features], shared: list[Features], owners: Int64s) -> list[KeyColumn]:
        """A column for each field that is read from requests: the candidates' own values, else those of their request."""
        words = _Words()
        sides = [self._read(own, words), self._read(shared, words)]
        words.hash()
        fields = zip(*([column() for column in side] for side in sides), strict=True)
        return [fall_back(column, other, owners) for column, other in fields]

    def _read(self, features: list[Features], words: _Words) -> list[Callable[[], KeyColumn]]:
        """For each field a function that gives its column, once all words are hashed."""
        named = set().union(*features)
        columns: list[Callable[[], KeyColumn]] = []
        for field in self.schema.asked:
            if field.name not in named:
                columns.append(partial(absent_column, len(features), field))
                continue
            values = [each.get(field.name) for each in features]
            if field.kind == "categorical":
                columns.append(words.add(values, field.hash_space))
            elif field.kind == "list":
                columns.append(words.add_lists(values, field.hash_space))
            else:
                columns.append(partial(_numbers, values, field))
        return columns


class _Words:
    """The strings of all fields, hashed in one call: with few strings, the calls are the cost."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._seeds: list[int] = []
        self._counts: list[int] = []
        self._keys = np.empty(0, np.int64)

    def add(self, values: list[Any], space: str) -> Callable[[], KeyColumn]:
        """A categorical field: strings, integers and None."""
        kinds = set(map(type, values))
        present = np.ones(len(values), bool)
        if kinds != {str}:
            if not kinds <= {str, int, type(None)}:
                raise _Doubt
            if any(type(value) is int and not -(1 << 63) <= value < 1 << 63 for value in values):
                raise _Doubt
            present = np.array([value is not None for value in values])
            values = ["" if value is None else str(value) for value in values]
        part = self._add(values, space)
        return lambda: KeyColumn(present, self._keys[part])

    def add_lists(self, values: list[Any], space: str) -> Callable[[], KeyColumn]:
        """A field of lists of strings; None stands for no list."""
        if not set(map(type, values)) <= {list, type(None)}:
            raise _Doubt
        texts = [text for value in values if value is not None for text in value]
        if not set(map(type, texts)) <= {str}:
            raise _Doubt
        present = np.array([value is not None for value in values])
        lengths = np.array([len(value or ()) for value in values], np.int64)
        part = self._add(texts, space)
        return lambda: KeyColumn(present, self._keys[part], starts=np.cumsum(lengths) - lengths, lengths=lengths)

    def _add(self, texts: list[str], space: str) -> slice:
        start = len(self._texts)
        self._texts += texts
        self._seeds.append(space_seed(space))
        self._counts.append(len(texts))
        return slice(start, start + len(texts))

    def hash(self) -> None:
        """Compute the keys. The columns can be read from then on."""
        seeds = np.repeat(np.array(self._seeds, np.uint64), self._counts)
        self._keys = hash_strings(pa.array(self._texts, pa.string()), seeds)


def _numbers(values: list[Any], field: FieldSpec) -> KeyColumn:
    """A numeric field: numbers and None. All are finite, since msgspec rejects numbers beyond a double."""
    if not set(map(type, values)) <= {int, float, type(None)}:
        raise _Doubt
    if any(type(value) is int and abs(value) > EXACT_INTEGER for value in values):
        raise _Doubt
    present = np.array([value is not None for value in values])
    return number_column(present, np.array([0.0 if value is None else value for value in values], np.float64), field)
