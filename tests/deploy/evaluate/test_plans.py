"""Runs as users name them: settings, fields, simulations."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.errors import ConfigError
from deploy.evaluate.plans import assignment, field_spec, merged, named_run, plan, simulation_of, without
from model.schema import FeatureSchema, FieldSpec

SCHEMA = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="item")), embedding_dim=8)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder without settings."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "nested"),
    [
        ("model.batch_rows=512", {"model": {"batch_rows": 512}}),
        ("model.hidden=[200, 100]", {"model": {"hidden": [200, 100]}}),
        ("trainer.device=cpu", {"trainer": {"device": "cpu"}}),
        ("model.defer_negatives=false", {"model": {"defer_negatives": False}}),
        ('state_dir.x="a=b"', {"state_dir": {"x": "a=b"}}),
    ],
)
def test_a_setting_is_read_as_toml_or_text(text: str, nested: object) -> None:
    assert assignment(text) == nested


def test_a_run_has_a_name_and_settings_of_its_own() -> None:
    name, own = named_run("wide model.hidden=[800] join.hold_ms=5000")
    assert name == "wide"
    assert own == {"model": {"hidden": [800]}, "join": {"hold_ms": 5_000}}
    shared = {"model": {"hidden": [8], "batch_rows": 64}}
    settings = plan(name, merged(shared, own), SCHEMA).settings
    assert (settings.model.hidden, settings.model.batch_rows, settings.join.hold_ms) == ((800,), 64, 5_000)
    assert shared == {"model": {"hidden": [8], "batch_rows": 64}}


def test_the_fields_are_the_data_sets_unless_the_settings_name_some(elsewhere: Path) -> None:
    assert plan("a", {}, SCHEMA).settings.features == SCHEMA
    wider = plan("a", {"features": {"embedding_dim": 32}}, SCHEMA).settings.features
    assert (wider.fields, wider.embedding_dim) == (SCHEMA.fields, 32)
    (elsewhere / "headrace.toml").write_text('[features]\nembedding_dim = 4\nfields = [{ name = "item" }]\n')
    own = plan("a", {}, SCHEMA).settings.features
    assert ([spec.name for spec in own.fields], own.embedding_dim) == (["item"], 4)


def test_fields_are_added_replaced_and_left_out() -> None:
    more = [field_spec('{ name = "price", kind = "numeric" }'), field_spec('{ name = "user", space = "people" }')]
    made = plan("a", {}, SCHEMA, more)
    assert [spec.name for spec in made.settings.features.fields] == ["user", "item", "price"]
    assert made.settings.features.fields[0].space == "people"
    less = without(made, "user")
    assert less.name == "without user"
    assert [spec.name for spec in less.settings.features.fields] == ["item", "price"]
    with pytest.raises(ConfigError, match=r"--without: expected one of several fields \(item, price\), found 'user'"):
        without(less, "user")


def test_a_wrong_file_is_not_blamed_on_a_run(elsewhere: Path) -> None:
    (elsewhere / "headrace.toml").write_text("[model]\nbatch_rows = 0\n")
    with pytest.raises(ConfigError, match=r"^headrace\.toml: model\.batch_rows"):
        plan("a", {"model": {"seed": 1}}, SCHEMA)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3", "field: expected a field as in"),
        ("{ name = ", "which is no TOML"),
        ('{ name = "a", kind = "x" }', "kind: "),
    ],
)
def test_a_field_that_is_none_is_rejected(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="Correct --field") as caught:
        field_spec(text)
    assert says in str(caught.value)


def test_a_simulation_has_the_options_of_the_simulator() -> None:
    made = simulation_of(("ctr=0.02", "delay-ms=20000", "delay=lognormal", "ctr_steps=[[10, 0.5]]"), 500)
    assert (made.ctr, made.delay_ms, made.delay, made.count) == (0.02, 20_000, "lognormal", 500)
    assert made.ctr_steps[0].ctr == 0.5
    assert simulation_of((), None).count == 100_000
    wrong = {
        "ctr": "--simulate: expected KEY=VALUE with KEY one of rate, count",
        "ctrr=1": "--simulate: expected KEY=VALUE with KEY one of rate, count",
        "ctr=high": "--simulate: ctr: expected another kind of value, found 'high'",
    }
    for pair, says in wrong.items():
        with pytest.raises(ConfigError, match=says):
            simulation_of((pair,), None)
