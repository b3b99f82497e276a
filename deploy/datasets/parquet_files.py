"""Parquet as a table: one file, or a folder of parts. A column must have the same type in every part."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset

from deploy.datasets.refusal import refuse
from deploy.datasets.text_files import one_line

__all__ = ["read_parquet"]

# The columns in which pandas keeps row numbers.
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


def read_parquet(path: Path, drop: Collection[str] = ()) -> tuple[pa.Table, list[str]]:
    """The whole table without the columns of `drop`, and the names of all columns.

    The parts in a folder named `day=2024-05-01` get a text column `day`. If a part lacks a column, its values are null.

    Raises:
        DataSetError: it isn't Parquet, or a column has different types in different parts.
    """
    try:
        data_set = pyarrow.dataset.dataset(path, format="parquet", partitioning=_folders(path))
        schema = _one_schema(path, data_set)
        table = data_set.replace_schema(schema).to_table()
        table.validate(full=True)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        refuse(path, "Parquet", one_line(error), "Check that the file is whole and that it is Parquet.")
    names = table.column_names
    left_out = {name for name in names if name in drop or _PANDAS_INDEX.fullmatch(name)}
    table = table.drop_columns(list(left_out))
    at = table.schema.get_field_index("features")
    if at < 0 or not pa.types.is_struct(table.schema.field(at).type):
        return table, names
    features = table.column(at).combine_chunks()
    members = [field.name for field in features.type]
    if features.null_count:
        row = features.is_null().index(pa.scalar(True)).as_py()
        refuse(path, "an object of features", "null", "Fill it, or leave the row out.", column="features", row=row)
    _check_names(path, members, column="features")
    kept = [name for name in members if name not in drop]
    # By flatten: unlike field, it applies the offset of a sliced array.
    parts = dict(zip(members, features.flatten(), strict=True))
    nested = pa.StructArray.from_arrays([parts[name] for name in kept], kept) if kept else None
    names = [*names, *members]
    return (table.drop_columns(["features"]) if nested is None else table.set_column(at, "features", nested)), names


def _folders(path: Path) -> pyarrow.dataset.Partitioning | None:
    """The columns in the names of folders, all as text, so that `007` stays `007`."""
    if not path.is_dir():
        return None
    keys: dict[str, None] = {}
    for file in sorted(path.rglob("*")):
        for folder in file.relative_to(path).parts[:-1]:
            if "=" in folder:
                keys[folder.partition("=")[0]] = None
    return pyarrow.dataset.partitioning(pa.schema([(key, pa.string()) for key in keys]), flavor="hive") if keys else None


def _one_schema(path: Path, data_set: pyarrow.dataset.Dataset) -> pa.Schema:
    """The columns of all parts together. Raises DataSetError: a column has different types in different parts."""
    fields: dict[str, tuple[pa.Field, str]] = {}
    for fragment in data_set.get_fragments():
        schema = fragment.physical_schema
        _check_names(path, schema.names)
        for field in schema:
            first, where = fields.setdefault(field.name, (field, fragment.path))
            if pa.types.is_null(first.type):
                fields[field.name] = field, fragment.path
            elif field.type != first.type and not pa.types.is_null(field.type):
                part = Path(fragment.path).name
                found = f"{field.type} in {part} and {first.type} in {Path(where).name}"
                do = f"Write the parts with one schema, or leave the column out: --drop {field.name}."
                refuse(path, "one type in all parts", found, do, column=field.name)
    own = [field for field, _ in fields.values()]
    return pa.schema([*own, *(field for field in data_set.schema if field.name not in fields)])


def _check_names(path: Path, names: list[str], column: str | None = None) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        refuse(path, "columns of different names", f"{twice[0]!r} twice", "Rename one of them.", column=column)
