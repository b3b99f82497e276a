"""The feature schema: which fields an impression carries and how each becomes embedding rows."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["FeatureSchema", "FieldSpec"]

Kind = Literal["categorical", "numeric", "list"]


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
        description="What the feature's values are. `categorical`: a string or an integer, one row for each value. `numeric`: "
        "a finite number, put into buckets. `list`: a list of strings, whose rows are averaged.",
    )
    space: str | None = Field(
        default=None,
        description="Hash space. Fields that name the same space share embeddings. The field's own name when unset.",
    )
    buckets: Literal["log", "linear", "scaled"] = Field(
        default="log",
        description="Which row a number x reads. `log`: a row for each sign and floor(log2(1 + |x|) × per_octave). `linear`: a "
        "row for each floor(x / width). `scaled`: one row, multiplied by sign(x) × log(1 + |x|).",
    )
    per_octave: int = Field(default=4, ge=1, le=64, description="Number of `log` buckets for each doubling of the value.")
    width: float = Field(default=1.0, gt=0, description="Width of a `linear` bucket, in the feature's own unit.")

    @property
    def hash_space(self) -> str:
        return self.space or self.name


class FeatureSchema(BaseModel):
    """Every field the model reads, in order, and the width of their embeddings.

    ```toml
    [features]
    embedding_dim = 16  # a value is 16 floats; the FM needs one width for all fields
    fields = [
      { name = "user_id" },                  # a string or an integer: one row for each value
      { name = "price", kind = "numeric" },  # a number: one row for each bucket
      { name = "tags", kind = "list" },      # a list of strings: the average of their rows
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

    @model_validator(mode="after")
    def _names_differ(self) -> FeatureSchema:
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"features.fields: each name once, found twice: {', '.join(twice)}")
        return self

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the schema. Snapshots carry it, and a worker rejects a snapshot of another schema."""
        encoded = msgspec.json.encode(self.model_dump(mode="json"), order="sorted")
        return hashlib.sha256(encoded).hexdigest()
