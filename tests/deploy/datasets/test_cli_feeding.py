"""`headrace data`, `replay`, `simulate` and `scores tail`, as people and programs use them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deploy.cli import cli
from deploy.settings import Settings
from headrace import Client
from model.schema import FeatureSchema


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data folder, an empty cache, no settings file."""
    monkeypatch.delenv("HEADRACE_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("deploy.datasets.base.CHECKOUT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def on_kafka(machine: Path, topics: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The command line set up for this test's topics."""
    monkeypatch.setenv("HEADRACE_KAFKA__BOOTSTRAP_SERVERS", topics.kafka.bootstrap_servers)
    monkeypatch.setenv("HEADRACE_TOPICS__PREFIX", topics.topics.prefix)
    return topics


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def told(*arguments: object) -> Any:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list_tells_terms_and_where(machine: Path, movielens_wheel: Path) -> None:
    sets = {one["name"]: one for one in told("data", "list")}
    assert list(sets) == ["kuairand", "movielens-100k", "open-bandit", "criteo", "avazu"]
    assert all(one["path"] is None and one["terms"] and one["clicks"] for one in sets.values())
    where = told("data", "fetch", "movielens-100k", "--archive", movielens_wheel)["path"]
    assert {one["name"]: one["path"] for one in told("data", "list")}["movielens-100k"] == where
    text = run("data", "list").stdout
    assert where in text
    assert "Not real impressions" in text
    assert "CC BY-SA 4.0" in text


def test_fetch_prints_the_path_alone_on_stdout(machine: Path, kuairand_archive: Path) -> None:
    result = run("data", "fetch", "kuairand", "--archive", kuairand_archive)
    assert result.stdout.strip() == str(machine / "cache" / "headrace" / "data" / "kuairand_pure")
    assert "Terms: CC BY-SA 4.0" in result.stderr
    assert run("data", "fetch", "kuairand").stdout == result.stdout  # there already


@pytest.mark.parametrize("name", ["kuairand", "movielens-100k", "open-bandit", "criteo", "avazu", "simulation"])
def test_schema_is_toml_that_settings_take(machine: Path, name: str) -> None:
    text = run("data", "schema", name).stdout
    read = FeatureSchema.model_validate(tomllib.loads(text)["features"])
    assert read.model_dump(mode="json") == told("data", "schema", name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("data", "fetch", "kuairand", "--archive", "nowhere.tar.gz"),
            "--archive: expected a file, found nothing at nowhere.tar.gz",
        ),
        (("data", "fetch", "jsonl"), "expected a named data set, found a file format"),
        (("data", "fetch", "criteo"), "its terms don't let others pass it on"),
        (("replay", "kuairand"), "expected a folder kuairand_pure with"),
        (("replay", "jsonl"), "expected --path FILE, found none"),
        (("replay", "typo"), "headrace data list"),
    ],
)
def test_errors_are_ours_and_say_what_to_do(machine: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("replay", "kuairand", "--max", "--rate", "5"), "--max: expected neither --speed nor --rate"),
        (("replay", "kuairand", "--column", "id=x"), "expected jsonl or parquet, found kuairand"),
        (("replay", "jsonl", "--column", "idx"), "expected ROLE=COLUMN with ROLE one of id, timestamp"),
        (("simulate",), "expected --count or --duration, found both or neither"),
        (("simulate", "--count", "1", "--duration", "1"), "expected --count or --duration"),
    ],
)
def test_wrong_usage_ends_with_2(machine: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


@pytest.mark.kafka
def test_replay_tells_what_it_sent(on_kafka: Settings, movielens_wheel: Path) -> None:
    run("data", "fetch", "movielens-100k", "--archive", movielens_wheel)
    summary = told("replay", "movielens-100k")
    assert (summary["dataset"], summary["impressions"], summary["clicks"], summary["requests"]) == ("movielens-100k", 3, 2, 0)
    assert summary["watermark_ms"] > summary["event_time_ms"] + 60_000
    text = run("replay", "movielens-100k", "--limit", 1, "--no-watermark").stdout
    assert "impressions  1\nclicks       1\n" in text
    assert "watermark    none sent" in text


@pytest.mark.kafka
def test_replay_of_a_file_with_a_mapping(on_kafka: Settings) -> None:
    Path("log.jsonl").write_text(
        '{"at":1700000005,"bought":1,"price":2.5,"sku":"a"}\n{"at":1700000004,"bought":0,"price":1,"sku":"b"}\n'
    )
    columns = ("--column", "timestamp=at", "--column", "clicked=bought", "--column", "item=sku", "--unit", "s")
    summary = told("replay", "jsonl", "--path", "log.jsonl", *columns)
    assert (summary["impressions"], summary["clicks"]) == (2, 1)
    assert summary["event_time_ms"] > 5_000


@pytest.mark.kafka
def test_simulate_tells_what_it_sent(on_kafka: Settings) -> None:
    summary = told("simulate", "--max", "--count", 2_000, "--malformed", 0.01, "--truth", "truth.jsonl")
    assert summary["impressions"] == 2_000
    assert summary["malformed"] > 0
    assert len(Path("truth.jsonl").read_text().splitlines()) == 2_000
    assert "impressions  20\n" in run("simulate", "--duration", 0.2, "--rate", 100, "--delay-ms", 1).stdout


@pytest.mark.kafka
def test_scores_tail_follows_the_live_topic(on_kafka: Settings) -> None:
    scores = b'[{"id":"low","score":0.1},{"id":"best","score":0.75},{"id":"c","score":0.2},{"id":"d","score":0.15}]'
    with Client(on_kafka.kafka.bootstrap_servers, topic_prefix=on_kafka.topics.prefix) as client:
        topic = f"{on_kafka.topics.prefix}scores"
        headers = [("ce_time", b"2024-05-01T12:00:00.123Z"), ("ce_type", b"t")]
        client.send_raw(
            topic, b"r", b'{"request_id":"r","model_version":12,"snapshot_age_ms":1500,"scores":%b}' % scores, headers
        )
        client.send_raw(topic, b"r", b'{"request_id":"r","error":{"reason":"no_model","message":"no model yet"}}')
    result = run("scores", "tail", "--from-beginning", "--limit", 2)
    assert result.exit_code == 0, result.output
    _, good, bad = result.stdout.splitlines()
    assert good.split()[1:5] == ["12", "1.5", "s", "r"]
    assert "best 0.7500  c 0.2000  d 0.1500  and 1 more" in good
    assert bad.endswith("no_model: no model yet")
    lines = run("scores", "tail", "--from-beginning", "--limit", 2, "--format", "json").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert (answers[0]["model_version"], answers[0]["event"]["type"], answers[1]["error"]["reason"]) == (12, "t", "no_model")
