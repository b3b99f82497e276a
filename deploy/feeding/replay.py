"""Replaying a data set: impressions and clicks in event-time order, at a chosen pace, with a watermark at the end.

A part of the impressions can be scored before they are sent, as in a live system: a score request goes out first (the user's
features, and the item shown among other items of that hour), and the impression carries the answer's score and version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from deploy.datasets.base import Chunk, DataSet
from deploy.errors import DataSetError
from deploy.feeding.ended_streams import refuse_late
from deploy.feeding.feed import Feed, Pace
from deploy.feeding.scoring import Scoring
from deploy.feeding.sender import Sender
from deploy.feeding.stats import ReplayStats
from deploy.settings import Settings

__all__ = ["Block", "Replayer", "impressions", "merge"]

_STEP = 1_000  # events sent at once: batches stay large, and the two topics stay close in event time
_SCORED_STEP = 256  # the same with score requests: an impression waits for the answers of its whole step
_json = msgspec.json.Encoder().encode

_RECORD_BYTES = 100  # overhead of a batch with one record, beside its key and value


@dataclass(frozen=True, slots=True)
class Block:
    """E events in event-time order. `rows` has the row of each impression in `chunk`, and of each click in `click_ids`."""

    chunk: Chunk
    click_ids: list[str]
    times_ms: npt.NDArray[np.int64]  # (E,) never falling, also from block to block
    is_click: npt.NDArray[np.bool_]  # (E,)
    rows: npt.NDArray[np.int64]  # (E,)


class Replayer(Sender[ReplayStats]):
    """One replay of a data set.

    ```python
    replayer = Replayer(KuaiRand(), settings, rate=5_000, scored_fraction=0.2)
    threading.Thread(target=replayer.run).start()      # or: await replayer.run_async()
    replayer.stats.impressions                         # any time, from any thread
    ```

    Running it raises DataSetError when the data set is missing, unreadable or empty, or when the topics hold a stream that
    ended later than this one begins.

    Args:
        speed: multiple of event time; None: not paced by event time.
        rate: events a second; None: not paced by count. With neither `speed` nor `rate`, as fast as possible.
        limit: impressions to send; all when None.
        loop: start again at the end, later in event time and with new ids, until stopped or the limit is reached.
        seed: decides which impressions are scored, and which candidates their requests have.
        scored_fraction: share of impressions for which a score is requested first.
        candidates: items in a score request, including the one shown (fewer while few have been seen).
        score_timeout_ms: longest wait for the answers of one step.
        end_watermark: end with a watermark record beyond the last window.
        on_progress: called after every step.
    """

    def __init__(
        self,
        data_set: DataSet,
        settings: Settings,
        *,
        speed: float | None = None,
        rate: float | None = None,
        limit: int | None = None,
        loop: bool = False,
        seed: int = 0,
        scored_fraction: float = 0.0,
        candidates: int = 10,
        score_timeout_ms: int = 1_000,
        end_watermark: bool = True,
        on_progress: Callable[[ReplayStats], None] | None = None,
    ) -> None:
        pace = Pace(speed=speed, rate=rate)
        super().__init__(settings, ReplayStats(), pace, end_watermark=end_watermark, on_progress=on_progress)
        self._data_set = data_set
        self._limit = limit
        self._loop = loop
        self._scoring: Scoring | None = None
        if scored_fraction > 0:
            self._scoring = Scoring(
                settings,
                fraction=scored_fraction,
                candidates=candidates,
                timeout_ms=score_timeout_ms,
                seed=seed,
                stats=self.stats,
            )

    async def _send_all(self) -> None:
        most = _STEP if self._scoring is None else _SCORED_STEP
        async with AsyncExitStack() as stack:
            feed = await stack.enter_async_context(Feed(self._settings.kafka))
            if self._scoring is not None:
                await stack.enter_async_context(self._scoring.using(feed))
            for block in merge(self._chunks()):
                if self.stats.event_time_ms < 0:
                    await refuse_late(self._settings.kafka, self._topics, self._settings.join, int(block.times_ms[0]))
                    self._pace.begin(int(block.times_ms[0]))
                await self._send_paced(block.times_ms, most, partial(self._send_step, feed, block))
                if self._stop.is_set():
                    break
            if self.stats.event_time_ms < 0:
                raise DataSetError(f"{self._data_set.name}: expected at least one impression, found none. Check its file.")
            await self._end(feed, self.stats.event_time_ms)

    async def _send_step(self, feed: Feed, block: Block, step: slice) -> None:
        clicks = block.is_click[step]
        rows, click_rows = block.rows[step][~clicks].tolist(), block.rows[step][clicks].tolist()
        chunk = block.chunk
        served = await self._scoring.ask(chunk, rows) if self._scoring is not None and rows else {}
        keys = [chunk.ids[row].encode() for row in rows]
        values: list[bytes] = impressions(chunk, rows, served)
        self._check_sizes(keys, values)
        await feed.send(self._topics.impressions, keys, values)
        clicked = [block.click_ids[row] for row in click_rows]
        values = [
            b'{"impression_id":%b,"timestamp":%d}' % (_json(name), when)
            for name, when in zip(clicked, block.times_ms[step][clicks].tolist(), strict=True)
        ]
        await feed.send(self._topics.clicks, [name.encode() for name in clicked], values)
        self.stats.impressions += len(rows)
        delays_ms = (chunk.click_timestamps_ms - chunk.timestamps_ms)[rows][chunk.clicked[rows]]
        self.stats.clicks_beyond_window += int((delays_ms > self._settings.join.window_ms).sum())
        self.stats.clicks += len(click_rows)
        self.stats.event_time_ms = int(block.times_ms[step.stop - 1])

    def _check_sizes(self, keys: list[bytes], values: list[bytes]) -> None:
        most = self._settings.topics.max_message_bytes
        if not values or max(map(len, keys)) + max(map(len, values)) + _RECORD_BYTES <= most:
            return
        for key, value in zip(keys, values, strict=True):
            if len(key) + len(value) + _RECORD_BYTES > most:
                raise DataSetError(
                    f"impression {key.decode()!r}: expected an event of at most {most} bytes (topics.max_message_bytes), found "
                    f"{len(value)}. Shorten its features, or raise topics.max_message_bytes."
                )

    def _chunks(self) -> Iterator[Chunk]:
        left = self._limit
        for chunk in _looped(self._data_set, self._settings.join.max_future_ms) if self._loop else self._data_set.chunks():
            if left is not None and len(chunk) >= left:
                yield chunk.head(left)
                return
            if left is not None:
                left -= len(chunk)
            yield chunk


def impressions(chunk: Chunk, rows: Sequence[int], served: Mapping[int, bytes]) -> list[bytes]:
    """The values of these rows' impressions. `served` has the answer's members by row; they replace the chunk's own."""
    times = chunk.timestamps_ms[list(rows)].tolist() if rows else []
    own = chunk.served
    return [
        b'{"impression_id":%b,"timestamp":%d,"features":%b%b}'
        % (_json(chunk.ids[row]), when, chunk.features[row], served.get(row, b"" if own is None else own[row]))
        for when, row in zip(times, rows, strict=True)
    ]


def merge(chunks: Iterator[Chunk]) -> Iterator[Block]:
    """All events in event-time order; in one millisecond, impressions come before clicks.

    Raises:
        DataSetError: an impression is older than the one before it.
    """
    waiting_ids: list[str] = []
    waiting_ms = np.empty(0, np.int64)
    last_ms = -1
    chunk: Chunk | None = None
    for chunk in chunks:
        if not len(chunk):
            continue
        times_ms = chunk.timestamps_ms
        if times_ms[0] < last_ms or (np.diff(times_ms) < 0).any():
            raise DataSetError(
                "impressions: expected event times that never fall, found an earlier one after a later one. Sort them by time."
            )
        last_ms = int(times_ms[-1])
        clicked = np.flatnonzero(chunk.clicked)
        ids = waiting_ids + [chunk.ids[row] for row in clicked.tolist()]
        clicks_ms = np.concatenate([waiting_ms, chunk.click_timestamps_ms[clicked]])
        # Clicks from the chunk's last millisecond on wait: the next chunk may have impressions of that millisecond.
        now = clicks_ms < last_ms
        yield _block(chunk, [ids[i] for i in np.flatnonzero(now).tolist()], clicks_ms[now], np.arange(len(chunk)))
        waiting_ids, waiting_ms = [ids[i] for i in np.flatnonzero(~now).tolist()], clicks_ms[~now]
    if chunk is not None and waiting_ids:
        yield _block(chunk, waiting_ids, waiting_ms, np.empty(0, np.int64))


def _block(chunk: Chunk, click_ids: list[str], clicks_ms: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Block:
    times_ms = np.concatenate([chunk.timestamps_ms[rows], clicks_ms])
    is_click = np.arange(len(times_ms)) >= len(rows)
    order = np.lexsort((is_click, times_ms))  # stable: equal events stay in the data set's order
    every = np.concatenate([rows, np.arange(len(clicks_ms))])
    return Block(chunk, click_ids, times_ms[order], is_click[order], every[order])


def _looped(data_set: DataSet, max_future_ms: int) -> Iterator[Chunk]:
    """The data set again and again: each round begins after the last click of the round before, with new ids.

    Raises:
        DataSetError: a round would lie in the future, or an id could also be one of another round.
    """
    shift_ms, number = 0, 0
    while True:
        first_ms, last_ms = -1, -1
        for chunk in data_set.chunks():
            first_ms = int(chunk.timestamps_ms[0]) if first_ms < 0 else first_ms
            last_ms = max(last_ms, int(chunk.timestamps_ms[-1]), int(chunk.click_timestamps_ms.max()))
            if number == 0 and (odd := next((name for name in chunk.ids if "~" in name), None)):
                raise DataSetError(
                    f"--loop: expected ids without '~', which marks a later round, found {odd!r}. Change that id."
                )
            if number and last_ms + shift_ms > time.time() * 1_000 + max_future_ms:
                raise DataSetError(
                    f"--loop: expected round {number + 1} to lie in the past, found that it reaches more than "
                    "join.max_future_ms ahead of now: the join would reject its events. Replay a log that ended longer ago, or "
                    "stop at --limit."
                )
            yield _shifted(chunk, shift_ms, number) if number else chunk
        if first_ms < 0:
            return
        shift_ms += last_ms - first_ms + 1
        number += 1


def _shifted(chunk: Chunk, shift_ms: int, number: int) -> Chunk:
    clicks_ms = chunk.click_timestamps_ms
    return replace(
        chunk,
        ids=[f"{name}~{number}" for name in chunk.ids],
        timestamps_ms=chunk.timestamps_ms + shift_ms,
        click_timestamps_ms=np.where(chunk.clicked, clicks_ms + shift_ms, -1),
    )
