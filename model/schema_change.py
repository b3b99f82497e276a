"""Whether a model of one schema can go on as a model of another, and what changes by that.

A field is the same if its name and the meaning of its keys are. Another meaning under the same name (a bucket of another width)
would read rows that were learned for something else, so it is refused. `model.migration` moves the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import SnapshotMismatch
from model.schema import FeatureSchema, FieldSpec

__all__ = ["SchemaChange"]


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """From the schema that a version was trained with to another one.

        change = SchemaChange.between(before, after)  # SnapshotMismatch: a new model has to be begun
        for sentence in change.explained(): ...

    before, after  the schemas
    came_from      for each field of a batch, singles first, the index that it had before; None for a new field
    """

    before: FeatureSchema
    after: FeatureSchema
    came_from: tuple[int | None, ...]

    @classmethod
    def between(cls, before: FeatureSchema, after: FeatureSchema) -> SchemaChange:
        """What changes from one schema to another.

        Raises:
            SnapshotMismatch: a model of the one can't go on as a model of the other.
        """
        problems = []
        if before.embedding_dim != after.embedding_dim:
            problems.append(f"features.embedding_dim: expected {after.embedding_dim}, found {before.embedding_dim}")
        had = {field.name: field for field in before.fields}
        for field in after.fields:
            if field.name in had:
                problems += _differences(had[field.name], field, before, after)
        had_index = {field.name: index for index, field in enumerate(_in_batches(before))}
        came_from = tuple(had_index.get(field.name) for field in _in_batches(after))
        if not problems and all(index is None for index in came_from):
            problems.append(f"features.fields: expected one of {_named(after.fields)}, found only {_named(before.fields)}")
        if problems:
            raise SnapshotMismatch("\n  ".join(problems))
        return cls(before, after, came_from)

    @property
    def is_none(self) -> bool:
        """Whether the schemas are the same."""
        return self.before.fingerprint() == self.after.fingerprint()

    @property
    def moves_nothing(self) -> bool:
        """Whether batches have the same fields in the same order as before."""
        return self.came_from == tuple(range(len(self.before.fields)))

    @property
    def keeps_scores(self) -> bool:
        """Whether the weights score as before, given that the features are the same: then no field reads other weights now."""
        names = {field.name for field in self.after.fields}
        spaces = {field.hash_space for field in self.before.fields}
        new = [field for field, index in zip(_in_batches(self.after), self.came_from, strict=True) if index is None]
        return all(field.name in names for field in self.before.fields) and not any(field.hash_space in spaces for field in new)

    @property
    def serves_alike(self) -> bool:
        """Whether fields have the same values in score requests as before."""
        have = {field.name: field.serve_as for field in self.after.fields}
        return all(have.get(field.name, field.serve_as) == field.serve_as for field in self.before.fields)

    def explained(self) -> list[str]:
        """What changes, a sentence for each field that isn't as it was."""
        had = {field.name: field for field in self.before.fields}
        have = {field.name: field for field in self.after.fields}
        spaces = {field.hash_space for field in self.before.fields}
        said = []
        for name, field in have.items():
            if name not in had and field.hash_space in spaces:
                said.append(f"{name} is new and reads the rows of {field.hash_space}, which exist: scores change at once")
            elif name not in had:
                said.append(f"{name} is new: it begins without effect on scores, and learns from now on")
            elif field.serve_as != had[name].serve_as:
                said.append(f"{name} is served as {_shown(field)}, and was served as {_shown(had[name])}")
        said += [f"{name} is gone: its rows stay, and are not read" for name in had if name not in have]
        same = [field.name for field in self.before.fields] == [field.name for field in self.after.fields]
        return said or ["a setting has changed that no field reads" if same else "the fields are in another order"]


def _in_batches(schema: FeatureSchema) -> tuple[FieldSpec, ...]:
    return (*schema.singles, *schema.lists)


def _meaning(field: FieldSpec, schema: FeatureSchema) -> dict[str, object]:
    """What the field's keys and factors depend on."""
    found: dict[str, object] = {"kind": field.kind, "space": field.hash_space}
    if field.kind == "numeric":
        found["buckets"] = field.buckets
        more = {"log": ("per_octave",), "linear": ("width",), "standard": ("mean", "deviation")}.get(field.buckets, ())
        found |= {name: getattr(field, name) for name in more}
    elif field.kind == "cross":
        found["of"] = list(field.of)
    elif field.kind in ("hour", "weekday"):
        found["timezone"] = schema.timezone
    return found


def _differences(had: FieldSpec, have: FieldSpec, before: FeatureSchema, after: FeatureSchema) -> list[str]:
    found, expected = _meaning(had, before), _meaning(have, after)
    differs = [name for name in (*expected, *found) if found.get(name) != expected.get(name)]
    if not differs:
        return []
    name = differs[0]
    return [
        f"features.fields[{have.name}]: expected {name} = {expected.get(name)!r}, found {found.get(name)!r}. To change what a "
        "field means, give it another name: it then begins anew, and the other fields keep what they have learned"
    ]


def _shown(field: FieldSpec) -> str:
    return "it is sent" if field.serve_as is None else repr(field.serve_as)


def _named(fields: Sequence[FieldSpec]) -> str:
    names = [field.name for field in fields]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
