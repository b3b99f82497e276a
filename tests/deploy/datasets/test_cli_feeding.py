"""`headrace data`, `replay`, `simulate` and `scores tail`, as people and programs use them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deploy.cli import cli
from deploy.settings import Settings
from headrace import Client
from model.schema import FeatureSchema
from tests.deploy.made_up import read_topic


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data folder, an empty cache, no settings file."""
    monkeypatch.delenv("HEADRACE_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("deploy.datasets.folders.CHECKOUT", tmp_path / "checkout")
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


def printed(*arguments: object) -> Any:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list_has_terms_and_folders(machine: Path, movielens_wheel: Path) -> None:
    sets = {one["name"]: one for one in printed("data", "list")}
    assert list(sets) == ["kuairand", "movielens-100k", "open-bandit", "criteo", "avazu"]
    assert all(one["path"] is None and one["terms"] and one["clicks"] for one in sets.values())
    where = printed("data", "fetch", "movielens-100k", "--archive", movielens_wheel)["path"]
    assert {one["name"]: one["path"] for one in printed("data", "list")}["movielens-100k"] == where
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
    assert read.model_dump(mode="json") == printed("data", "schema", name)


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
        (("replay", "kuairand", "--column", "id=x"), "expected one of jsonl, parquet, csv, tsv, found kuairand"),
        (("replay", "jsonl", "--column", "id=a", "--column", "id=b"), "expected one column for each role, found id twice"),
        (("data", "schema", "kuairand", "--drop", "x"), "expected one of jsonl, parquet, csv, tsv, found kuairand"),
        (("replay", "jsonl", "--column", "id=a", "--drop", "a"), "--drop: expected columns that have no role, found a"),
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
def test_replay_reports_what_it_sent(on_kafka: Settings, movielens_wheel: Path) -> None:
    run("data", "fetch", "movielens-100k", "--archive", movielens_wheel)
    summary = printed("replay", "movielens-100k")
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
    summary = printed("replay", "jsonl", "--path", "log.jsonl", *columns)
    assert (summary["impressions"], summary["clicks"]) == (2, 1)
    assert summary["event_time_ms"] > 5_000


def test_the_schema_of_a_file_has_what_the_mapping_leaves(machine: Path) -> None:
    Path("log.csv").write_text("at,bought,bought_at,request,session,sku,price\n1700000000,1,1700000002,r0,s,a,2.5\n")
    roles = ("timestamp=at", "clicked=bought", "click_timestamp=bought_at", "id=request")
    options = [word for role in roles for word in ("--column", role)]
    schema = printed("data", "schema", "csv", "--path", "log.csv", "--unit", "s", "--drop", "session", *options)
    assert [(field["name"], field["kind"]) for field in schema["fields"]] == [("sku", "categorical"), ("price", "numeric")]
    Path("odd.jsonl").write_text('{"timestamp":1700000000000,"clicked":0,"\\u007f\\" 猫":1}\n')
    text = run("data", "schema", "jsonl", "--path", "odd.jsonl").stdout
    assert tomllib.loads(text)["features"]["fields"] == [{"name": '\x7f" 猫'}]


@pytest.mark.kafka
def test_a_file_with_a_bad_row_sends_nothing(on_kafka: Settings) -> None:
    rows = [{"timestamp": 1_700_000_000_000 + n, "clicked": 0, "f": n} for n in range(20_000)]
    rows[-1]["clicked"] = 2
    Path("log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("replay", "jsonl", "--path", "log.jsonl")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: log.jsonl, column clicked, row 20000: expected 0 or 1 in every row, found 2.")
    assert read_topic(on_kafka, "impressions") == []


@pytest.mark.kafka
def test_a_file_that_the_model_could_not_read_sends_nothing(on_kafka: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_FEATURES__FIELDS", '[{"name": "f", "kind": "list"}]')
    Path("log.jsonl").write_text('{"timestamp":1700000000000,"clicked":0,"f":1}\n')
    result = run("replay", "jsonl", "--path", "log.jsonl")
    assert "column f: expected a list field, as the settings' features say, found the type int64." in result.stderr
    assert read_topic(on_kafka, "impressions") == []


@pytest.mark.kafka
def test_clicks_beyond_the_window_are_reported(on_kafka: Settings) -> None:
    rows = [
        {"timestamp": 1_700_000_000_000, "clicked": 1, "at": 1_700_000_000_000 + delay, "f": 1} for delay in (60_000, 60_001)
    ]
    Path("log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("jsonl", "--path", "log.jsonl", "--column", "click_timestamp=at")
    summary = printed("replay", *options)
    assert (summary["clicks"], summary["clicks_beyond_window"]) == (2, 1)
    assert (
        "1 of them more than join.window_ms (60000 ms) after their impressions: they label nothing"
        in run("replay", *options).stdout
    )


@pytest.mark.kafka
def test_simulate_reports_what_it_sent(on_kafka: Settings) -> None:
    summary = printed("simulate", "--max", "--count", 2_000, "--malformed", 0.01, "--truth", "truth.jsonl")
    assert summary["impressions"] == 2_000
    assert summary["malformed"] > 0
    assert len(Path("truth.jsonl").read_text().splitlines()) == 2_000
    again = run("simulate", "--duration", 0.2, "--rate", 100, "--delay-ms", 1)
    assert "impressions  20\n" in again.stdout
    assert (
        "Note: the streams in the topics end with a watermark" in again.stderr
    )  # that of the stream before, beyond its window


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


@pytest.mark.kafka
def test_scores_tail_passes_over_a_record_that_is_no_answer(on_kafka: Settings) -> None:
    with Client(on_kafka.kafka.bootstrap_servers, topic_prefix=on_kafka.topics.prefix) as client:
        topic = f"{on_kafka.topics.prefix}scores"
        client.send_raw(topic, b"r", b"garbage")
        client.send_raw(topic, b"r", b'{"request_id":"r","model_version":12,"scores":[]}')
    result = run("scores", "tail", "--from-beginning", "--limit", 1)
    assert result.exit_code == 0, result.output
    assert "expected the answer of a scorer" in result.stderr
    assert " 12 " in result.stdout


@pytest.mark.kafka
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("arguments", [("scores", "tail"), ("simulate", "--rate", "50", "--duration", "600")])
def test_a_command_that_runs_until_then_ends_in_order(on_kafka: Settings, arguments: tuple[str, ...], number: int) -> None:
    command = [sys.executable, "-m", "headrace", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if arguments[0] == "scores":
            assert process.stderr is not None
            assert "following" in process.stderr.readline()
        else:
            until = time.monotonic() + 60
            while not read_topic(on_kafka, "impressions"):
                assert time.monotonic() < until
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    if arguments[0] == "simulate":
        marks = [record for record in read_topic(on_kafka, "impressions") if not record.value]
        assert len(marks) == 2, "a watermark to each partition"
