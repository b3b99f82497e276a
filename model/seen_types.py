"""The Arrow types of features. JSON doesn't say whether a categorical value is a string or an integer; the last record does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from model.schema import FieldSpec

__all__ = ["SeenTypes", "default_type"]


def default_type(spec: FieldSpec) -> pa.DataType:
    """Arrow's type for the values of a field, as long as nothing else was seen."""
    return {"categorical": pa.string(), "numeric": pa.float64(), "list": pa.list_(pa.string())}[spec.kind]


class SeenTypes:
    """The types (string or integer) that the categorical fields of one `features` object of the records had last."""

    def __init__(self, fields: Sequence[FieldSpec]) -> None:
        self._fields = fields
        self._types: dict[str, pa.DataType] = {}
        self._struct: pa.DataType | None = None

    @property
    def struct(self) -> pa.DataType:
        """Arrow's type of the whole object."""
        if self._struct is None:
            types = self._types
            self._struct = pa.struct([(spec.name, types.get(spec.name, default_type(spec))) for spec in self._fields])
        return self._struct

    def guess(self, features: Any) -> bool:
        """Reads the types off one features object. True if a type has changed."""
        if not isinstance(features, dict):
            return False
        before = dict(self._types)
        for spec in self._fields:
            value = features.get(spec.name)
            if spec.kind == "categorical" and isinstance(value, str | int) and not isinstance(value, bool):
                self._types[spec.name] = pa.string() if isinstance(value, str) else pa.int64()
        if before == self._types:
            return False
        self._struct = None
        return True
