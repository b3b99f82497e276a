"""`headrace evaluate` as people and programs use it, on a file whose clicks depend on one column."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from deploy.cli import cli

COUNT = 3_000
SMALL = "--set model.hidden=[8] --set model.initial_rows=1024 --set model.row_learning_rate=0.1 --set trainer.threads=1"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CSV file: `good` decides over clicks, `noise` over nothing; an impression every 100 ms, clicks after 2 s."""
    monkeypatch.delenv("HEADRACE_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    good, noise = rng.integers(0, 4, COUNT), rng.integers(0, 4, COUNT)
    clicked = rng.random(COUNT) < np.array([0.05, 0.2, 0.5, 0.9])[good]
    times = 1_700_000_000_000 + 100 * np.arange(COUNT)
    lines = ["timestamp,clicked,click_timestamp,good,noise"]
    for row in range(COUNT):
        at = times[row] + 2_000 if clicked[row] else ""
        lines.append(f"{times[row]},{int(clicked[row])},{at},g{good[row]},n{noise[row]}")
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def ran(command: str) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *shlex.split(command)])


def found(command: str) -> Any:
    result = ran(f"{command} --format json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_one_run_learns_and_says_how_well(log: Path) -> None:
    document = found(f"csv --path log.csv {SMALL} --by good --by noise")
    assert document["judged_impressions"] == 0.8 * COUNT
    assert document["auc"] > 0.75
    assert document["ne"] < 0.85
    low, high = document["intervals"]["auc"]
    assert low < document["auc"] < high
    assert abs(document["calibration"] - 1) < 0.15
    assert document["progressive"]["auc"] > 0.75
    assert document["rows_per_s"] > 0
    assert [each["name"] for each in document["runs"]] == ["base"]
    by_good = {each["name"]: each for each in document["by"]["good"]}
    assert set(by_good) == {"g0", "g1", "g2", "g3"}
    assert by_good["g3"]["score"] > 0.6 > 0.4 > by_good["g0"]["score"]
    assert sum(each["impressions"] for each in document["calibration_deciles"]) == document["judged_impressions"]
    assert len(document["over_time"]) == 20


def test_runs_are_compared_with_the_first_one(log: Path) -> None:
    command = f"csv --path log.csv {SMALL} --without good --permute good --permute noise --seeds 2 --set model.batch_rows=64"
    runs = {each["name"]: each for each in found(command)["runs"]}
    assert list(runs) == ["base", "permuted good", "permuted noise", "without good"]
    for name in ("without good", "permuted good"):
        assert runs[name]["auc"] < 0.6
        low, high = runs[name]["against_base"]["auc"]["interval"]
        assert low < high < -0.1
    low, high = runs["permuted noise"]["against_base"]["auc"]["interval"]
    assert low < 0.02
    assert high > -0.02
    assert runs["base"]["seeds"] == 2
    assert "against_base" not in runs["base"]


def test_choosing_on_the_first_half_sees_nothing_of_the_second(log: Path) -> None:
    """A second half with other labels changes nothing of what `--until 0.5` says."""
    chosen = found(f"csv --path log.csv {SMALL} --until 0.5")
    lines = (log / "log.csv").read_text().splitlines()
    first, second = lines[: COUNT // 2 + 1], lines[COUNT // 2 + 1 :]
    (log / "log.csv").write_text("\n".join([*first, *map(_flipped, second)]) + "\n")
    again = found(f"csv --path log.csv {SMALL} --until 0.5")
    for document in (chosen, again):
        for timed in ("rows_per_s", "seconds"):
            del document[timed], document["runs"][0][timed]
    assert chosen == again
    assert chosen["judged_impressions"] == 0.4 * COUNT
    shown = found(f"csv --path log.csv {SMALL} --from 0.5")
    assert shown["judged_impressions"] == 0.5 * COUNT
    assert shown["judged_from_ms"] > chosen["judged_to_ms"]


def _flipped(line: str) -> str:
    time, clicked, _, *features = line.split(",")
    return ",".join([time, str(1 - int(clicked)), "", *features])


def test_values_of_fields_that_impressions_do_not_carry_have_their_names_too(log: Path) -> None:
    fields = """--field '{ name = "hour", kind = "hour" }' --field '{ name = "both", kind = "cross", of = ["good", "hour"] }'"""
    document = found(f"csv --path log.csv {SMALL} {fields} --by hour --by both")
    assert {each["name"] for each in document["by"]["hour"]} == {"22"}  # from 22:13 to 22:18 UTC
    assert {each["name"] for each in document["by"]["both"]} == {f"g{number} × 22" for number in range(4)}
    for field, made_of in (("hour", "the time of the impression"), ("both", "good, hour")):
        result = ran(f"csv --path log.csv {SMALL} {fields} --permute {field}")
        assert result.exit_code == 1
        assert f"--permute: expected a field whose values impressions carry, found {field!r}, which is made of {made_of}" in (
            result.stderr
        )


def test_text_shows_tables_for_people(log: Path) -> None:
    result = ran(f"csv --path log.csv {SMALL} --serve-every 5s --serve-every 60s --top 2 --by noise")
    assert result.exit_code == 0, result.stderr
    assert "base, every 5 s" in result.stdout
    assert "less base, every 5 s" in result.stdout
    assert "top values of noise (base, every 5 s)" in result.stdout


def test_a_picture_is_drawn(log: Path) -> None:
    result = ran(f"csv --path log.csv {SMALL} --serve-every 5s --serve-every 60s --picture out.png --format json")
    assert result.exit_code == 0, result.stderr
    assert (log / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_its_package_and_a_known_format(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ran(f"csv --path log.csv {SMALL} --picture out.docx")
    assert "--picture: expected a file that ends with .png, .svg or .pdf, found out.docx" in result.stderr
    result = ran(f"csv --path log.csv {SMALL} --picture nowhere/out.png")
    assert re.search(r"--picture: expected \S+/nowhere to be a folder that can be written, found no folder", result.stderr)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = ran(f"csv --path log.csv {SMALL} --picture out.png")
    assert "--picture: expected the Python package matplotlib, found none" in result.stderr
    assert result.exit_code == 1


def test_fewer_and_later_clicks(log: Path) -> None:
    """A tenth of the clicks is kept, and nearly a third of them comes after the hold."""
    whole = found(f"csv --path log.csv {SMALL}")
    thinned = found(f"csv --path log.csv {SMALL} --keep-clicks 0.1 --late-clicks 0.3")
    assert thinned["ctr"] < 0.25 * whole["ctr"]
    firsts, kept = thinned["impressions"], thinned["ctr"] * thinned["impressions"]
    assert thinned["learned"] - firsts == pytest.approx(0.3 * kept, rel=0.6)  # corrections


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--set hidden=[8]", "setting: expected SECTION.KEY=VALUE"),
        ("--set model.hiden=[8]", "run 'base': model.hiden: expected a key"),
        ("--set model.batch_rows=many", "run 'base': model.batch_rows: expected"),
        ("--run alone", "run: expected a name and settings"),
        ("--field 3", "field: expected a field as in [features]"),
        ("--without price", "--without: expected one of several fields (good, noise), found 'price'"),
        ("--permute price", "--permute: expected one of the fields (good, noise), found 'price'"),
        ("--by price", "field 'price': expected one of the fields"),
        ("--from 0.5 --until 0.5", "--from: expected a share below that of --until"),
        ("--simulate ctr=0.1", "--simulate: expected the name simulation, found csv"),
        ("--late-clicks 0.9", "--late-clicks: expected a share above 0 and below 0.833"),
        ("--limit 50", "expected at least 100 impressions to judge"),
        ("--serve-every 1h", "expected at least 100 impressions to judge, found 0 of 3000"),
        ("--keep-clicks 0 --set join.negative_rate=1e-4", "expected labels to learn, found none"),
    ],
)
def test_what_is_wrong_is_said(log: Path, options: str, says: str) -> None:
    result = ran(f"csv --path log.csv {SMALL} {options}")
    assert result.exit_code in (1, 2)
    assert says in result.stderr
