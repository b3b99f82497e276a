"""Converting the authors' KuaiRand-Pure archive to the three tables that `kuairand` reads."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from deploy.datasets.base import Progress
from deploy.datasets.folders import replacing
from deploy.errors import DataSetError

__all__ = ["convert"]

FIRST_DAY, LAST_DAY = 20220425, 20220504
IMPRESSIONS, CLICKS = 167_281, 75_453  # of the log on which every figure in the docs was measured

_USERS = "user_features_pure.csv"
_VIDEOS = "video_features_basic_pure.csv"


def convert(archive: Path, folder: Path, progress: Progress) -> Path:
    """Write `folder` from the archive: exact duplicate rows removed, 25 April to 4 May, sorted by time (stable).

    Raises:
        DataSetError: `archive` is another file.
    """
    logs, users, videos = [], None, None
    try:
        with tarfile.open(archive) as opened:
            for entry in opened:
                name = Path(entry.name).name
                file = opened.extractfile(entry) if entry.isfile() else None
                if file is None:
                    continue
                if name.startswith("log_standard_") and name.endswith(".csv"):
                    progress(f"reading {name}")
                    logs.append(_ten_days(_table(file)))
                elif name == _USERS:
                    users = _table(file)
                elif name == _VIDEOS:
                    videos = _table(file)
    except (OSError, tarfile.TarError, pa.ArrowException, KeyError) as error:
        raise DataSetError(
            f"{archive}: expected the KuaiRand-Pure archive (tar.gz), found: {error}. Download it again from the authors' page."
        ) from error
    missing = [n for n, t in (("log_standard_*.csv", logs), (_USERS, users), (_VIDEOS, videos)) if not t]
    if missing or users is None or videos is None:
        raise DataSetError(
            f"{archive}: expected the KuaiRand-Pure archive, found no {', '.join(missing)} in it. Use the archive named "
            "Pure: the other two archives of that project hold other samples."
        )
    log = _sorted(_distinct(pa.concat_tables(logs)))
    with replacing(folder) as part:
        for name, table in (("interactions", log), ("users", users), ("videos", videos)):
            pq.write_table(table, part / f"{name}.parquet", compression="zstd")
    clicks = int(pc.sum(log["is_click"]).as_py() or 0)
    if (len(log), clicks) != (IMPRESSIONS, CLICKS):
        progress(
            f"note: expected {IMPRESSIONS:,} impressions with {CLICKS:,} clicks, found {len(log):,} with {clicks:,}: figures "
            "in the docs are for the former"
        )
    return folder


def _table(file: IO[bytes]) -> pa.Table:
    return pyarrow.csv.read_csv(pa.PythonFile(file, mode="r"))


def _ten_days(table: pa.Table) -> pa.Table:
    days = table["date"]
    return table.filter(pc.and_(pc.greater_equal(days, FIRST_DAY), pc.less_equal(days, LAST_DAY)))


def _distinct(table: pa.Table) -> pa.Table:
    """The first of each set of equal rows, in the same order."""
    numbered = table.append_column("__row", pa.array(range(len(table)), pa.int64()))
    first = numbered.group_by(table.column_names).aggregate([("__row", "min")])["__row_min"]
    return table.take(first.take(pc.sort_indices(first)))


def _sorted(table: pa.Table) -> pa.Table:
    return table.take(pc.sort_indices(table["time_ms"]))  # stable: rows of one millisecond keep the log's order
