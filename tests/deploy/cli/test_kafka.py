from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.cli import cli
from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings, Settings

pytestmark = pytest.mark.kafka


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_LOCAL_KAFKA__START_TIMEOUT_MS", "120000")
    yield tmp_path / "k"
    LocalKafka(LocalKafkaSettings(dir=tmp_path / "k")).stop()


def test_start_status_stop_reset(folder: Path) -> None:
    runner = CliRunner()
    at = ["--dir", str(folder)]
    assert runner.invoke(cli, ["kafka", "status", *at]).exit_code == 1
    started = runner.invoke(cli, ["kafka", "start", *at])
    assert started.exit_code == 0, started.output
    address, export = started.stdout.splitlines()
    assert export == f"export HEADRACE_KAFKA__BOOTSTRAP_SERVERS={address}"
    assert f"Its logs are in {folder / 'logs'}" in started.stderr

    status = runner.invoke(cli, ["kafka", "status", *at, "--format", "json"])
    assert status.exit_code == 0
    told = json.loads(status.stdout)
    assert (told["state"], told["bootstrap_servers"], told["brokers"]) == ("running", address, 1)
    assert list(told["pids"]) == ["1"]

    again = runner.invoke(cli, ["kafka", "start", *at, "--format", "json"])
    assert json.loads(again.stdout) == told

    dry = runner.invoke(cli, ["kafka", "reset", *at, "--dry-run"])
    assert "1 broker(s), running" in dry.stderr
    assert "Nothing was removed" in dry.stderr
    asked = runner.invoke(cli, ["kafka", "reset", *at], input="n\n")
    assert asked.exit_code == 1
    assert LocalKafka(LocalKafkaSettings(dir=folder)).status().state == "running"

    stopped = runner.invoke(cli, ["kafka", "stop", *at])
    assert stopped.exit_code == 0
    assert "stopped" in stopped.stdout
    assert "It did not run." in runner.invoke(cli, ["kafka", "stop", *at]).stderr
    assert json.loads(runner.invoke(cli, ["kafka", "reset", *at, "--yes", "--format", "json"]).stdout)["state"] == "absent"
    assert "nothing to remove" in runner.invoke(cli, ["kafka", "reset", *at]).stderr


def test_topics_create_and_check(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    prefix = settings.topics.prefix
    for key, value in {
        "KAFKA__BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers,
        "TOPICS__PREFIX": prefix,
        "TOPICS__PARTITIONS": "2",
    }.items():
        monkeypatch.setenv(f"HEADRACE_{key}", value)
    runner = CliRunner()
    missing = runner.invoke(cli, ["topics", "check"])
    assert missing.exit_code == 1
    assert f"{prefix}clicks: topic: expected present, found absent\n  fix: headrace topics create" in missing.stdout
    created = runner.invoke(cli, ["topics", "create", "--format", "json"])
    assert created.exit_code == 0
    assert len(json.loads(created.stdout)["created"]) == 9
    assert runner.invoke(cli, ["topics", "check"]).stdout == "All nine topics are as the contract says.\n"
    again = runner.invoke(cli, ["topics", "create"])
    assert again.stdout.count("kept") == 9
    assert "headrace topics check" in again.stderr

    monkeypatch.setenv("HEADRACE_TOPICS__RETENTION_MS", "86400000")
    differs = runner.invoke(cli, ["topics", "check", "--format", "json"])
    assert differs.exit_code == 1
    assert {(d["what"], d["expected"], d["cure"]) for d in json.loads(differs.stdout)} == {
        ("retention.ms", "86400000", "headrace topics create --mend")
    }
    assert runner.invoke(cli, ["topics", "create", "--mend"]).stdout.count("mended") == 6
    assert runner.invoke(cli, ["topics", "check"]).exit_code == 0
