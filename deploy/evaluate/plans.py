"""Runs as a user names them: settings as KEY=VALUE, runs that differ from a base, fields that are left out or added."""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from deploy.errors import ConfigError
from deploy.evaluate.runs import Plan
from deploy.feeding.simulation import Simulation
from deploy.settings import Settings, load_settings, settings_file
from model.schema import FeatureSchema, FieldSpec

__all__ = ["assignment", "field_spec", "merged", "named_run", "plan", "simulation_of", "without"]

Overrides = Mapping[str, Any]

SIMULATED = 100_000
"""Impressions of a simulation, unless it is said: enough for a model to learn most of what there is to learn."""


def assignment(text: str) -> dict[str, Any]:
    """`model.hidden=[200, 100]` → `{"model": {"hidden": [200, 100]}}`. The value is TOML; text needs no quotes.

    Raises:
        ConfigError: it isn't SECTION.KEY=VALUE.
    """
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(f"setting: expected SECTION.KEY=VALUE, as in model.batch_rows=512, found {text!r}. Correct it.")
    nested: Any = _toml(value)
    for name in reversed(path):
        nested = {name: nested}
    return dict(nested)


def _toml(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value.strip()


def merged(*each: Overrides) -> dict[str, Any]:
    """Several overrides as one; later ones win."""
    whole: dict[str, Any] = {}
    for one in each:
        for name, value in one.items():
            inner = whole.get(name)
            whole[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return whole


class NamedRun(NamedTuple):
    """A run and what is different in it."""

    name: str
    overrides: dict[str, Any]


def named_run(text: str) -> NamedRun:
    """`wide model.hidden=[800] model.batch_rows=512` → its name, and its overrides.

    Raises:
        ConfigError: it has no name, no setting, or what can't be read as a setting.
    """
    try:
        name, *settings = shlex.split(text)
    except ValueError:
        name, settings = "", []
    if not name or "=" in name or not settings:
        raise ConfigError(
            f"run: expected a name and settings, as in 'wide model.hidden=[800] model.batch_rows=512', found {text!r}. "
            "Correct --run."
        )
    return NamedRun(name, merged(*map(assignment, settings)))


def field_spec(text: str) -> FieldSpec:
    """A field as in the settings: `{ name = "price", kind = "numeric" }`.

    Raises:
        ConfigError: it isn't a TOML table, or no field.
    """
    try:
        return FieldSpec.model_validate(tomllib.loads(f"field = {text}")["field"])
    except tomllib.TOMLDecodeError as error:
        found = f"{text!r}, which is no TOML: {error}"
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{text!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    raise ConfigError(f'field: expected a field as in [features], {{ name = "price" }}, found {found}. Correct --field.')


def plan(name: str, overrides: Overrides, schema: FeatureSchema, more: Sequence[FieldSpec] = ()) -> Plan:
    """A run with the user's settings and these overrides.

    Args:
        schema: of the data set. It is read where neither the user's settings nor the overrides name fields.
        more: fields to add, or to put in the place of others of the same name.

    Raises:
        ConfigError: a setting is unknown or of the wrong kind.
    """
    try:
        settings = load_settings(**overrides)
    except ConfigError as error:
        # The overrides are what is wrong, unless the settings are wrong without them.
        load_settings()
        raise ConfigError(str(error).replace(f"{settings_file()}: ", f"run {name!r}: ")) from error
    features = settings.features
    if not features.fields:
        given = {} if "embedding_dim" not in features.model_fields_set else {"embedding_dim": features.embedding_dim}
        features = features.model_copy(update={"fields": schema.fields, "embedding_dim": schema.embedding_dim, **given})
    replaced = {spec.name: spec for spec in more}
    fields = (*(replaced.pop(spec.name, spec) for spec in features.fields), *replaced.values())
    return Plan(name, _with_fields(settings, features, fields))


def simulation_of(pairs: Sequence[str], count: int | None) -> Simulation:
    """The simulation of `KEY=VALUE` pairs, whose keys are the attributes of `Simulation`.

    Args:
        count: impressions; None: those of the pairs, or else 100,000.

    Raises:
        ConfigError: a key is unknown, or its value of the wrong kind.
    """
    given: dict[str, Any] = {"count": count or SIMULATED}
    keys = [each.name for each in dataclasses.fields(Simulation)]
    for pair in pairs:
        key, equals, value = pair.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or name not in keys:
            raise ConfigError(
                f"--simulate: expected KEY=VALUE with KEY one of {', '.join(keys)}, as in ctr=0.02, found {pair!r}. Correct it."
            )
        given[name] = _toml(value)
    try:
        return TypeAdapter(Simulation).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"--simulate: {first['loc'][0]}: expected another kind of value, found {first['input']!r}: {first['msg']}. "
            "Correct it."
        ) from error


def without(base: Plan, name: str) -> Plan:
    """The same run without a field, and without crosses of it.

    Raises:
        ConfigError: the run has no such field, or no other.
    """
    fields = tuple(spec for spec in base.settings.features.fields if spec.name != name and name not in spec.of)
    if len(fields) == len(base.settings.features.fields) or not fields:
        names = ", ".join(spec.name for spec in base.settings.features.fields)
        raise ConfigError(f"--without: expected one of several fields ({names}), found {name!r}. Correct the option.")
    return Plan(f"without {name}", _with_fields(base.settings, base.settings.features, fields))


def _with_fields(settings: Settings, features: FeatureSchema, fields: tuple[FieldSpec, ...]) -> Settings:
    try:
        schema = FeatureSchema(fields=fields, embedding_dim=features.embedding_dim, timezone=features.timezone)
    except ValidationError as error:
        found = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"features: {found}. Correct the fields of the run.") from error
    return settings.model_copy(update={"features": schema})
