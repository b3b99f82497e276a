"""The feature schema: which fields an impression carries and how each becomes embedding rows."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["FeatureSchema", "FieldSpec"]

Kind = Literal["categorical", "numeric", "list"]


class FieldSpec(BaseModel):
    """One field of `features`.

    ```toml
    [[features.fields]]
    name = "price"            # the name in the event
    kind = "numeric"          # categorical | numeric | list
    buckets = "log"           # numeric only: log | linear | scaled
    ```

    `categorical` takes a string or an integer, `list` a list of strings (mean pooled), `numeric` a finite number.
    null and a field that is absent are the same: the field's own "missing" row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    kind: Kind = "categorical"
    space: str | None = Field(
        default=None,
        description="Hash space; fields that name the same one share embeddings. The field's own name when unset.",
    )
    buckets: Literal["log", "linear", "scaled"] = Field(
        default="log",
        description="log: sign and floor(log2(1+|x|) * per_octave); linear: floor(x / width); "
        "scaled: one row times sign(x) * log(1+|x|).",
    )
    per_octave: int = Field(default=4, ge=1, le=64, description="Log buckets for each doubling of the value.")
    width: float = Field(default=1.0, gt=0, description="Width of a linear bucket, in the field's own unit.")

    @property
    def hash_space(self) -> str:
        return self.space or self.name


class FeatureSchema(BaseModel):
    """Every field the model reads, in order, and the width of their embeddings.

    ```toml
    [features]
    embedding_dim = 16
    fields = [{ name = "user_id" }, { name = "price", kind = "numeric" }, { name = "tags", kind = "list" }]
    ```

    Features of an event that are not named here are carried along and not used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: tuple[FieldSpec, ...] = ()
    embedding_dim: int = Field(default=16, ge=1, le=1024, description="Floats a feature; the FM needs one width for all.")

    @model_validator(mode="after")
    def _names_differ(self) -> FeatureSchema:
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"features.fields: each name once, found twice: {', '.join(twice)}")
        return self

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the schema: snapshots carry it, and a worker refuses one made for another schema."""
        encoded = msgspec.json.encode(self.model_dump(mode="json"), order="sorted")
        return hashlib.sha256(encoded).hexdigest()
