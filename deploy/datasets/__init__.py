"""Data sets: impressions and clicks as events in event-time order.

| name | what it is |
| --- | --- |
| `kuairand` | short videos, 167,281 impressions with real feedback |
| `movielens-100k` | 100,000 film ratings with real times; a rating of 4 or more is a click |
| `open-bandit` | 60,000 shop recommendations, 0.5 % clicks |
| `criteo`, `avazu` | files that users download themselves, in their public formats |
| `jsonl`, `parquet`, `csv`, `tsv` | any file of a user, with a mapping of columns |

To add a data set, write a class with the members of `DataSet` (see also `named`), and add it to `NAMED` and to this table.
"""

from __future__ import annotations

from pathlib import Path

from deploy.datasets.avazu import Avazu
from deploy.datasets.base import Chunk, DataSet
from deploy.datasets.criteo import Criteo
from deploy.datasets.files import FILE_KINDS, Columns, FileDataSet, Limits
from deploy.datasets.kuairand import KuaiRand
from deploy.datasets.movielens import MovieLens100K
from deploy.datasets.open_bandit import OpenBandit
from deploy.errors import DataSetError

__all__ = ["FILE_KINDS", "NAMED", "Chunk", "Columns", "DataSet", "FileDataSet", "Limits", "default_data_set", "open_data_set"]

NAMED = {data_set.name: data_set for data_set in (KuaiRand, MovieLens100K, OpenBandit, Criteo, Avazu)}


def open_data_set(
    name: str,
    *,
    seed: int = 0,
    path: Path | None = None,
    columns: Columns | None = None,
    limits: Limits | None = None,
) -> DataSet:
    """The data set with that name; `columns` and `limits` are for files (`FILE_KINDS`).

    Args:
        seed: seed of the click delays that are drawn.
        path: for files, the file; for named data sets, the folder to read instead of looking for it.
        limits: what the pipeline accepts; by default what the default settings accept.

    Raises:
        DataSetError: there is no data set with that name, or a file has no path.
    """
    if name in FILE_KINDS:
        if path is None:
            raise DataSetError(f"{name}: expected --path FILE, found none. Pass the file to read.")
        return FileDataSet(path, name, columns, seed=seed, limits=limits)
    if name not in NAMED:
        given = Path(name)
        kind = given.suffix.removeprefix(".")
        if kind in FILE_KINDS or given.is_file():
            kind = kind if kind in FILE_KINDS else "jsonl, parquet, csv or tsv"
            cure = f"For a file, give its format and its path: {kind} --path {name}."
        else:
            cure = "See `headrace data list`."
        raise DataSetError(f"data set {name!r}: expected one of {', '.join((*NAMED, *FILE_KINDS))}, found another name. {cure}")
    return NAMED[name](seed=seed, folder=path)


def default_data_set(*, seed: int = 0) -> DataSet:
    """KuaiRand if it is found, else MovieLens-100K, which may still have to be fetched."""
    found = KuaiRand(seed=seed)
    return found if found.find() is not None else MovieLens100K(seed=seed)
