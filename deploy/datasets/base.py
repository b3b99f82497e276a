"""What a data set is: impressions and clicks in event-time order, a chunk of columns at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deploy.datasets.encode import objects
from deploy.errors import DataSetError
from model.schema import FeatureSchema

__all__ = [
    "CHUNK_ROWS",
    "MAX_DELAY_MS",
    "Chunk",
    "DataSet",
    "Int64s",
    "Pair",
    "Progress",
    "cache_folder",
    "cache_to_write",
    "draw_delays",
    "draw_uniform",
    "look_for",
    "make_chunk",
    "no_pair",
    "not_there",
    "replacing",
]

CHUNK_ROWS = 8_192
"""Impressions a chunk: some 5 MB encoded, and few enough that a replay's memory stays flat."""

CHECKOUT = Path(__file__).resolve().parents[2]

MAX_DELAY_MS = 60_000
"""Attribution window that the built-in data sets are made for; no drawn delay goes beyond it."""

_MEAN_DELAY_MS = 8_000  # of a drawn delay, before the cut at the window: most clicks come within seconds, a few late

Int64s = npt.NDArray[np.int64]
Progress = Callable[[str], None]
Pair = Callable[[str, str], bytes]


def no_pair(user: str, item: str) -> bytes:
    """No feature is made of a user and an item together."""
    return b""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive impressions, N of them, none earlier than those of the chunk before.

    `features` is the JSON object of the event; `contexts` and `candidates` are the same split into what is known before
    something is chosen (the user, the page) and what belongs to the thing shown, as JSON objects too: score requests are
    made of them. `pair` gives the members of features that are made of a user and an item together, so that another item can
    be offered to this user. `served` holds what an event carries of the answer that it was shown with, as members of its JSON
    object that begin with a comma, empty where nothing was served.
    """

    ids: list[str]  # of the impressions, unique
    timestamps_ms: Int64s  # (N,) event time, never falling
    features: list[bytes]
    clicked: npt.NDArray[np.bool_]  # (N,)
    click_timestamps_ms: Int64s  # (N,), -1 where there is no click
    contexts: list[bytes]
    candidates: list[bytes]
    users: list[str]
    items: list[str]
    pair: Pair = no_pair
    served: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def head(self, rows: int) -> Chunk:
        """The first `rows` impressions."""
        return replace(
            self,
            ids=self.ids[:rows],
            timestamps_ms=self.timestamps_ms[:rows],
            features=self.features[:rows],
            clicked=self.clicked[:rows],
            click_timestamps_ms=self.click_timestamps_ms[:rows],
            contexts=self.contexts[:rows],
            candidates=self.candidates[:rows],
            users=self.users[:rows],
            items=self.items[:rows],
            served=None if self.served is None else self.served[:rows],
        )


class DataSet(Protocol):
    """Real or generated impressions and clicks under a name."""

    name: str
    title: str  # one line: what it is, how many rows
    terms: str  # licence, who is to be named, what was changed
    clicks: str  # how clicks are dated, plainly
    obtain: str  # how to get it

    def schema(self) -> FeatureSchema:
        """The features that the events carry, as the model should read them."""
        ...

    def find(self) -> Path | None:
        """Where it is on this machine, or None."""
        ...

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        """Put it into the cache; `archive` is a file that the user has downloaded. Raises DataSetError."""
        ...

    def size(self) -> int | None:
        """How many impressions, where that is known without reading it all. Raises DataSetError when it is not there."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """All of it, in event-time order. Raises DataSetError: it is not there, or not what it should be."""
        ...


def make_chunk(
    *,
    ids: list[str],
    timestamps_ms: Int64s,
    clicked: npt.NDArray[np.bool_],
    delays_ms: Int64s,
    context: pa.Array,
    candidate: pa.Array | None,
    users: list[str],
    items: list[str],
    both: pa.Array | None = None,
    pair: Pair = no_pair,
    served: list[bytes] | None = None,
) -> Chunk:
    """Put a chunk together from the members of its JSON objects (`deploy.datasets.encode.members`).

    `candidate` is None where a data set doesn't tell the thing shown from the rest; `both` are the members made of user and
    item together, as `pair` makes them.
    """
    every = [part for part in (context, candidate, both) if part is not None]
    return Chunk(
        ids=ids,
        timestamps_ms=timestamps_ms,
        features=objects(*every),
        clicked=clicked,
        click_timestamps_ms=np.where(clicked, timestamps_ms + delays_ms, -1),
        contexts=objects(context),
        candidates=[b"{}"] * len(ids) if candidate is None else objects(candidate),
        users=users,
        items=items,
        pair=pair,
        served=served,
    )


def cache_folder() -> Path:
    """Where fetched data sets are kept: `headrace/data` in the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    # The XDG specification: a relative path is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "headrace" / "data"


def cache_to_write() -> Path:
    """The same, made where it is missing; asked before anything is downloaded.

    Raises:
        DataSetError: this user can't write there.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataSetError(
            f"cache of data sets: expected a folder that can be written, found {error.strerror} at {folder}. Set "
            "XDG_CACHE_HOME to another folder, or put the files into a folder of HEADRACE_DATA_DIR."
        ) from error
    return folder


def look_for(folder: str, files: tuple[str, ...]) -> Path | None:
    """The first folder of that name holding all the files: in HEADRACE_DATA_DIR, then `data/` here, then the cache.

    HEADRACE_DATA_DIR may also be the data set's folder itself.

    Raises:
        DataSetError: HEADRACE_DATA_DIR is set and is not a folder.
    """
    places = [Path("data"), CHECKOUT / "data", cache_folder()]
    given = os.environ.get("HEADRACE_DATA_DIR")
    if given:
        if not Path(given).is_dir():
            raise DataSetError(
                f"HEADRACE_DATA_DIR: expected a folder, found nothing at {given}. Mend the path, or unset the variable to "
                f"look in data/ and {cache_folder()}."
            )
        places = [Path(given), Path(given).parent, *places] if Path(given).name == folder else [Path(given), *places]
    for place in places:
        if all((place / folder / file).is_file() for file in files):
            return place / folder
    return None


def not_there(data_set: DataSet, folder: Path | None, files: tuple[str, ...]) -> DataSetError:
    """The error for a data set of which none of the files is in its folder."""
    found = "none"
    if folder is not None and folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        found = ", ".join(names[:5]) if names else "nothing"
    elif folder is not None and folder.exists():
        found = "a file"
    where = data_set.name if folder is None else str(folder)
    return DataSetError(f"{where}: expected a folder with {' or '.join(files)}, found {found}. {data_set.obtain}")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends well: half a data set is never found."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename can't cross file systems.
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        yield part
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def draw_uniform(rows: Int64s, *, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each row number, (N,): SplitMix64 of the row and the seed, whatever chunk the row comes in."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        x = rows.astype(np.uint64) + np.uint64(1 + seed % (1 << 32)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def draw_delays(rows: Int64s, *, seed: int) -> Int64s:
    """Click delays in ms for row numbers: exponential with a mean of 8 s, cut at 60 s, at least 300 ms."""
    shortest = 300.0  # nobody taps faster
    kept = 1.0 - np.exp(-(MAX_DELAY_MS - shortest) / _MEAN_DELAY_MS)  # inverse of the truncated distribution
    delays = shortest - _MEAN_DELAY_MS * np.log1p(-draw_uniform(rows, seed=seed) * kept)
    return np.minimum(delays, MAX_DELAY_MS).astype(np.int64)
