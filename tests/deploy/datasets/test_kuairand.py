"""KuaiRand: the counts that every figure stands on, how clicks are dated, and the authors' archive."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from deploy.datasets import kuairand
from deploy.datasets.kuairand import KuaiRand, click_delays
from deploy.datasets.kuairand_archive import convert
from deploy.errors import DataSetError

ROOT = Path(__file__).resolve().parents[3]
PARENTS = [
    Path(parent) for parent in (os.environ.get("HEADRACE_DATA_DIR"), ROOT / "data", ROOT.parent / "shared" / "data") if parent
]
REAL = next(
    (parent / KuaiRand.folder_name for parent in PARENTS if (parent / KuaiRand.folder_name / kuairand.FILES[0]).is_file()), None
)


@pytest.mark.skipif(REAL is None, reason="no kuairand_pure in HEADRACE_DATA_DIR or data/: its terms don't let us carry it")
def test_the_real_one_has_its_counts_and_nothing_that_is_an_outcome() -> None:
    data_set = KuaiRand(folder=REAL)
    impressions = clicks = 0
    last_ms = 0
    for chunk in data_set.chunks():
        assert chunk.ids == [str(number) for number in range(impressions, impressions + len(chunk))]
        impressions += len(chunk)
        clicks += int(chunk.clicked.sum())
        assert chunk.timestamps_ms[0] >= last_ms
        assert (np.diff(chunk.timestamps_ms) >= 0).all()
        last_ms = int(chunk.timestamps_ms[-1])
        delays = (chunk.click_timestamps_ms - chunk.timestamps_ms)[chunk.clicked]
        assert delays.min() >= 0
        assert delays.max() <= 60_000
    assert (impressions, clicks, data_set.size()) == (167_281, 75_453, 167_281)
    features = json.loads(chunk.features[0])
    assert set(features) == {field.name for field in data_set.schema().fields}
    assert len(features) == 34
    outcomes = {"play_time_ms", "long_view", "is_like", "is_click", "is_follow", "is_comment", "profile_stay_time"}
    assert not outcomes & set(features)


def test_autoplay_clicks_come_after_7_seconds_or_the_whole_video_and_taps_are_drawn() -> None:
    tabs = np.array([1, 2, 4, 5, 6, 0, 3, 14])
    durations = np.array([9_000, 7_000, 6_999, 0, 1, 100, 100, 100])
    delays = click_delays(tabs, durations, np.arange(8), seed=0)
    assert delays[:5].tolist() == [7_000, 7_000, 6_999, 0, 1]
    assert ((delays[5:] >= 300) & (delays[5:] <= 60_000)).all()
    assert len(set(delays[5:].tolist())) == 3
    assert click_delays(tabs, durations, np.arange(8), seed=1)[5:].tolist() != delays[5:].tolist()
    assert click_delays(tabs[6:], durations[6:], np.arange(6, 8), seed=0).tolist() == delays[6:].tolist()  # chunks don't matter


def test_the_archive_becomes_the_same_rows_by_the_recipe(kuairand_archive: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = convert(kuairand_archive, tmp_path / "cache" / KuaiRand.folder_name, said.append)
    log = pq.read_table(folder / "interactions.parquet")
    # By time; of the two rows of one millisecond the log's order; the exact duplicate, 21 April and 5 May are gone.
    assert log["user_id"].to_pylist() == [2, 9, 1, 1, 2]
    assert log["is_click"].to_pylist() == [1, 1, 1, 0, 0]
    assert log["date"].to_pylist() == [20220425] * 4 + [20220504]
    assert "expected 167,281 impressions with 75,453 clicks, found 5 with 3" in said[-1]
    assert sorted(path.name for path in folder.parent.iterdir()) == [KuaiRand.folder_name]  # nothing half done lies about


def test_events_carry_users_and_videos_and_null_for_unknown_ones(kuairand_archive: Path, tmp_path: Path) -> None:
    folder = convert(kuairand_archive, tmp_path / KuaiRand.folder_name, lambda text: None)
    (chunk,) = KuaiRand(folder=folder).chunks()
    known, unknown = json.loads(chunk.features[0]), json.loads(chunk.features[1])
    assert {name: known[name] for name in ("user_id", "video_id", "tab", "hour", "duration", "tag", "music_id")} == {
        "user_id": 2, "video_id": 11, "tab": 1, "hour": 15, "duration": 0, "tag": "12,34", "music_id": 9155697141,
    }  # fmt: skip
    assert (known["onehot_feat3"], known["onehot_feat17"], known["is_video_author"]) == (3, None, 0)
    assert (unknown["user_id"], unknown["user_active_degree"], unknown["author_id"]) == (9, None, None)
    assert json.loads(chunk.contexts[0]) | json.loads(chunk.candidates[0]) == known
    assert "video_id" not in json.loads(chunk.contexts[0])
    assert (chunk.users[0], chunk.items[0]) == ("2", "11")
    assert chunk.click_timestamps_ms[0] - chunk.timestamps_ms[0] == 3_000
    assert chunk.click_timestamps_ms[3] == -1


def test_long_videos_share_a_bucket(kuairand_archive: Path, tmp_path: Path) -> None:
    folder = convert(kuairand_archive, tmp_path / KuaiRand.folder_name, lambda text: None)
    log = pq.read_table(folder / "interactions.parquet")
    column = log.schema.get_field_index("duration_ms")
    lengths = [4_999, 5_000, 199_999, 200_000, 10**9]
    pq.write_table(log.set_column(column, "duration_ms", [lengths]), folder / "interactions.parquet")
    (chunk,) = KuaiRand(folder=folder).chunks()
    assert [json.loads(features)["duration"] for features in chunk.features] == [0, 1, 39, 40, 40]


def test_another_archive_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "x.tar.gz"
    wrong.write_bytes(b"not a tar")
    with pytest.raises(DataSetError, match=r"(?s)x\.tar\.gz: expected the KuaiRand-Pure archive .*found: .* Download it again"):
        convert(wrong, tmp_path / "out", lambda text: None)
    assert not (tmp_path / "out").exists()


def test_an_archive_without_the_tables_is_refused(tmp_path: Path, kuairand_archive: Path) -> None:
    import tarfile

    wrong = tmp_path / "wrong.tar"
    (tmp_path / "a.csv").write_text("a\n1\n")
    with tarfile.open(wrong, "w") as opened:
        opened.add(tmp_path / "a.csv", "a.csv")
    with pytest.raises(DataSetError, match=r"found no log_standard_\*\.csv, user_features_pure\.csv, video_"):
        convert(wrong, tmp_path / "out", lambda text: None)


def test_fetch_without_an_archive_says_what_to_do() -> None:
    with pytest.raises(DataSetError, match=r"expected --archive, found none.*headrace data fetch kuairand --archive"):
        KuaiRand().fetch(lambda text: None)


def test_a_folder_that_is_not_it_says_so(tmp_path: Path) -> None:
    for name in kuairand.FILES:
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataSetError, match=r"expected the tables of kuairand, found: .* Remove that folder"):
        next(KuaiRand(folder=tmp_path).chunks())
