"""Random files: what is sent is what the join and the trainer take, to the last value; all else is refused before."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deploy.datasets import FileDataSet
from deploy.errors import DataSetError
from deploy.feeding.replay import impressions
from model.features import FeatureDecoder
from model.features_reference import decode_impression
from model.schema import FeatureSchema
from stream.join.events import read_run
from stream.settings import JoinSettings

T = 1_700_000_000_000
# Without half surrogate pairs, which no UTF-8 file can hold.
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
odd_text = st.sampled_from(
    ["007", "1e5", "NaN", "null", "true", '"', "a,b", "é猫", "2021-01-01", " x ", "\t", "0x1f", "-", "\\N", ""]
)
strings = text | odd_text


@dataclass(frozen=True)
class Column:
    """The values of a column, what is to arrive for each, and whether it may be sent at all (None: either)."""

    values: list[Any]
    arrives: list[Any]
    good: bool
    kind: pa.DataType | None = None


def column(
    items: st.SearchStrategy[Any],
    rows: int,
    *,
    arrives: Callable[[Any], Any] = lambda value: value,
    good: Callable[[list[Any]], bool] = lambda values: True,
    kind: pa.DataType | None = None,
    nulls: bool = True,
) -> st.SearchStrategy[Column]:
    each = st.none() | items if nulls else items
    drawn = st.lists(each, min_size=rows, max_size=rows)
    return drawn.map(
        lambda values: Column(values, [None if value is None else arrives(value) for value in values], good(values), kind)
    )


def any_value(test: Callable[[Any], bool]) -> Callable[[list[Any]], bool]:
    """Good where no value passes the test; nulls are never bad."""
    return lambda values: not any(value is not None and test(value) for value in values)


def finite_or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def json_features(rows: int) -> st.SearchStrategy[Column]:
    whole = st.integers(-(2**53), 2**53) | st.integers(-(2**63), 2**64 - 1)
    fits = any_value(lambda v: not -(2**63) <= v < 2**64)
    return st.one_of(
        column(strings, rows),
        column(whole, rows, good=fits),
        column(whole | st.floats(-1e6, 1e6), rows, good=_one_number),
        column(st.booleans(), rows, arrives=int),
        column(st.floats(allow_infinity=False), rows, arrives=finite_or_null),
        column(st.lists(strings, max_size=3), rows),
        column(st.lists(st.integers(-9, 2**40), max_size=3), rows, arrives=lambda v: [str(item) for item in v]),
        column(st.integers(2**64, 2**80), rows, nulls=False, good=lambda values: False),
        column(st.floats(min_value=1.0) | st.just(math.inf), rows, good=any_value(math.isinf)),
        column(st.dictionaries(text, text, max_size=2), rows, good=any_value(lambda v: True)),
        column(st.lists(st.floats(0, 1), min_size=1, max_size=2), rows, good=any_value(lambda v: True)),
        column(st.lists(st.none(), min_size=1, max_size=2), rows, good=any_value(lambda v: True)),
    )


def _one_number(values: list[Any]) -> bool:
    """Whether a column of whole numbers and fractions loses nothing: as floats, where there is one."""
    return all(value is None or float(value) == value for value in values) or not any(isinstance(v, float) for v in values)


def parquet_features(rows: int) -> st.SearchStrategy[Column]:
    two_places = st.decimals(-1_000, 1_000, places=2, allow_nan=False)
    return st.one_of(
        column(strings, rows, kind=pa.string()),
        column(strings, rows, kind=pa.dictionary(pa.int32(), pa.string())),
        column(strings, rows, kind=pa.large_string()),
        column(st.integers(-(2**31), 2**31 - 1), rows, kind=pa.int32()),
        column(st.integers(0, 2**64 - 1), rows, kind=pa.uint64()),
        column(st.floats(allow_infinity=False, width=32), rows, arrives=finite_or_null, kind=pa.float32()),
        column(st.booleans(), rows, arrives=int, kind=pa.bool_()),
        column(two_places, rows, arrives=float, kind=pa.decimal128(10, 2)),
        column(st.integers(-(2**63), 2**63 - 1).map(Decimal), rows, arrives=int, kind=pa.decimal128(30, 0)),
        column(st.lists(strings, max_size=3), rows, kind=pa.list_(pa.string())),
        column(st.lists(st.integers(0, 9), max_size=2), rows, arrives=lambda v: [str(i) for i in v], kind=pa.list_(pa.int8())),
        column(st.none(), rows, kind=pa.null()),
        column(st.binary(max_size=3), rows, kind=pa.binary(), good=lambda values: False),
        column(st.dates(date(2000, 1, 1)), rows, kind=pa.date32(), good=lambda values: False),
        column(st.integers(0, 10**12), rows, kind=pa.timestamp("us"), good=lambda values: False),
        column(st.just([0.5]), rows, kind=pa.list_(pa.float32()), good=lambda values: False),
        column(st.just({"a": 1}), rows, kind=pa.struct([("a", pa.int64())]), good=lambda values: False),
    )


ZONES = [UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-3))]


def event_times(rows: int) -> st.SearchStrategy[Column]:
    near = st.integers(T - 10**9, T + 10**9)

    def iso(drawn: tuple[int, timezone, str, bool]) -> tuple[str, int]:
        ms, zone, separator, zulu = drawn
        when = datetime.fromtimestamp(ms // 1_000, zone) + timedelta(milliseconds=ms % 1_000)
        written = when.isoformat(separator, "milliseconds")
        return (written.replace("+00:00", "Z" if zulu else ""), ms)

    isos = st.tuples(near, st.sampled_from(ZONES), st.sampled_from("T "), st.booleans()).map(iso)
    return st.one_of(
        column(near, rows, nulls=False),
        column(near.map(float), rows, nulls=False, arrives=int),
        column(near.map(str), rows, nulls=False, arrives=int),
        st.lists(isos, min_size=rows, max_size=rows).map(lambda d: Column([t for t, _ in d], [ms for _, ms in d], True)),
        column(near.map(lambda ms: ms // 1_000), rows, nulls=False, good=lambda values: False),
        column(near, rows, good=lambda values: None not in values),
        column(st.sampled_from(["noon", "2023-11-14", "2023-13-01T00:00:00Z"]), rows, nulls=False, good=lambda values: False),
    )


def all_labels(rows: int) -> st.SearchStrategy[Column]:
    return st.one_of(
        column(st.integers(0, 1), rows, nulls=False),
        column(st.booleans(), rows, nulls=False, arrives=int),
        column(st.sampled_from([0.0, 1.0]), rows, nulls=False, arrives=int),
        column(st.integers(0, 1), rows, good=lambda values: None not in values),
        column(st.integers(0, 3), rows, nulls=False, good=lambda values: max(values) < 2),
        column(st.just(math.nan) | st.just(1.0), rows, nulls=False, good=any_value(math.isnan)),
    )


def some_ids(rows: int) -> st.SearchStrategy[Column | None]:
    def unique(values: list[Any]) -> bool:
        return None not in values and "" not in values and len(set(values)) == len(values)

    return st.one_of(
        st.none(),
        st.lists(st.integers(-(2**63), 2**80), unique=True, min_size=rows, max_size=rows).map(
            lambda v: Column(v, [str(i) for i in v], True)
        ),
        st.lists(text.filter(bool), unique=True, min_size=rows, max_size=rows).map(lambda v: Column(v, v, True)),
        column(st.sampled_from(["a", "b", "c"]), rows, nulls=False, good=unique),
        column(st.sampled_from(["a", "b", "c", "d", ""]), rows, nulls=False, good=unique),
        column(st.integers(0, 2), rows, arrives=str, good=unique),
    )


@st.composite
def tables(draw: st.DrawFn, features: Callable[[int], st.SearchStrategy[Column]]) -> dict[str, Column]:
    """A file's columns, all good but for one kind of them, so that each fault is seen on its own."""
    rows = draw(st.integers(1, 5))
    faulty = draw(st.sampled_from(["none", "timestamp", "clicked", "impression_id", "feature"]))

    def drawn(what: str, strategy: st.SearchStrategy[Any]) -> Any:
        return draw(strategy if what == faulty else strategy.filter(lambda each: each is None or each.good))

    names = draw(st.lists(text.filter(bool).filter(lambda name: name not in RESERVED), unique=True, min_size=1, max_size=3))
    table = {"timestamp": drawn("timestamp", event_times(rows)), "clicked": drawn("clicked", all_labels(rows))}
    ids = drawn("impression_id", some_ids(rows))
    if ids is not None:
        table["impression_id"] = ids
    return table | {name: drawn("feature", features(rows)) for name in names}


RESERVED = {"timestamp", "clicked", "impression_id", "features"}


def check(table: dict[str, Column], file: Path, kind: str) -> None:
    """The file is refused if and only if a column is bad; otherwise every value arrives."""
    data_set = FileDataSet(file, kind)
    good = all(each.good for each in table.values())
    try:
        chunks = list(data_set.chunks())
    except DataSetError as error:
        assert not good, f"refused: {error}"
        assert "\n" not in str(error)
        assert str(error).startswith(str(file))
        return
    assert good, {name: each.values for name, each in table.items() if not each.good}
    (chunk,) = chunks
    values = impressions(chunk, range(len(chunk)), {})
    rows = len(chunk)
    ids = table["impression_id"].arrives if "impression_id" in table else [str(row) for row in range(rows)]
    features = {name: each.arrives for name, each in table.items() if name not in RESERVED}
    sent = {
        ids[row]: (
            table["timestamp"].arrives[row],
            bool(table["clicked"].arrives[row]),
            {name: arrives[row] for name, arrives in features.items()},
        )
        for row in range(rows)
    }
    arrived = {
        event["impression_id"]: (event["timestamp"], clicked, event["features"])
        for event, clicked in zip(map(json.loads, values), chunk.clicked.tolist(), strict=True)
    }
    assert arrived == sent

    records: list[Any] = [
        SimpleNamespace(key=name.encode(), value=value, timestamp=T + 2 * 10**9, offset=offset, headers=())
        for offset, (name, value) in enumerate(zip(chunk.ids, values, strict=True))
    ]
    join = JoinSettings()
    run = read_run(records, join.max_future_ms, join.max_future_ms)
    assert (len(run), run.dead) == (rows, [])
    schema = data_set.schema()
    data_set.check(schema)
    decoded = FeatureDecoder(schema).impressions(values)
    assert decoded.bad == []
    read = [decode_impression(value, schema).values for value in values]
    assert read == [_as_read(json.loads(value)["features"], schema) for value in values]


def _as_read(features: dict[str, Any], schema: FeatureSchema) -> list[Any]:
    """What the trainer makes of the values: categories are texts, a number written without a fraction included."""
    return [
        str(int(value)) if spec.kind == "categorical" and isinstance(value, int | float) else value
        for spec, value in ((spec, features[spec.name]) for spec in schema.fields)
    ]


quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@quick
@given(table=tables(json_features), nested=st.booleans(), dress=st.integers(0, 3))
def test_json_lines(tmp_path: Path, table: dict[str, Column], nested: bool, dress: int) -> None:
    lines = []
    for row in range(len(table["timestamp"].values)):
        whole = {name: each.values[row] for name, each in table.items()}
        if nested:
            whole = {name: whole.pop(name) for name in RESERVED & whole.keys()} | {"features": whole}
        lines.append(json.dumps(whole, ensure_ascii=bool(dress & 1)))
    written = (b"\xef\xbb\xbf" if dress & 2 else b"") + ("\r\n" if dress & 1 else "\n").join(lines).encode()
    file = tmp_path / "log"
    file.write_bytes(gzip.compress(written) if dress == 3 else written)
    check(table, file, "jsonl")


@quick
@given(table=tables(parquet_features))
def test_parquet(tmp_path: Path, table: dict[str, Column]) -> None:
    columns = {}
    for name, each in table.items():
        values = pa.array([str(value) for value in each.values]) if _long(each) else pa.array(each.values, each.kind)
        columns[name] = values
    file = tmp_path / "log"
    pq.write_table(pa.table(columns), file)
    check(table, file, "parquet")


def _long(each: Column) -> bool:
    """Ids beyond 64 bits, which Parquet holds as text."""
    return each.kind is None and any(isinstance(value, int) and abs(value) >= 2**63 for value in each.values)


def csv_features(rows: int) -> st.SearchStrategy[Column]:
    # Quoted, so that a text stays a text: only what is written without quotes is missing. NUL ends a field for some readers.
    words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00\r"), min_size=1, max_size=6)
    return st.one_of(
        column(words.map(lambda word: f"_{word}"), rows),
        column(st.integers(-(2**63), 2**63 - 1), rows),
        column(st.floats(allow_nan=False, allow_infinity=False).map(lambda v: v + 0.0), rows),
        column(st.booleans(), rows, arrives=int),
        column(st.sampled_from(["007", "0123"]), rows),
    )


@quick
@given(table=tables(csv_features))
def test_csv(tmp_path: Path, table: dict[str, Column]) -> None:
    names = list(table)
    assume(not any(set(name) & {"\x00", "\r"} for name in names))
    if "impression_id" in table:  # unquoted, such an id is a missing value
        assume(not {"NaN", "nan", "NULL", "null", "NA", "N/A", "\\N"} & set(table["impression_id"].arrives))
        assume(not any(set(str(name)) & {"\x00", "\r"} for name in table["impression_id"].values))
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writerow(names)
    for row in range(len(table["timestamp"].values)):
        cells = [table[name].values[row] for name in names]
        writer.writerow(["" if cell is None else repr(cell) if isinstance(cell, float) else cell for cell in cells])
    file = tmp_path / "log.csv"
    file.write_text(out.getvalue())
    check(table, file, "csv")


def test_the_oracle_itself_sees_a_lost_digit(tmp_path: Path) -> None:
    """A file whose value differs from what the table says must not pass."""
    table = {
        "timestamp": Column([T], [T], good=True),
        "clicked": Column([1], [1], good=True),
        "f": Column([2**53 + 1], [2**53 + 1], good=True),
    }
    file = tmp_path / "log"
    file.write_text(json.dumps({"timestamp": T, "clicked": 1, "f": 2**53}))
    with pytest.raises(AssertionError):
        check(table, file, "jsonl")
