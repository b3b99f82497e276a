"""The other named data sets: out of wheels and public formats, where they are looked for, and what they say when missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.datasets import NAMED, default_data_set, open_data_set
from deploy.datasets.avazu import Avazu
from deploy.datasets.base import draw_delays
from deploy.datasets.criteo import SPACING_MS, START_MS, Criteo
from deploy.datasets.folders import cache_folder, look_for
from deploy.datasets.movielens import MovieLens100K
from deploy.datasets.open_bandit import OpenBandit
from deploy.errors import DataSetError


def quiet(text: str) -> None:
    """A progress that says nothing."""


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of one's own: no data folder, an empty cache."""
    monkeypatch.delenv("HEADRACE_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deploy.datasets.folders.CHECKOUT", tmp_path / "checkout")


def test_movielens_comes_out_of_the_wheel_in_time_order(movielens_wheel: Path) -> None:
    data_set = MovieLens100K()
    assert data_set.find() is None
    where = data_set.fetch(quiet, movielens_wheel)
    assert where == cache_folder() / "ml-100k" == data_set.find()
    (chunk,) = data_set.chunks()
    assert data_set.size() == 3
    assert chunk.timestamps_ms.tolist() == [881250949000, 881250960000, 881250960000]
    assert (chunk.ids, chunk.users, chunk.items) == (["0", "1", "2"], ["1", "2", "1"], ["2", "1", "1"])  # ties: file order
    assert chunk.clicked.tolist() == [True, False, True]  # ratings 4, 3, 5
    assert json.loads(chunk.features[1]) == {
        "user_id": 2, "age": 53, "gender": "F", "occupation": "other", "zip": "T8", "hour": 15, "weekday": 3,
        "item_id": 1, "release_year": 1995, "genres": ["Animation", "Children's"],
        "user_genres": ["2|Animation", "2|Children's"],
    }  # fmt: skip
    together = json.loads(chunk.contexts[1]) | json.loads(chunk.candidates[1]) | json.loads(b"{%b}" % chunk.pair("2", "1"))
    assert together == json.loads(chunk.features[1])
    assert chunk.pair("1", "2") == b'"user_genres":["1|Action"]'
    assert json.loads(chunk.features[0])["zip"] == "05"  # not a number
    assert {field.name for field in data_set.schema().fields} == set(json.loads(chunk.features[0]))
    delays = (chunk.click_timestamps_ms - chunk.timestamps_ms)[chunk.clicked]
    assert ((delays >= 300) & (delays <= 60_000)).all()


def test_a_wheel_without_the_files_is_refused(open_bandit_wheel: Path) -> None:
    with pytest.raises(DataSetError, match=r"expected a wheel with recbole/.*ml-100k\.inter.*found: .*Take the version"):
        MovieLens100K().fetch(quiet, open_bandit_wheel)
    assert MovieLens100K().find() is None


def test_open_bandit_merges_six_logs_by_time(open_bandit_wheel: Path) -> None:
    data_set = OpenBandit()
    data_set.fetch(quiet, open_bandit_wheel)
    (chunk,) = data_set.chunks()
    assert (len(chunk), data_set.size(), int(chunk.clicked.sum())) == (12, 12, 6)
    assert chunk.ids[:3] == ["random-all-0", "random-men-0", "random-women-0"]
    assert chunk.timestamps_ms[0] == 1_574_553_630_762  # microseconds cut
    features = json.loads(chunk.features[1])
    assert features == {
        "policy": "random", "campaign": "men", "position": 3, "hour": 0,
        "user_feature_0": "a", "user_feature_1": "b", "user_feature_2": "c", "user_feature_3": "d",
        "item_id": "men-1", "item_feature_0": 0.25, "item_feature_1": "dd", "item_feature_2": "ee", "item_feature_3": "ff",
        "affinity": 2,
    }  # fmt: skip
    assert {field.name for field in data_set.schema().fields} == set(features)
    assert chunk.items[1] == "men-1"


def test_criteo_rows_are_spaced_evenly(criteo_folder: Path) -> None:
    data_set = Criteo(folder=criteo_folder)
    (chunk,) = data_set.chunks()
    assert chunk.timestamps_ms.tolist() == [START_MS, START_MS + SPACING_MS, START_MS + 2 * SPACING_MS]
    assert chunk.clicked.tolist() == [False, True, False]
    first, missing, last = (json.loads(features) for features in chunk.features)
    assert (first["I13"], first["C1"], last["I1"], last["C26"]) == (13, "c0000000", -1, "68fd1e64")
    assert set(missing.values()) == {None}
    assert {field.name for field in data_set.schema().fields} == set(first)
    assert chunk.candidates == [b"{}"] * 3


def test_criteo_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a,b,c\n")
    with pytest.raises(
        DataSetError, match=r"train\.txt: expected lines of 40 columns with tabs between.*found CSV parse error"
    ):
        list(Criteo(folder=tmp_path).chunks())


def test_avazu_rows_are_spaced_within_their_hour(avazu_folder: Path) -> None:
    data_set = Avazu(folder=avazu_folder)
    first, second = data_set.chunks()
    start = 1_413_849_600_000  # 2014-10-21 00:00 UTC
    assert (first.timestamps_ms - start).tolist() == [0, 900_000, 1_800_000, 2_700_000]
    assert (second.timestamps_ms - start).tolist() == [7_200_000, 9_000_000]
    features = json.loads(second.features[0])
    assert (features["hour"], features["C20"], features["device_ip"]) == (2, "-1", "ip4")
    assert (first.ids[0], first.clicked.tolist()) == ("10000000000000000", [False, True, False, True])
    assert {field.name for field in data_set.schema().fields} == set(features)


def test_avazu_hours_that_fall_are_refused(avazu_folder: Path) -> None:
    file = avazu_folder / "train.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    with pytest.raises(
        DataSetError, match=r"expected hours in rising order, found 14102100 after a later one\. Sort it by hour"
    ):
        list(Avazu(folder=avazu_folder).chunks())


@pytest.mark.parametrize("name", sorted(NAMED))
def test_each_says_its_terms_how_clicks_are_dated_and_how_to_get_it(name: str) -> None:
    data_set = open_data_set(name)
    assert data_set.name == name
    assert data_set.find() is None
    for text in (data_set.title, data_set.terms, data_set.clicks, data_set.obtain):
        assert len(text) > 20
        assert "://" not in text  # where something is published is the reader's to look up
    with pytest.raises(DataSetError, match=rf"{name}: expected .*found none"):
        list(data_set.chunks())


@pytest.mark.parametrize("name", ["movielens-100k", "open-bandit", "kuairand"])
def test_a_cache_that_cannot_be_written_is_named_before_anything_is_downloaded(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        DataSetError, match=r"cache of data sets: expected a folder that can be written, found .*XDG_CACHE_HOME"
    ):
        open_data_set(name).fetch(pytest.fail, tmp_path / "archive")


@pytest.mark.parametrize("name", ["criteo", "avazu"])
def test_what_only_users_may_have_cannot_be_fetched(name: str) -> None:
    with pytest.raises(DataSetError, match=rf"{name}: expected .*its terms don't let others pass it on.*HEADRACE_DATA_DIR"):
        open_data_set(name).fetch(quiet)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        DataSetError, match=r"'mnist': expected one of kuairand, movielens-100k.*jsonl, parquet.*headrace data list"
    ):
        open_data_set("mnist")
    with pytest.raises(
        DataSetError, match=r"'logs/log\.csv': .*For a file, give its format and its path: csv --path logs/log\.csv\."
    ):
        open_data_set("logs/log.csv")


def test_folders_are_searched_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def put(parent: Path) -> Path:
        (parent / "x").mkdir(parents=True)
        (parent / "x" / "f").write_text("")
        return parent / "x"

    cached = put(cache_folder())
    assert look_for("x", ("f",)) == cached
    checkout = put(tmp_path / "checkout" / "data")
    assert look_for("x", ("f",)) == checkout
    here = put(tmp_path / "data")
    assert look_for("x", ("f",)) == Path("data/x") == here.relative_to(tmp_path)
    given = put(tmp_path / "given")
    monkeypatch.setenv("HEADRACE_DATA_DIR", str(tmp_path / "given"))
    assert look_for("x", ("f",)) == given
    monkeypatch.setenv("HEADRACE_DATA_DIR", str(given))  # the folder itself
    assert look_for("x", ("f",)) == given
    assert look_for("x", ("f", "g")) is None  # half of it is not it
    monkeypatch.setenv("HEADRACE_DATA_DIR", str(tmp_path / "typo"))
    with pytest.raises(DataSetError, match=r"HEADRACE_DATA_DIR: expected a folder, found nothing at .*typo.*unset"):
        look_for("x", ("f",))


def test_without_kuairand_the_default_is_movielens() -> None:
    assert default_data_set().name == "movielens-100k"


def test_delays_follow_the_seed_and_stay_in_the_window() -> None:
    rows = np.arange(200_000)
    delays = draw_delays(rows, seed=3)
    assert (delays.min() >= 300, delays.max() <= 60_000) == (True, True)
    assert 7_900 < delays.mean() < 8_500  # an exponential of mean 8 s, shifted by 0.3 s and cut
    assert (draw_delays(rows[100:200], seed=3) == delays[100:200]).all()
    assert (draw_delays(rows, seed=4) != delays).mean() > 0.99


def test_wheels_are_downloaded_by_the_pip_that_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, movielens_wheel: Path
) -> None:
    from deploy.datasets import wheels

    calls: list[list[str]] = []

    class Done:
        returncode, stdout, stderr = 0, "", ""

    def run(command: list[str], **options: Any) -> Done:
        calls.append(command)
        done = Done()
        if command[0] == "broken":
            done.returncode, done.stderr = 1, "ERROR: no matching distribution"
        else:
            (Path(command[command.index("--dest") + 1]) / movielens_wheel.name).write_bytes(movielens_wheel.read_bytes())
        return done

    monkeypatch.setattr(wheels, "_pips", lambda: [["broken", "pip"], ["uv", "tool", "run", "pip"]])
    monkeypatch.setattr(wheels.subprocess, "run", run)
    where = MovieLens100K().fetch(quiet)
    assert (where / "ml-100k.inter").is_file()
    assert [call[0] for call in calls] == ["broken", "uv"]
    assert {"--no-deps", "recbole==1.2.1"} <= set(calls[1])

    monkeypatch.setattr(wheels, "_pips", lambda: [["broken", "pip"]])
    with pytest.raises(
        DataSetError, match=r"recbole==1\.2\.1: expected the package index to give this wheel, found: ERROR: no matching"
    ):
        MovieLens100K().fetch(quiet)
    monkeypatch.setattr(wheels, "_pips", list)
    with pytest.raises(DataSetError, match=r"expected pip or uv to download it with, found neither.*--archive"):
        OpenBandit().fetch(quiet)
