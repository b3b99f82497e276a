from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deploy.cli import cli
from deploy.config_report import entries, findings
from deploy.errors import ConfigError
from deploy.settings import Settings, load_settings
from stream.formats import open_formats


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["config", *arguments], catch_exceptions=False)


def shown() -> dict[str, dict[str, Any]]:
    return {entry["key"]: entry for entry in json.loads(invoke("show", "--format", "json").stdout)}


def test_every_key_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("headrace.toml").write_text(
        '[kafka]\nclient_id = "file"\nbootstrap_servers = "file:1"\nsasl_password = "s3cret"\n'
        '[features]\nfields = [{ name = "user" }, { name = "price", kind = "numeric" }]\n'
    )
    monkeypatch.setenv("HEADRACE_KAFKA__BOOTSTRAP_SERVERS", "env:1")
    monkeypatch.setenv("HEADRACE_KAFKA__SSL_KEYFILE_PASSWORD", "0pen")
    found = shown()
    assert {key: (found[key]["value"], found[key]["source"]) for key in ("kafka.client_id", "kafka.bootstrap_servers")} == {
        "kafka.client_id": ("file", "file"),
        "kafka.bootstrap_servers": ("env:1", "environment"),
    }
    assert (found["state_dir"]["value"], found["state_dir"]["source"]) == (str(Path(".headrace/state").absolute()), "default")
    assert found["features.fields"]["value"] == [{"name": "user"}, {"name": "price", "kind": "numeric"}]
    assert found["join.window_ms"]["variable"] == "HEADRACE_JOIN__WINDOW_MS"
    assert found["kafka.sasl_password"]["value"] == found["kafka.ssl_keyfile_password"]["value"] == "*" * 10

    text = invoke("show").output
    assert "s3cret" not in text
    assert "0pen" not in text
    assert [line.split()[:2] for line in invoke("show", "--set").stdout.splitlines()] == [
        ["kafka.bootstrap_servers", "environment"],
        ["kafka.client_id", "file"],
        ["kafka.sasl_password", "file"],
        ["kafka.ssl_keyfile_password", "environment"],
        ["features.fields", "file"],
    ]


def test_each_variable_shown_sets_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in entries(load_settings()):
        if isinstance(entry.value, int) and not isinstance(entry.value, bool):
            monkeypatch.setenv(entry.variable, str(entry.value + 1))
    changed = {entry.key: entry for entry in entries(load_settings()) if entry.source == "environment"}
    assert len(changed) > 30
    assert changed["model.seed"].value == 1


def test_a_key_that_was_replaced_says_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_JOIN__LABEL_POLICY", "fnw")
    with pytest.raises(ConfigError) as told:
        load_settings()
    line = next(line for line in str(told.value).splitlines() if ": join: " in line)
    assert line.startswith("headrace.toml: join: label_policy was replaced by hold_ms.")
    assert "found" not in line


@pytest.mark.parametrize(
    ("change", "level", "key", "says"),
    [
        ({}, "hint", "features.fields", "nothing to learn from"),
        ({"join": {"window_ms": 700_000_000}}, "error", "topics.retention_ms", "deleted before they are labelled"),
        ({"join": {"dedupe_horizon_ms": 700_000_000}}, "error", "topics.retention_ms", "1400065000 ms (window + 2 × dedupe"),
        ({"topics": {"retention_ms": 2_000_000}}, "hint", "topics.retention_ms", "less than twice"),
        ({"topics": {"min_insync_replicas": 2}}, "error", "topics.min_insync_replicas", "no write could ever succeed"),
        ({"kafka": {"bootstrap_servers": "broker:9092"}}, "hint", "topics.replication_factor", "loss of one"),
        ({"kafka": {"bootstrap_servers": "localhost"}}, "error", "kafka", "expected host:port"),
        ({"kafka": {"security_protocol": "SASL_SSL"}}, "error", "kafka", "sasl_username: expected a value"),
        ({"kafka": {"sasl_username": "me"}}, "hint", "kafka.sasl_username", "PLAINTEXT, which doesn't use it"),
        (
            {"kafka": {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "me", "sasl_password": "x"}},
            *("hint", "kafka.security_protocol", "in the clear"),
        ),
        (
            {"schema_registry": {"url": "https://a", "ssl_cafile": "/nowhere.pem"}},
            *("error", "schema_registry.ssl_cafile", "expected a PEM file of authorities"),
        ),
        (
            {"schema_registry": {"url": "https://a, http://b", "username": "me"}},
            *("hint", "schema_registry.url", "in the clear"),
        ),
        ({"scorer": {"lease_ms": 1_500}}, "error", "scorer.lease_ms", "at least twice scorer.heartbeat_ms (1000)"),
        (
            {"snapshots": {"served_calibration_band": (1.1, 1.2)}},
            "error",
            "snapshots.served_calibration_band",
            "the alarm would never end",
        ),
        (
            {"topics": {"deltas_retention_ms": 60_000}, "snapshots": {"interval_ms": 20_001}},
            "error",
            "topics.deltas_retention_ms",
            "at least 3 times snapshots.interval_ms (20001), found 60000",
        ),
        ({"local_kafka": {"java": "/nowhere/java"}}, "error", "local_kafka.java", "Correct the path"),
    ],
)
def test_findings(change: dict[str, Any], level: str, key: str, says: str) -> None:
    found = findings(Settings(**change))
    assert [(finding.level, finding.key) for finding in found if says in finding.message] == [(level, key)]
    others = {finding.key for finding in found} - {key, "features.fields"}
    assert not others, "one change, one finding"


@pytest.mark.parametrize(("section", "key"), [("kafka", "sasl_password"), ("schema_registry", "token")])
def test_a_secret_in_the_file_is_mentioned(section: str, key: str) -> None:
    Path("headrace.toml").write_text(f'[{section}]\n{key} = "s3cret"\n')
    result = invoke("check")
    assert f"hint: {section}.{key}: in headrace.toml" in result.stdout
    assert f"HEADRACE_{section.upper()}__{key.upper()} keeps it out" in result.stdout
    assert "s3cret" not in result.output
    assert shown()[f"{section}.{key}"]["value"] == "*" * 10


def test_a_schema_registry_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.formats.reader._there", lambda module: module != "fastavro")
    [found] = [each for each in findings(Settings(schema_registry={"url": "https://a"})) if each.level == "error"]
    assert found.key == "schema_registry.url"
    assert "Run `make setup` in the checkout" in found.message


def test_the_join_is_given_the_schema_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_SCHEMA_REGISTRY__URL", "https://registry:8081")
    monkeypatch.setenv("HEADRACE_JOIN__ENVELOPE", "debezium")
    given: dict[str, Any] = {}

    async def run_join(**arguments: Any) -> None:
        given.update(arguments)

    monkeypatch.setattr("stream.join.worker.run_join", run_join)
    monkeypatch.setattr("deploy.logs.setup_logs", lambda *, verbose: None)  # the logs of this process stay as they are
    assert CliRunner().invoke(cli, ["run", "join"], catch_exceptions=False).exit_code == 0
    assert given["schema_registry"].url == "https://registry:8081"
    assert open_formats(given["schema_registry"]).form(given["settings"].envelope) == "fd"
    monkeypatch.setenv("HEADRACE_SCHEMA_REGISTRY__URL", "registry:8081")
    with pytest.raises(
        ConfigError, match=r"schema_registry.url: expected http:// or https:// and a host, found 'registry:8081'"
    ):
        load_settings()
    monkeypatch.setenv("HEADRACE_SCHEMA_REGISTRY__URL", "https://me:s3cret@registry")
    with pytest.raises(ConfigError, match="expected no user in the address") as told:
        load_settings()
    assert "s3cret" not in str(told.value)


def test_check_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    good = invoke("check")
    assert good.exit_code == 0
    assert "valid (the environment alone: there is no headrace.toml)" in good.stdout
    monkeypatch.setenv("HEADRACE_TOPICS__MIN_INSYNC_REPLICAS", "2")
    bad = invoke("check", "--format", "json")
    assert bad.exit_code == 1
    assert [finding["level"] for finding in json.loads(bad.stdout)] == ["hint", "error"]


@pytest.mark.parametrize(
    ("text", "variable", "message"),
    [
        (
            "[join]\nwindow = 5\n",
            None,
            r"headrace.toml: join.window: expected a key .* found an unknown one. Did you mean join.window_ms\?",
        ),
        ("[join]\nwindow_ms = 0\n", None, r"join.window_ms: .*greater than or equal to 1, found 0"),
        ("[join\n", None, r"headrace.toml: expected TOML"),
        (
            "",
            ("HEADRACE_JION__WINDOW_MS", "5"),
            r"HEADRACE_JION__WINDOW_MS: expected a section of the settings .* found 'jion'",
        ),
        (
            "",
            ("HEADRACE_JOIN__WINDOW_MS", "soon"),
            r"environment HEADRACE_JOIN__WINDOW_MS: join.window_ms: expected a whole number, found 'soon'",
        ),
        ("", ("HEADRACE_CONFIG", "/nowhere.toml"), r"HEADRACE_CONFIG: expected a file, found nothing at /nowhere.toml"),
    ],
)
def test_settings_that_are_refused(
    text: str, variable: tuple[str, str] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("headrace.toml").write_text(text)
    if variable:
        monkeypatch.setenv(*variable)
    with pytest.raises(ConfigError, match=message):
        load_settings()


@pytest.mark.parametrize(
    ("removed", "instead"),
    [
        ("gate_calibration = [0.8, 1.25]", "snapshots.served_calibration_band"),
        ("gate_margin = 0.02", "snapshots.gate_loss_margin"),
        ("gate_min_examples = 10", "snapshots.first_examples"),
    ],
)
def test_a_removed_key_names_what_replaced_it(removed: str, instead: str) -> None:
    Path("headrace.toml").write_text(f"[snapshots]\n{removed}\n")
    with pytest.raises(ConfigError) as raised:
        load_settings()
    assert f"{removed.split(' ')[0]} was removed" in str(raised.value)
    assert instead in str(raised.value)


def test_relative_paths_lie_beside_the_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that is started in another folder must not find an empty store there."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "headrace.toml").write_text('[snapshots]\nurl = "versions"\n[local_kafka]\ndir = "kafka"\n')
    monkeypatch.setenv("HEADRACE_CONFIG", "../home/headrace.toml")
    monkeypatch.chdir(elsewhere)
    settings = load_settings()
    assert Path(settings.snapshots.url).resolve() == home / "versions"
    assert settings.local_kafka.dir.resolve() == home / "kafka"
    assert settings.state_dir.resolve() == home / ".headrace/state"
    monkeypatch.chdir(tmp_path)
    assert Path(settings.snapshots.url).is_absolute()
    monkeypatch.setenv("HEADRACE_CONFIG", str(home / "headrace.toml"))
    for url in ("s3://models/headrace", "file:///srv/versions", "/srv/versions"):
        assert load_settings(snapshots={"url": url}).snapshots.url == url
