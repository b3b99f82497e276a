"""Writes `docs/settings.md` from the settings classes: for each class its docstring, with the example, and a row for each key.

`deploy/docs.py` calls `settings_page`. Everything on the page is in the classes; this file knows no key by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from deploy.settings import Settings
from stream.records.times import duration

__all__ = ["setting_classes", "settings_page"]

INTRODUCTION = """\
A value comes from the first of these that has it: the command's arguments, the environment, the settings file, the default. The
settings file is `headrace.toml` in the working folder, or the file that `HEADRACE_CONFIG` names. Unknown keys are an error.
`headrace config show` prints every value and where it comes from; `headrace config check` finds mistakes.

In the environment, lists and tables are JSON: `HEADRACE_MODEL__HIDDEN='[200, 100]'`. Secrets belong there and not in the file.
A key that ends in `_ms` is a length of time in milliseconds, unless its description says otherwise. A MiB is 1,048,576 bytes.
"""
HEADER = "| key, environment variable | type, unit | default | choices | what it does |\n| --- | --- | --- | --- | --- |"
UNITS = {"_ms": "ms", "_mb": "MiB", "_bytes": "bytes"}
TYPES = {bool: "boolean", int: "integer", float: "number", str: "text", Path: "path", SecretStr: "secret"}


def setting_classes(model: type[BaseModel] = Settings, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Each settings class with the key of its section. An item of a list of tables has the key of the list and `[]`."""
    yield path, model
    for name, field in model.model_fields.items():
        key = f"{path}.{name}" if path else name
        kind = _required(field.annotation)
        item = next((each for each in get_args(kind) if _is_section(each)), None)
        if _is_section(kind):
            yield from setting_classes(kind, key)
        elif item is not None:
            yield from setting_classes(item, f"{key}[]")


def settings_page(note: str) -> str:
    """The page as Markdown, with `note` for those who would edit it."""
    classes = list(setting_classes())
    parts = ["# Settings\n", note, INTRODUCTION]
    for path, model in [*classes[1:], classes[0]]:  # the few keys without a section come last
        title = f"`{path}`" if path else "Keys without a section"
        parts.append(f"## {title}\n\n{_docstring(model)}\n")
        rows = [_row(path, key, field) for key, field in model.model_fields.items() if not _is_section(field.annotation)]
        parts.append("\n".join([HEADER, *rows, ""]))
    return "\n".join(parts)


def _docstring(model: type[BaseModel]) -> str:
    first, _, rest = (model.__doc__ or "").strip().partition("\n")
    lines = [line.removeprefix("    ") for line in rest.splitlines()]
    return f"{first}\n" + "\n".join(lines)


def _row(path: str, name: str, field: FieldInfo) -> str:
    key = f"{path}.{name}" if path else name
    # A key of a list's items has no variable of its own.
    variable = "" if "[]" in path else f"<br>`HEADRACE_{key.replace('.', '__').upper()}`"
    cells = [f"`{key}`{variable}", _type(name, field.annotation), _default(name, field), _choices(field)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, field.description or "")) + " |"


def _required(annotation: Any) -> Any:
    """The annotation without `| None`."""
    if get_origin(annotation) in (UnionType, Union):
        return next(each for each in get_args(annotation) if each is not NoneType)
    return annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type(name: str, annotation: Any) -> str:
    kind = _required(annotation)
    if get_origin(kind) is Literal:
        return "text"
    if get_origin(kind) is tuple:
        items = get_args(kind)
        one = "table" if _is_section(items[0]) else TYPES[items[0]]
        return f"list of {one}s" if items[1] is Ellipsis else f"list of {len(items)} {one}s"
    unit = next((unit for ending, unit in UNITS.items() if name.endswith(ending)), None)
    return TYPES[kind] + (f", {unit}" if unit else "")


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "none: the key must be set"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    if default == "":
        return '`""`'
    if name.endswith("_ms") and default >= 1_000:
        return f"`{default}` ({duration(default).replace(' m', ' min')})"
    return f"`{default}`"


def _choices(field: FieldInfo) -> str:
    """What values are valid, beyond the type."""
    kind = _required(field.annotation)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    limits = {name: limit for each in field.metadata for name in LIMITS if (limit := getattr(each, name, None)) is not None}
    if "ge" in limits and "le" in limits:
        return f"{_number(limits['ge'])} to {_number(limits['le'])}"
    return ", ".join(LIMITS[name].format(_number(limit)) for name, limit in limits.items())


LIMITS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "pattern": "matches `{}`", "min_length": "not empty"}


def _number(limit: Any) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" if isinstance(limit, float) else str(limit)
