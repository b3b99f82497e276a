"""Data sets of a few rows, in the files of the real ones."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from pathlib import Path

import pytest

from deploy.datasets import movielens, open_bandit

LOG_COLUMNS = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,"
    "duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
DAY_MS = 1_650_844_800_000


def log_row(
    user: int, video: int, *, date: int = 20220425, offset_ms: int = 0, click: int = 0, duration_ms: int = 9_000, tab: int = 1
) -> str:
    """A row of KuaiRand's log."""
    return f"{user},{video},{date},1530,{DAY_MS + offset_ms},{click},0,0,0,0,0,0,0,{duration_ms},0,0,0,0,{tab}"


@pytest.fixture
def kuairand_archive(tmp_path: Path) -> Path:
    """An archive as the authors publish it, with what the conversion must leave out: duplicates, other days, other logs."""
    folder = tmp_path / "KuaiRand-Pure" / "data"
    folder.mkdir(parents=True)
    first = [
        log_row(1, 10, offset_ms=500, click=1),
        log_row(2, 11, offset_ms=100, click=1, duration_ms=3_000),
        log_row(1, 10, offset_ms=500, click=1),  # exact duplicate
        log_row(1, 10, offset_ms=500, click=0),  # not exact: another row
        log_row(9, 99, offset_ms=300, click=1, tab=0),  # a user and a video that no table knows
        log_row(1, 10, date=20220421, offset_ms=-10_000),
    ]
    second = [log_row(2, 10, date=20220504, offset_ms=900), log_row(2, 10, date=20220505, offset_ms=1_000)]
    (folder / "log_standard_4_08_to_4_21_pure.csv").write_text("\n".join([LOG_COLUMNS, *first]) + "\n")
    (folder / "log_standard_4_22_to_5_08_pure.csv").write_text("\n".join([LOG_COLUMNS, *second]) + "\n")
    (folder / "log_random_4_22_to_5_08_pure.csv").write_text("\n".join([LOG_COLUMNS, log_row(1, 10)]) + "\n")
    ranges = "follow_user_num_range,fans_user_num_range,friend_user_num_range,register_days_range"
    onehots = ",".join(f"onehot_feat{i}" for i in range(18))
    users = [f"user_id,user_active_degree,is_video_author,{ranges},{onehots}"]
    users += [f"{user},full_active,{user % 2},500+,1k,30,730+," + ",".join(str(i) for i in range(17)) + "," for user in (1, 2)]
    (folder / "user_features_pure.csv").write_text("\n".join(users) + "\n")
    videos = ["video_id,author_id,video_type,upload_dt,upload_type,music_id,tag"]
    videos += [f'{video},7{video},NORMAL,2022-04-10,LongImport,9155697141,"12,34"' for video in (10, 11)]
    (folder / "video_features_basic_pure.csv").write_text("\n".join(videos) + "\n")
    archive = tmp_path / "KuaiRand-Pure.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(folder.parent, "KuaiRand-Pure")
    return archive


@pytest.fixture
def movielens_wheel(tmp_path: Path) -> Path:
    """A wheel with three ratings out of order."""
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    contents = {
        movielens.FILES[0]: "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "2\t1\t3\t881250960\n1\t2\t4\t881250949\n1\t1\t5\t881250960\n",
        movielens.FILES[1]: "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "1\t24\tM\ttechnician\t05711\n2\t53\tF\tother\tT8H1N\n",
        movielens.FILES[2]: "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy \"Story\t1995\tAnimation Children's\n2\tGoldenEye\t1995\tAction\n",
    }
    with zipfile.ZipFile(wheel, "w") as opened:
        for name, text in contents.items():
            opened.writestr(f"recbole/dataset_example/ml-100k/{name}", text)
    return wheel


@pytest.fixture
def open_bandit_wheel(tmp_path: Path) -> Path:
    """A wheel with the six logs, two rows each."""
    wheel = tmp_path / "obp-0.4.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        for index, name in enumerate(open_bandit.FILES):
            if name.endswith("item_context.csv"):
                text = ",item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3\n"
                text += "0,0,-0.5,aa,bb,cc\n1,1,0.25,dd,ee,ff\n"
            else:
                users = "user_feature_0,user_feature_1,user_feature_2,user_feature_3"
                text = f",timestamp,item_id,position,click,propensity_score,{users},user-item_affinity_0,user-item_affinity_1\n"
                text += f"0,2019-11-24 00:00:3{index // 2}.762830+00:00,1,3,1,0.01,a,b,c,d,0.0,2.0\n"
                text += "1,2019-11-24 00:01:00.000999+00:00,0,1,0,0.01,a,b,c,e,1.0,0.0\n"
            opened.writestr(f"obp/dataset/obd/{name}", text)
    return wheel


@pytest.fixture
def criteo_folder(tmp_path: Path) -> Path:
    """Three rows, the second with missing values."""
    folder = tmp_path / "criteo"
    folder.mkdir()
    rows = [
        ["0", *map(str, range(1, 14)), *(f"c{i:07x}" for i in range(26))],
        ["1", *[""] * 13, *[""] * 26],
        ["0", "-1", *["5"] * 12, *["68fd1e64"] * 26],
    ]
    text = "".join("\t".join(row) + "\n" for row in rows)
    (folder / "train.txt.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture
def avazu_folder(tmp_path: Path) -> Path:
    """Four rows in one hour, two in the next but one."""
    folder = tmp_path / "avazu"
    folder.mkdir()
    columns = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip"
    columns += ",device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
    hours = [14102100] * 4 + [14102102] * 2
    rest = "1005,0,s,d,c,a,b,e,di,ip{},m,1,2,15706,320,50,1722,0,35,-1,79"
    rows = [f"1000000000000000{i},{i % 2},{hour},{rest.format(i)}" for i, hour in enumerate(hours)]
    (folder / "train.csv").write_text("\n".join([columns, *rows]) + "\n")
    return folder
