"""Every setting says what it does, and the example of every settings class is one that loads."""

from __future__ import annotations

import re
import tomllib

import pytest
from pydantic import BaseModel

from deploy.settings import Settings
from deploy.settings_page import setting_classes, settings_page
from model.schema import FieldSpec
from stream.settings import JoinSettings, TopicSettings, TrainerSettings

CLASSES = dict(setting_classes())
EXAMPLE = re.compile(r"^ *```toml\n(.+?)^ *```", re.MULTILINE | re.DOTALL)


def is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def row(key: str) -> list[str]:
    """The cells of a key's row on the page."""
    [line] = [line for line in settings_page("").splitlines() if line.startswith(f"| `{key}`")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_class_is_looked_at() -> None:
    assert CLASSES[""] is Settings
    assert CLASSES["join"] is JoinSettings
    assert CLASSES["features.fields[]"] is FieldSpec
    assert len(CLASSES) == 14


@pytest.mark.parametrize("path", CLASSES)
def test_every_setting_is_described_in_sentences(path: str) -> None:
    for name, field in CLASSES[path].model_fields.items():
        if not is_section(field.annotation):
            assert field.description, f"{path}.{name}: expected a description, found none"
            assert re.match(r"[A-Z].{15,}\.$", field.description), (
                f"{path}.{name}: expected sentences, found {field.description!r}"
            )


@pytest.mark.parametrize("path", CLASSES)
def test_the_example_of_every_class_loads(path: str) -> None:
    found = EXAMPLE.search(CLASSES[path].__doc__ or "")
    assert found is not None, f"{CLASSES[path].__name__}: expected an example in TOML, found none"
    example = tomllib.loads(found[1])
    Settings.model_validate(example)
    if path:
        assert example.keys() == {path.split(".")[0]}
    uses = [line for line in found[1].splitlines() if " = " in line]
    assert len(uses) >= 2
    assert sum("  # " in line for line in uses) >= len(uses) - 1, "each line says what it means"


def test_a_row_has_variable_type_unit_default_and_choices() -> None:
    described = JoinSettings.model_fields["window_ms"].description
    assert row("join.window_ms") == [
        "`join.window_ms`<br>`HEADRACE_JOIN__WINDOW_MS`", "integer, ms", "`60000` (1 min)", "at least 1", described,
    ]  # fmt: skip
    assert row("join.envelope")[1:4] == ["text", "`none`", "`none`, `connect`, `debezium`"]
    assert row("join.write_buffers_mb")[1:4] == ["integer, MiB", "`256`", "at least 16"]
    assert row("kafka.sasl_password")[1:4] == ["secret", "unset", ""]
    assert row("topics.prefix")[2] == '`""`'
    assert row("model.hidden")[1:3] == ["list of integers", "`[400, 400, 400]`"]
    assert row("snapshots.auto_promote")[1:4] == ["boolean", "`true`", "`true`, `false`"]
    assert row("features.fields[].name")[:4] == ["`features.fields[].name`", "text", "none: the key must be set", "not empty"]
    assert row("trainer.device")[3] == r"matches `^(auto\|cpu\|cuda(:\d+)?)$`"
    assert row("state_dir")[0] == "`state_dir`<br>`HEADRACE_STATE_DIR`"


@pytest.mark.parametrize("path", CLASSES)
def test_every_setting_has_a_row(path: str) -> None:
    for name, field in CLASSES[path].model_fields.items():
        if not is_section(field.annotation):
            assert len(row(f"{path}.{name}" if path else name)) == 5


def test_a_variable_on_the_page_sets_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(re.findall(r"`(HEADRACE_\w+)`", row("topics.partitions")[0])[0], "9")
    monkeypatch.setenv(re.findall(r"`(HEADRACE_\w+)`", row("model.hidden")[0])[0], "[200, 100]")
    assert Settings().topics == TopicSettings(partitions=9)
    assert Settings().trainer == TrainerSettings()
    assert Settings().model.hidden == (200, 100)
