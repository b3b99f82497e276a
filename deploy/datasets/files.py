"""A user's log as a data set: Parquet, JSON lines, CSV or TSV, with a mapping of columns.

Everything is checked before the first event is made. A value that the pipeline would reject, round or lose raises an error with
the file, the column and the row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deploy.datasets import columns as checked
from deploy.datasets.base import CHUNK_ROWS, Chunk, Int64s, Progress, draw_delays, make_chunk
from deploy.datasets.encode import members, strings, tokens
from deploy.datasets.features import check_kind, feature, field_kind
from deploy.datasets.refusal import listed, printable, refuse
from deploy.datasets.tables import FILE_KINDS, read_table
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec
from stream.settings import JoinSettings, TopicSettings

__all__ = ["AUTO", "FILE_KINDS", "Columns", "FileDataSet", "Limits"]

AUTO = "\0auto"
"""Gives a role to the column of the contract's name (such as `impression_id`), if the file has that column."""

log = logging.getLogger(__name__)

_ENVELOPE_BYTES = 300  # of an event without its id and features: names, a time, a score, a version, a delta
_ESCAPED = 6  # bytes that JSON needs at most for one byte of a string


@dataclass(frozen=True, slots=True)
class Columns:
    """The column of each role.

    None means that no column has the role; a column of the contract's name is then left out. AUTO means the column of the
    contract's name, if there is one. The features are the columns that are neither mapped nor dropped, and the members of a
    column `features` of objects.
    """

    timestamp: str | None = "timestamp"  # event time: a timestamp type, ISO 8601 text, or a number in `unit`
    id: str | None = AUTO  # without one, the row's number is the id
    clicked: str | None = "clicked"  # true or 1
    click_timestamp: str | None = AUTO  # if `clicked` is None, null means no click
    user: str | None = None
    item: str | None = None
    score: str | None = AUTO  # as served; AUTO only in a file with a column `features` of objects
    model_version: str | None = AUTO  # as served; AUTO as for `score`
    delta: str | None = AUTO  # as served; AUTO as for `score`
    candidate: tuple[str, ...] = ()  # features that belong to the item shown, beside `item` itself
    drop: frozenset[str] = frozenset()  # columns to leave out
    text: frozenset[str] = frozenset()  # columns of CSV and TSV that stay text
    unit: str = "ms"  # of times that are numbers: s, ms, us or ns


@dataclass(frozen=True, slots=True)
class Limits:
    """What the pipeline accepts: bytes of an event (topics.max_message_bytes), ms ahead of now (join.max_future_ms)."""

    event_bytes: int = TopicSettings().max_message_bytes
    future_ms: int = JoinSettings().max_future_ms


@dataclass(slots=True)
class _Log:
    """A file's rows, checked, in event-time order."""

    ids: list[str] | None  # None: the numbers of the rows
    rows: Int64s  # (N,) numbers of the rows in the file
    times_ms: Int64s  # (N,)
    clicked: npt.NDArray[np.bool_]  # (N,)
    delays_ms: Int64s  # (N,)
    served: list[bytes] | None  # members of the event
    features: dict[str, pa.ChunkedArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


class _Column(NamedTuple):
    """A column that has a role."""

    name: str
    values: pa.ChunkedArray


class FileDataSet:
    """One file, read as a whole and sorted by event time (stable). A row that the pipeline would reject raises an error."""

    terms = "Yours."
    clicks = "From the file (click_timestamp). Clicks without a time get a delay drawn within 60 s, seeded by row."

    def __init__(
        self, path: Path, kind: str, columns: Columns | None = None, *, seed: int = 0, limits: Limits | None = None
    ) -> None:
        self.name = kind
        self.title = f"{path} ({kind})"
        self.obtain = "Pass the file with --path and its columns with --column."
        self._path = path
        self._columns = columns or Columns()
        self._seed = seed
        self._limits = limits or Limits()
        self._log: _Log | None = None
        self._absent: set[str] = set()  # fields that were named in a warning

    def schema(self) -> FeatureSchema:
        """The features, by the types of their columns: strings and whole numbers are categories, floats are numeric."""
        kinds = {name: field_kind(column) for name, column in self._read().features.items()}
        return FeatureSchema(fields=tuple(FieldSpec.model_validate({"name": n, "kind": k}) for n, k in kinds.items()))

    def check(self, schema: FeatureSchema) -> None:
        """Check that a model of this schema can learn from the file. Fields that it lacks are named in a warning, once.

        Raises:
            DataSetError: the model would reject a value, or the file has none of the schema's fields.
        """
        features = self._read().features
        known = [spec for spec in schema.sent if spec.name in features]
        if schema.sent and not known:
            names = ", ".join(spec.name for spec in schema.sent[:5])
            do = "Change [features] in the settings (`headrace data schema` prints what fits), or rename the columns."
            refuse(self._path, f"some of the settings' features ({names}, …)", listed([*features]), do)
        for spec in known:
            check_kind(self._path, features[spec.name], spec)
        absent = [spec.name for spec in schema.sent if spec.name not in features and spec.name not in self._absent]
        if absent:
            self._absent.update(absent)
            log.warning(
                "Note: %s has no column for %s of the settings' features.fields: its impressions have no such value. Where "
                "that is an error, correct the name or rename the column.",
                *(printable(str(self._path)), listed(absent)),
            )

    def find(self) -> Path | None:
        return self._path if self._path.exists() else None

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        raise DataSetError(f"{self.name}: expected a file of yours, found a request to fetch it. {self.obtain}")

    def size(self) -> int:
        return len(self._read())

    def chunks(self) -> Iterator[Chunk]:
        log = self._read()
        columns = self._columns
        own = {name for name in (columns.item, *columns.candidate) if name is not None}
        for start in range(0, len(log), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            rows = {name: column.slice(start, CHUNK_ROWS) for name, column in log.features.items()}
            context = {name: column for name, column in rows.items() if name not in own}
            candidate = {name: column for name, column in rows.items() if name in own}
            if not context and candidate:
                context, candidate = candidate, {}
            count = len(log.rows[part])
            yield make_chunk(
                ids=[str(number) for number in log.rows[part].tolist()] if log.ids is None else log.ids[part],
                timestamps_ms=log.times_ms[part],
                clicked=log.clicked[part],
                delays_ms=log.delays_ms[part],
                context=members(context),
                candidate=members(candidate) if candidate else None,
                users=self._names(columns.user, rows, count),
                items=self._names(columns.item, rows, count),
                served=None if log.served is None else log.served[part],
            )

    def _names(self, name: str | None, rows: dict[str, pa.ChunkedArray], count: int) -> list[str]:
        return [""] * count if name is None else strings(checked.digits(self._path, name, rows[name]))

    def _read(self) -> _Log:
        if self._log is None:
            self._log = self._checked()
        return self._log

    def _checked(self) -> _Log:
        roles, path = self._columns, self._path
        if roles.unit not in checked.UNITS_PER_SECOND:
            units = ", ".join(checked.UNITS_PER_SECOND)
            raise DataSetError(f"unit: expected one of {units}, found {roles.unit!r}. Change --unit.")
        if roles.timestamp is None:
            raise DataSetError("timestamp: expected a column of event times, found none. Map one with --column timestamp=NAME.")
        self._check_roles()
        names = {"impression_id" if roles.id == AUTO else roles.id, roles.user, roles.item}
        table = read_table(path, self.name, roles.drop, text=roles.text, ids={name for name in names if name is not None})
        top = {name: table[name] for name in table.column_names}
        inner: dict[str, pa.ChunkedArray] = {}
        nested = "features" in top and pa.types.is_struct(top["features"].type)
        if nested:
            struct = top.pop("features").combine_chunks()
            inner = {part.name: pa.chunked_array([array]) for part, array in zip(struct.type, struct.flatten(), strict=True)}
        if not len(table):
            refuse(path, "at least one row", "none", "Check the file.")

        def take(role: str, name: str | None, *, contract: str, auto: bool = True) -> _Column | None:
            """Remove the column of a role from the features, and return it; without one, remove the contract's column."""
            if name is None:
                top.pop(contract, None)
                return None
            if name == AUTO:
                return _Column(contract, top.pop(contract)) if auto and contract in top else None
            for columns in (top, inner):
                if name in columns:
                    return _Column(name, columns.pop(name))
            raise self._no_column([*top, *inner], name, role)

        when = take("timestamp", roles.timestamp, contract="timestamp")
        assert when is not None
        rules = checked.TimeRules(roles.unit, self._limits.future_ms)
        times_ms = checked.times_ms(path, when.name, when.values, rules, required=True)
        named = take("id", roles.id, contract="impression_id")
        ids = None if named is None else checked.ids(path, named.name, named.values)
        clicked, delays_ms = self._clicks(
            take("clicked", roles.clicked, contract="clicked"),
            take("click_timestamp", roles.click_timestamp, contract="click_timestamp"),
            times_ms,
        )
        served = _served(
            path,
            take("score", roles.score, contract="score", auto=nested),
            take("model_version", roles.model_version, contract="model_version", auto=nested),
            take("delta", roles.delta, contract="delta", auto=nested),
        )
        features = self._features(top, inner)
        order = np.argsort(times_ms, kind="stable")
        index = pa.array(order)
        log = _Log(
            ids=None if ids is None else ids.take(index).to_pylist(),
            rows=order.astype(np.int64),
            times_ms=times_ms[order],
            clicked=clicked[order],
            delays_ms=delays_ms[order],
            served=None if served is None else served.take(index).to_pylist(),
            features={name: column.take(index) for name, column in features.items()},
        )
        self._check_sizes(log)
        return log

    def _check_roles(self) -> None:
        roles = self._columns
        taken: dict[str, str] = {}
        for role in ("timestamp", "id", "clicked", "click_timestamp", "score", "model_version", "delta", "user", "item"):
            name = getattr(roles, role)
            if name is None or name == AUTO or (role == "item" and taken.get(name) == "user"):
                continue
            if name in taken:
                raise DataSetError(
                    f"{self._path}: expected one role for the column {name!r}, found {taken[name]} and {role}. Copy the column "
                    "in the file, or leave one role out."
                )
            taken[name] = role

    def _features(self, top: dict[str, pa.ChunkedArray], inner: dict[str, pa.ChunkedArray]) -> dict[str, pa.ChunkedArray]:
        if both := sorted(set(top) & set(inner)):
            do = f"Leave both out (--drop {both[0]}), or rename one."
            refuse(self._path, f"one feature of the name {both[0]!r}", "a column and a member of `features`", do)
        features = {name: feature(self._path, name, column) for name, column in (top | inner).items()}
        if not features:
            refuse(self._path, "features beside the mapped columns", "none", "Map fewer columns, or drop fewer.")
        for name in (self._columns.user, self._columns.item, *self._columns.candidate):
            if name is not None and name not in features:
                raise self._no_column(list(features), name, "user, item or candidate feature")
        for name in (self._columns.user, self._columns.item):
            if name is not None:
                checked.digits(self._path, name, features[name])
        return features

    def _clicks(
        self,
        clicked: _Column | None,
        clicked_at: _Column | None,
        times_ms: Int64s,
    ) -> tuple[npt.NDArray[np.bool_], Int64s]:
        """Whether each row was clicked, (N,), and how long after the impression in ms, (N,)."""
        if clicked is None and clicked_at is None:
            do = "Map one of them: --column clicked=NAME, --column click_timestamp=NAME."
            raise DataSetError(f"{self._path}: expected a column of clicks or of click times, found neither. {do}")
        delays_ms = draw_delays(np.arange(len(times_ms), dtype=np.int64), seed=self._seed)
        labels = None if clicked is None else checked.labels(self._path, clicked.name, clicked.values)
        if clicked_at is None:
            assert labels is not None
            return labels, delays_ms
        name = clicked_at.name
        rules = checked.TimeRules(self._columns.unit, self._limits.future_ms)
        clicks_ms = checked.times_ms(self._path, name, clicked_at.values, rules, required=False)
        dated = clicks_ms >= 0
        labels = dated if labels is None else labels
        if len(wrong := np.flatnonzero(dated & ~labels)):
            do = f"Decide for one of them: --column clicked= takes the times, --drop {name} the labels."
            refuse(self._path, "no click time where the label is 0", "one", do, column=name, row=int(wrong[0]))
        delays_ms = np.where(dated, clicks_ms - times_ms, delays_ms)
        if len(wrong := np.flatnonzero(labels & (delays_ms < 0))):
            found = f"one {-int(delays_ms[wrong[0]])} ms before"
            do = "Fix the row, or check --unit."
            refuse(self._path, "clicks at or after their impressions", found, do, column=name, row=int(wrong[0]))
        return labels, delays_ms

    def _check_sizes(self, log: _Log) -> None:
        """Reject rows whose events would be larger than the topic accepts."""
        room = self._limits.event_bytes - _ENVELOPE_BYTES
        fixed = sum(len(name) * _ESCAPED + 32 for name in log.features)
        bytes_each = np.full(len(log), fixed, np.int64)
        if log.ids is not None:
            bytes_each += 2 * _ESCAPED * np.array([len(name.encode()) for name in log.ids])
        for column in log.features.values():
            if pa.types.is_string(column.type):
                bytes_each += _ESCAPED * pc.fill_null(pc.binary_length(column), 0).to_numpy()
            elif pa.types.is_list(column.type):
                bytes_each += [len(text.encode()) for text in tokens(column).to_pylist()]
        for index in np.flatnonzero(bytes_each > room).tolist():  # few rows: compute their exact sizes
            one = {name: column.slice(index, 1) for name, column in log.features.items()}
            length = len(members(one)[0].as_py().encode()) + 2 * len(log.ids[index].encode() if log.ids else b"")
            if length > room:
                row, most = int(log.rows[index]), self._limits.event_bytes
                do = "Leave columns out (--drop), or raise topics.max_message_bytes."
                refuse(self._path, f"events of at most {most} bytes (topics.max_message_bytes)", f"{length}", do, row=row)

    def _no_column(self, names: list[str], name: str, what: str) -> DataSetError:
        do = f"Map another one: --column {what}=NAME." if " " not in what else "Name another one."
        return DataSetError(printable(f"{self._path}: expected a column {name!r} ({what}), found {listed(names)}. {do}"))


def _served(path: Path, score: _Column | None, version: _Column | None, delta: _Column | None) -> pa.Array | None:
    """What the answer said with which each item was shown, as members of the event's JSON object, (N,) bytes."""
    parts = []
    if score is not None:
        parts.append((b',"score":', checked.scores(path, score.name, score.values)))
    if version is not None:
        parts.append((b',"model_version":', checked.model_versions(path, version.name, version.values)))
    if delta is not None:
        parts.append((b',"delta":', checked.delta_counts(path, delta.name, delta.values)))
    if not parts:
        return None
    written = []
    for opening, column in parts:
        values = column.to_pylist()
        written.append([b"" if value is None else opening + msgspec.json.encode(value) for value in values])
    return pa.array([b"".join(each) for each in zip(*written, strict=True)], pa.binary())
