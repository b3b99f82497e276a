"""KuaiRand-Pure, ten days of its standard log: real short-video impressions with real feedback (Gao et al., CIKM 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deploy.datasets.base import CHUNK_ROWS, Chunk, Int64s, Progress, draw_delays, make_chunk
from deploy.datasets.encode import concat, members, strings
from deploy.datasets.folders import cache_to_write
from deploy.datasets.named import NamedDataSet
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec

__all__ = ["FILES", "KuaiRand", "click_delays"]

FILES = ("interactions.parquet", "users.parquet", "videos.parquet")

# Tabs with one column of videos: a video starts by itself, and `is_click` says that it played for 7 s or to its end.
_AUTOPLAY_TABS = (1, 2, 4, 5, 6)
_PLAYED_MS = 7_000
_LONGEST_BUCKET = 40  # of 5 s: longer videos are rare, and count as 200 s long

_RANGES = tuple(f"{name}_range" for name in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days"))
_USER_FIELDS = ("user_active_degree", "is_video_author", *_RANGES, *(f"onehot_feat{i}" for i in range(18)))
_VIDEO_FIELDS = ("author_id", "video_type", "upload_type", "music_id", "tag")
_FIELDS = ("user_id", "video_id", "tab", "hour", "duration", *_USER_FIELDS, *_VIDEO_FIELDS)
_COLUMNS = ("user_id", "video_id", "time_ms", "hourmin", "tab", "duration_ms", "is_click")


class KuaiRand(NamedDataSet):
    """The data set `kuairand`: 167,281 impressions, 75,453 clicks. The impression id is the row number."""

    name = "kuairand"
    title = "KuaiRand-Pure: 167,281 short-video impressions, 75,453 clicks, 25 April to 4 May 2022"
    terms = (
        'CC BY-SA 4.0. Attribution: Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly '
        'Exposed Videos", CIKM 2022. Changes made: exact duplicate rows removed, sorted by time, days after 4 May left out, '
        "CSV turned into Parquet."
    )
    clicks = (
        "There is no click time. Tabs 1, 2, 4, 5, 6 (autoplay): impression + min(7 s, duration), what `is_click` means there. "
        "Other tabs: a drawn delay within 60 s, seeded by row."
    )
    obtain = (
        "Download the KuaiRand-Pure archive from the authors' page of the KuaiRand project, then: "
        "headrace data fetch kuairand --archive KuaiRand-Pure.tar.gz"
    )

    folder_name = "kuairand_pure"
    files = FILES

    def schema(self) -> FeatureSchema:
        """The 34 categorical fields that one-pass experiments on this log use."""
        return FeatureSchema(fields=tuple(FieldSpec(name=name) for name in _FIELDS), embedding_dim=16)

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        from deploy.datasets.kuairand_archive import convert

        if archive is None:
            raise DataSetError(f"kuairand: expected --archive, found none: only the authors publish it. {self.obtain}")
        return convert(archive, cache_to_write() / self.folder_name, progress)

    def size(self) -> int:
        return int(pq.read_metadata(self._path() / FILES[0]).num_rows)

    def chunks(self) -> Iterator[Chunk]:
        folder = self._path()
        try:
            log = pq.read_table(folder / FILES[0], columns=list(_COLUMNS))
            users = pq.read_table(folder / FILES[1], columns=["user_id", *_USER_FIELDS])
            videos = pq.read_table(folder / FILES[2], columns=["video_id", *_VIDEO_FIELDS])
        except (pa.ArrowException, OSError) as error:
            raise DataSetError(
                f"{folder}: expected the tables of kuairand, found: {error}. Remove that folder and fetch it again."
            ) from error
        # The members of a user and of a video are encoded once and then looked up: 34 fields for the price of 5.
        user_members, user_ids = _by_id(users, "user_id", _USER_FIELDS)
        video_members, video_ids = _by_id(videos, "video_id", _VIDEO_FIELDS)
        for start in range(0, len(log), CHUNK_ROWS):
            rows = log.slice(start, CHUNK_ROWS)
            numbers = np.arange(start, start + len(rows), dtype=np.int64)
            page = members({"tab": rows["tab"], "hour": pa.array(rows["hourmin"].to_numpy() // 100)})
            duration_ms = rows["duration_ms"].to_numpy()
            buckets = members({"duration": pa.array(np.minimum(duration_ms // 5_000, _LONGEST_BUCKET))})
            clicked = rows["is_click"].to_numpy() == 1
            yield make_chunk(
                ids=[str(number) for number in numbers.tolist()],
                timestamps_ms=rows["time_ms"].to_numpy(),
                clicked=clicked,
                delays_ms=click_delays(rows["tab"].to_numpy(), duration_ms, numbers, seed=self._seed),
                context=concat(_look_up("user_id", user_members, user_ids, rows["user_id"]), page),
                candidate=concat(_look_up("video_id", video_members, video_ids, rows["video_id"]), buckets),
                users=strings(rows["user_id"]),
                items=strings(rows["video_id"]),
            )


def click_delays(tabs: Int64s, duration_ms: Int64s, rows: Int64s, *, seed: int) -> Int64s:
    """The delay that a click of each impression has, if there is one, (N,): between 0 and 60,000 ms."""
    autoplay = np.isin(tabs, _AUTOPLAY_TABS)
    return np.where(autoplay, np.minimum(_PLAYED_MS, np.maximum(duration_ms, 0)), draw_delays(rows, seed=seed))


def _by_id(table: pa.Table, key: str, fields: tuple[str, ...]) -> tuple[pa.Array, pa.Array]:
    """The members of each row, and the ids. The members have one more row, all null, for ids that aren't in the table."""
    values = members({name: table[name] for name in fields})
    missing = members({name: pa.nulls(1) for name in fields})
    return pa.concat_arrays([values, missing]), table[key].combine_chunks()


def _look_up(key: str, values: pa.Array, ids: pa.Array, wanted: pa.ChunkedArray) -> pa.Array:
    rows = pc.fill_null(pc.index_in(wanted, value_set=ids), len(ids))
    return concat(members({key: wanted}), values.take(rows.combine_chunks()))
