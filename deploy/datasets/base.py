"""The protocol of data sets: impressions and clicks in event-time order, in chunks of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deploy.datasets.encode import objects
from model.schema import FeatureSchema

__all__ = [
    "CHUNK_ROWS",
    "MAX_DELAY_MS",
    "Chunk",
    "DataSet",
    "Int64s",
    "Pair",
    "Progress",
    "draw_delays",
    "draw_uniform",
    "make_chunk",
    "no_pair",
]

CHUNK_ROWS = 8_192
"""Impressions in a chunk: about 5 MB when encoded, so that a replay's memory stays flat."""

MAX_DELAY_MS = 60_000
"""The attribution window of the built-in data sets: no drawn click delay is longer."""

_MEAN_DELAY_MS = 8_000  # of drawn delays, before the cut at the window: most clicks come within seconds, a few late

Int64s = npt.NDArray[np.int64]
Progress = Callable[[str], None]
Pair = Callable[[str, str], bytes]


def no_pair(user: str, item: str) -> bytes:
    """For data sets without features that combine a user and an item."""
    return b""


@dataclass(frozen=True, slots=True)
class Chunk:
    """N consecutive impressions, none earlier than those of the chunk before.

    Attributes:
        features: the event's features, as a JSON object.
        contexts: the features that are known before an item is chosen (of the user, of the page), as a JSON object.
        candidates: the features of the item shown, as a JSON object. Score requests are made of contexts and candidates.
        pair: gives the members of the features that combine a user and an item, so that another item can be offered.
        served: score and version of the answer that the item was shown with, as members of the event's JSON object that begin
            with a comma; empty where nothing was served.
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
    """Impressions and clicks under a name."""

    name: str
    title: str  # one line: what it is, how many rows
    terms: str  # licence, attribution, what was changed
    clicks: str  # where the times of clicks come from
    obtain: str  # how to get it

    def schema(self) -> FeatureSchema:
        """The features of the events, as the model should read them."""
        ...

    def find(self) -> Path | None:
        """Its folder or file on this machine, or None."""
        ...

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        """Put it into the cache, from `archive` if the user has downloaded one. Raises DataSetError."""
        ...

    def size(self) -> int | None:
        """How many impressions it has; None where that takes reading everything. Raises DataSetError: it isn't found."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """Everything, in event-time order. Raises DataSetError: it isn't found, or has another format."""
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
    """Make a chunk from the members of its JSON objects (`deploy.datasets.encode.members`).

    Args:
        candidate: features of the item shown; None where a data set doesn't say which features are the item's.
        both: features that combine user and item, as `pair` makes them.
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


def draw_uniform(rows: Int64s, *, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each row number, (N,): SplitMix64 of the row and the seed, so that chunks don't matter."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        x = rows.astype(np.uint64) + np.uint64(1 + seed % (1 << 32)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def draw_delays(rows: Int64s, *, seed: int) -> Int64s:
    """Click delays in ms for row numbers, (N,): exponential with a mean of 8 s, between 300 ms and 60 s."""
    shortest = 300.0  # nobody taps faster
    kept = 1.0 - np.exp(-(MAX_DELAY_MS - shortest) / _MEAN_DELAY_MS)  # inverse of the truncated distribution
    delays = shortest - _MEAN_DELAY_MS * np.log1p(-draw_uniform(rows, seed=seed) * kept)
    return np.minimum(delays, MAX_DELAY_MS).astype(np.int64)
