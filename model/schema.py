"""The feature schema: which fields the model reads and how each becomes embedding rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self
from zoneinfo import ZoneInfo

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

__all__ = ["FeatureSchema", "FieldSpec"]

Kind = Literal["categorical", "numeric", "list", "hour", "weekday", "cross"]

# Kinds of fields whose values events carry. The others are made of the event's time or of other fields.
_SENT: tuple[Kind, ...] = ("categorical", "numeric", "list")
_CLOCK: dict[Kind, int] = {"hour": 24, "weekday": 7}


class FieldSpec(BaseModel):
    """One field of `features.fields`.

    ```toml
    [[features.fields]]
    name = "price"      # the feature `price` of an event
    kind = "numeric"    # a number, so it is put into buckets
    buckets = "linear"  # bucket = floor(price / width)
    width = 5.0
    ```

    A null and an absent feature are the same: the field reads its own row for "missing".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="Name of the feature in events and score requests.")
    kind: Kind = Field(
        default="categorical",
        description="What the field's values are. `categorical`: a string or an integer, one row for each value. `numeric`: a "
        "finite number, put into buckets or scaled. `list`: a list of strings, whose rows are averaged. `hour` (0 to 23) and "
        "`weekday` (0, Monday, to 6): of the event's time in `features.timezone`; events don't carry them. `cross`: a row for "
        "each combination of the values of the fields `of`.",
    )
    space: str | None = Field(
        default=None,
        description="Hash space. Fields that name the same space share embeddings. The field's own name when unset.",
    )
    buckets: Literal["log", "linear", "scaled", "standard"] = Field(
        default="log",
        description="Which row a number x reads. `log`: a row for each sign and floor(log2(1 + |x|) × per_octave). `linear`: a "
        "row for each floor(x / width). `scaled`: one row, multiplied by sign(x) × log(1 + |x|). `standard`: one row, "
        "multiplied by (x - mean) / deviation, which is kept within -10 and 10.",
    )
    per_octave: int = Field(default=4, ge=1, le=64, description="Number of `log` buckets for each doubling of the value.")
    width: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Width of a `linear` bucket, in the feature's own unit."
    )
    mean: float = Field(
        default=0.0, allow_inf_nan=False, description="Mean that a `standard` field subtracts, in the feature's own unit."
    )
    deviation: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Standard deviation by which a `standard` field divides, in the feature's own unit.",
    )
    of: tuple[str, ...] = Field(
        default=(),
        description="Names of the two or more fields that a `cross` combines. With a list among them (one at most), it is one.",
    )
    serve_as: str | int | float | tuple[str, ...] | None = Field(
        default=None,
        union_mode="left_to_right",
        description="A value of the field. When set, the model learns the values that impressions carry, and scores every "
        "request with this one, whatever the request carries. It is for what isn't known when candidates are scored, such as "
        "their positions.",
    )

    @property
    def hash_space(self) -> str:
        return self.space or self.name

    @property
    def is_sent(self) -> bool:
        """Whether events carry the field's values."""
        return self.kind in _SENT

    @property
    def is_scaled(self) -> bool:
        """Whether the field has one row, which is multiplied by a number."""
        return self.kind == "numeric" and self.buckets in ("scaled", "standard")

    @field_validator("serve_as", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected a value of the field, found true or false, which no field has")
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> FieldSpec:
        if self.kind == "cross":
            if len(self.of) < 2 or len(set(self.of)) < len(self.of):
                raise ValueError(
                    f"field {self.name}: expected `of` to name two or more different fields, found {list(self.of)}"
                )
            if self.serve_as is not None:
                raise ValueError(f"field {self.name}: expected serve_as on the fields that it crosses, found it on the cross")
        elif self.of:
            raise ValueError(f'field {self.name}: expected `of` with kind = "cross" only, found it with "{self.kind}"')
        if self.serve_as is not None and not self._takes(self.serve_as):
            raise ValueError(f"field {self.name}: expected serve_as to be {self._expected()}, found {self.serve_as!r}")
        return self

    def _takes(self, value: str | int | float | tuple[str, ...]) -> bool:
        if self.kind == "list":
            return isinstance(value, tuple)
        is_integer = isinstance(value, int) and -(1 << 63) <= value < 1 << 64  # larger ones can't be in a version's manifest
        if self.kind == "numeric":
            return is_integer or (isinstance(value, float) and math.isfinite(value))
        if self.kind in _CLOCK:
            return isinstance(value, int) and 0 <= value < _CLOCK[self.kind]
        return isinstance(value, str) or is_integer

    def _expected(self) -> str:
        if self.kind in _CLOCK:
            return f"a whole number from 0 to {_CLOCK[self.kind] - 1}"
        return {"list": "a list of strings", "numeric": "a finite number"}.get(self.kind, "a string or an integer")

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out settings that 0.1.0 doesn't have, unless they are used: such a release reads what it understands."""
        return _without_defaults(self, handler(self), ("mean", "deviation", "of", "serve_as"))


class FeatureSchema(BaseModel):
    """Every field the model reads, in order, and the width of their embeddings.

    ```toml
    [features]
    embedding_dim = 16  # a value is 16 floats; the FM needs one width for all fields
    fields = [
      { name = "user_id" },                  # a string or an integer: one row for each value
      { name = "price", kind = "numeric" },  # a number: one row for each bucket
      { name = "tags", kind = "list" },      # a list of strings: the average of their rows
      { name = "hour", kind = "hour" },      # 0 to 23, of the time of the impression or of the request
      { name = "both", kind = "cross", of = ["user_id", "tags"] },  # a row for each pair of them
    ]
    ```

    Features of an event that are not named here are kept in `examples`, and the model doesn't read them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: tuple[FieldSpec, ...] = Field(
        default=(),
        description="The fields that the model reads, in order. Trainer and scorer need at least one, and the same ones.",
    )
    embedding_dim: int = Field(
        default=16, ge=1, le=1024, description="Number of floats in an embedding, the same for all fields, as the FM needs."
    )
    timezone: str = Field(
        default="UTC",
        description="Time zone of `hour` and `weekday` fields, by its name in the tz database, as `Europe/Paris`.",
    )

    @field_validator("timezone")
    @classmethod
    def _zone_exists(cls, value: str) -> str:
        try:
            if value != "UTC":  # which needs no tz database
                ZoneInfo(value)
        except (OSError, ValueError) as error:  # ZoneInfoNotFoundError is a KeyError
            raise ValueError(f"expected the name of a time zone, as Europe/Paris, found {value!r}") from error
        except KeyError as error:
            raise ValueError(
                f"expected the name of a time zone that this machine knows, as Europe/Paris, found {value!r}. Where the system "
                "has no tz database, install the Python package tzdata"
            ) from error
        return value

    @model_validator(mode="after")
    def _fields_fit(self) -> FeatureSchema:
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"features.fields: each name once, found twice: {', '.join(twice)}")
        by_name = {field.name: field for field in self.fields}
        for field in self.fields:
            unknown = [name for name in field.of if name not in by_name]
            if unknown:
                raise ValueError(f"field {field.name}: expected names of other fields in `of`, found {', '.join(unknown)}")
            parts = [by_name[name] for name in field.of]
            if any(part.kind == "cross" or part.is_scaled for part in parts):
                wrong = next(part for part in parts if part.kind == "cross" or part.is_scaled)
                what = "a cross" if wrong.kind == "cross" else f'a number with buckets = "{wrong.buckets}", which has one row'
                do = "Name the fields of that cross." if wrong.kind == "cross" else 'Add a field for it with buckets = "log".'
                raise ValueError(
                    f"field {field.name}: expected fields with a row for each value, found {wrong.name}: {what}. {do}"
                )
            if sum(part.kind == "list" for part in parts) > 1:
                raise ValueError(f"field {field.name}: expected one list at most in `of`, found several: {', '.join(field.of)}")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, with some settings replaced and not validated again."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[name]  # pydantic copies what the properties below have found out, too
        return copy

    @cached_property
    def singles(self) -> tuple[FieldSpec, ...]:
        """The fields with one value each, in order: the first fields of a batch."""
        return tuple(field for field in self.fields if not self.is_list(field))

    @cached_property
    def lists(self) -> tuple[FieldSpec, ...]:
        """The fields with a list of values, in order: the last fields of a batch."""
        return tuple(field for field in self.fields if self.is_list(field))

    @cached_property
    def sent(self) -> tuple[FieldSpec, ...]:
        """The fields whose values impressions carry, in order."""
        return tuple(field for field in self.fields if field.is_sent)

    @cached_property
    def asked(self) -> tuple[FieldSpec, ...]:
        """The fields whose values are read from score requests, in order: those of `sent` without a value to serve as."""
        return tuple(field for field in self.sent if field.serve_as is None)

    @cached_property
    def constant(self) -> tuple[FieldSpec, ...]:
        """The fields that have the same value in all requests."""
        return tuple(field for field in self.fields if field.serve_as is not None)

    @cached_property
    def reads_time(self) -> bool:
        """Whether a field is made of the event's time."""
        return any(field.kind in _CLOCK for field in self.fields)

    def parts(self, field: FieldSpec) -> tuple[FieldSpec, ...]:
        """The fields that a cross combines, in its own order; none for another field."""
        return tuple(self._by_name[name] for name in field.of)

    @cached_property
    def _by_name(self) -> dict[str, FieldSpec]:
        return {field.name: field for field in self.fields}

    def is_list(self, field: FieldSpec) -> bool:
        """Whether an example has a list of values of the field."""
        return field.kind == "list" or any(part.kind == "list" for part in self.parts(field))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the schema. Versions carry it: those with the same one read the same features."""
        encoded = msgspec.json.encode(self.model_dump(mode="json"), order="sorted")
        return hashlib.sha256(encoded).hexdigest()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out settings that 0.1.0 doesn't have, unless they are used."""
        return _without_defaults(self, handler(self), ("timezone",))


def _without_defaults(model: BaseModel, values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    fields = type(model).model_fields
    return {name: value for name, value in values.items() if name not in names or getattr(model, name) != fields[name].default}
