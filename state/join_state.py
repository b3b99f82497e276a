"""The join's state for one partition number, cached in RocksDB.

The state follows from the committed log, which is authoritative: a folder that is lost, old or copied from elsewhere is rebuilt
from the log (`stream/join/takeover.py`). Each partition number has one database, for both of its sources.

| column family | key | value |
| --- | --- | --- |
| `ids` | impression id | event time, offset, clicked: every impression remembered, for dedupe and matching |
| `payloads` | event time, offset | id, whether the first label is sent, bytes: pending impressions in the order of expiry |
| `held` | event time, offset of an impression | event time and arrival of its click, which waits for the impression's label |
| `early` | id, event time and offset of the click | the click's record: clicks whose impression has not come |
| `chunks` | first offset, largest event time, position | the ids that one step remembered, so that forgetting needs no scan |
| default | `meta` | identity, positions and watermark, written in one batch with the changes that they stand for |
| default | `filler` | empty, or bytes that fill the write buffer so that all families are flushed at one point |
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteBufferManager,
    WriteOptions,
)

from state.errors import JoinStateError, StateDamaged
from state.held_click import HeldClick, pack_held, unpack_held
from state.join_folder import set_aside, state_error

__all__ = ["LAYOUT", "Chunk", "Entry", "JoinMeta", "JoinState", "Pending", "StateBatch", "StateOptions", "TimeOffset"]

# The layout of this table. Older layouts can be read as they are. Layout 3, of Headrace 0.1.0, has no `held`, and its `meta`
# names the layout in `identity` instead of `layout`. Layout 4 has no arrivals of clicks, in `held` and in `early`.
LAYOUT = 5

_ENTRY = struct.Struct("<qq?")  # event time, offset, clicked
_ORDERED = struct.Struct(">QQ")  # event time, offset, both >= 0: big-endian bytes sort as the numbers do
_CHUNK = struct.Struct(">QQQ")  # first offset, largest event time, examples position
# Length of an id (far below 2 GiB). The top bit says that the first label is sent; only Headrace 0.1.0 set it.
_U32 = struct.Struct("<I")
_LABELLED = 1 << 31
_LENGTH = _LABELLED - 1

Entry = tuple[int, int, bool]  # event time ms, offset, clicked
TimeOffset = tuple[int, int]  # event time (ms) and offset of an impression: its key in `payloads` and `held`
Pending = tuple[int, int, bytes, bytes, bool]  # event time ms, offset, id, value, whether 0.1.0 has sent its first label


class Chunk(msgspec.Struct, frozen=True, order=True):
    """The key of a chunk: the ids that one step remembered. `examples_position` is the end of `examples` before the step."""

    first_offset: int
    max_time_ms: int
    examples_position: int


class JoinMeta(msgspec.Struct, frozen=True, kw_only=True):
    """How far the state reflects the log. Positions are the next offsets to read."""

    identity: str  # cluster id, topic ids and partition of the log; the state of another log is discarded
    layout: int = 3  # see LAYOUT
    impressions_position: int
    clicks_position: int
    examples_position: int
    watermark_ms: int
    cut: int = 0  # first labels with (event time + hold, offset) < (watermark, cut) are sent
    impressions_seen_ms: int  # the watermark of each source
    clicks_seen_ms: int
    life: str = ""  # the life of the committed progress that this state belongs to; "" in versions without lives


class _Layout(msgspec.Struct):
    """The only part of `meta` that can be read in every layout, including newer ones."""

    layout: int = 3


class StateOptions:
    """RocksDB options shared by all partitions of a worker: one block cache, and one bound for all write buffers.

    Without the bound each partition's buffers take some 120 MB, those being flushed included: 7.5 GB with 64 partitions. At the
    bound RocksDB flushes the partition that is being written to, with all of its families at once.
    """

    def __init__(self, cache_mb: int = 64, max_open_files: int = 256, write_buffers_mb: int = 256) -> None:
        self._cache = Cache(cache_mb << 20)
        self._max_open_files = max_open_files
        self._buffers = WriteBufferManager(write_buffers_mb << 20, False)

    def database(self) -> Options:
        options = self.family(write_buffer_mb=1)
        options.create_if_missing(True)
        options.create_missing_column_families(True)
        options.set_max_background_jobs(2)
        options.set_keep_log_file_num(2)
        # Table files for each partition; by default RocksDB keeps all of them open.
        options.set_max_open_files(self._max_open_files)
        # There is no write-ahead log. After a crash all families are as they were at the last flush.
        options.set_atomic_flush(True)
        options.set_write_buffer_manager(self._buffers)
        return options

    def family(self, *, write_buffer_mb: int, bloom: bool = False, block_kb: int = 4) -> Options:
        options = Options(raw_mode=True)
        table = BlockBasedOptions()
        table.set_block_cache(self._cache)
        table.set_block_size(block_kb << 10)
        if bloom:
            table.set_bloom_filter(10, False)  # 10 bits a key give 1 % false positives; most ids looked up are new
        options.set_block_based_table_factory(table)
        options.set_write_buffer_size(write_buffer_mb << 20)
        options.set_compression_type(DBCompressionType.lz4())
        return options


class StateBatch:
    """Changes to the state, applied in one atomic write."""

    def __init__(self, state: JoinState) -> None:
        self._state = state
        self._batch = WriteBatch(raw_mode=True)

    def remember(self, impressions: Iterable[tuple[bytes, Entry]]) -> None:
        put, pack, family = self._batch.put, _ENTRY.pack, self._state.ids_family
        for key, (time_ms, offset, clicked) in impressions:
            put(key, pack(time_ms, offset, clicked), family)

    def add_pending(self, impressions: Iterable[tuple[int, int, bytes, bytes]], *, labelled: bool = False) -> None:
        """Add (event time, offset, id, value). `labelled`: Headrace 0.1.0 has sent their first label, as a fake negative."""
        put, pack, length, family = self._batch.put, _ORDERED.pack, _U32.pack, self._state.payloads_family
        mark = _LABELLED if labelled else 0
        for time_ms, offset, key, value in impressions:
            put(pack(time_ms, offset), length(len(key) | mark) + key + value, family)

    def drop_pending(self, impressions: Iterable[tuple[int, int]]) -> None:
        for time_ms, offset in impressions:
            self._batch.delete(_ORDERED.pack(time_ms, offset), self._state.payloads_family)

    def drop_pending_before(self, from_ms: int, until_ms: int) -> None:
        """Drop pending impressions with `from_ms <= event time < until_ms`, in one range tombstone."""
        if until_ms > max(from_ms, 0):
            begin, end = _ORDERED.pack(max(from_ms, 0), 0), _ORDERED.pack(until_ms, 0)
            self._batch.delete_range(begin, end, self._state.payloads_family)

    def hold(self, clicks: Iterable[tuple[TimeOffset, HeldClick]]) -> None:
        """Keep the click of an impression whose label waits, by the impression's (event time, offset)."""
        for (time_ms, offset), click in clicks:
            self._batch.put(_ORDERED.pack(time_ms, offset), pack_held(click), self._state.held_family)

    def drop_held(self, impressions: Iterable[TimeOffset]) -> None:
        for time_ms, offset in impressions:
            self._batch.delete(_ORDERED.pack(time_ms, offset), self._state.held_family)

    def add_early(self, clicks: Iterable[tuple[bytes, tuple[int, int, bytes]]]) -> None:
        for key, (time_ms, offset, value) in clicks:
            self._batch.put(key + _ORDERED.pack(time_ms, offset), value, self._state.early_family)

    def drop_early(self, clicks: Iterable[tuple[bytes, tuple[int, int, bytes]]]) -> None:
        for key, (time_ms, offset, _) in clicks:
            self._batch.delete(key + _ORDERED.pack(time_ms, offset), self._state.early_family)

    def add_chunk(self, chunk: Chunk, keys: Sequence[bytes]) -> None:
        name = _CHUNK.pack(chunk.first_offset, chunk.max_time_ms, chunk.examples_position)
        self._batch.put(name, msgspec.msgpack.encode(keys), self._state.chunks_family)

    def forget(self, chunk: Chunk, before_ms: Callable[[int], int], changed: Mapping[bytes, Entry]) -> None:
        """Forget the ids of a chunk, except ids that a newer impression has used again.

        An id is forgotten if the event time of its impression is below `before_ms` of the impression's offset. `changed` has
        the entries that this batch writes, which the state doesn't have yet.
        """
        name = _CHUNK.pack(chunk.first_offset, chunk.max_time_ms, chunk.examples_position)
        packed = self._state.chunks.get(name)
        keys = msgspec.msgpack.decode(packed, type=list[bytes]) if packed else []
        for key, stored in zip(keys, self._state.entries(keys), strict=True):
            entry = changed.get(key, stored)
            if entry is not None and entry[0] < before_ms(entry[1]):
                self._batch.delete(key, self._state.ids_family)
        self._batch.delete(name, self._state.chunks_family)

    def set_meta(self, meta: JoinMeta) -> None:
        self._batch.put(b"meta", msgspec.json.encode(meta), self._state.meta_family)

    def drop_meta(self) -> None:
        """Mark the state as incomplete until the next `set_meta`: a state without `meta` is discarded when it is opened."""
        self._batch.delete(b"meta", self._state.meta_family)

    def write(self) -> None:
        try:
            self._state.db.write(self._batch, self._state.write_options)
        except Exception as error:
            raise state_error(self._state.path, "could not write to it", error) from error


# As large as the write buffer of the default family, which holds `meta`.
_FILLER = bytes(1 << 20)
_HANDLES = (
    *("ids", "payloads", "held_clicks", "early", "chunks", "db"),
    *("ids_family", "payloads_family", "held_family", "early_family", "chunks_family", "meta_family"),
)


class JoinState:
    """One open database.

    Raises:
        StateDamaged: its data is damaged; the caller moves the folder aside (`set_aside`) and rebuilds it from the log.
        StateInUse: another process has it open.
        JoinStateError: it can't be opened for another reason, and its data may be intact.
    """

    def __init__(self, path: Path, options: StateOptions) -> None:
        self.path = path
        families = {
            "ids": options.family(write_buffer_mb=16, bloom=True),
            "payloads": options.family(write_buffer_mb=64, block_kb=16),  # read in order, some 20 to a block
            "held": options.family(write_buffer_mb=1),
            "early": options.family(write_buffer_mb=1),
            "chunks": options.family(write_buffer_mb=4),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.db = Rdict(str(path), options.database(), families, AccessType.read_write())
        except Exception as error:  # rocksdict raises plain Exceptions; it doesn't panic, which would be a BaseException
            raise state_error(path, "could not open it", error) from error
        self.write_options = WriteOptions()
        self.write_options.disable_wal = True
        self.ids, self.payloads = self.db.get_column_family("ids"), self.db.get_column_family("payloads")
        self.held_clicks = self.db.get_column_family("held")
        self.early, self.chunks = self.db.get_column_family("early"), self.db.get_column_family("chunks")
        self.ids_family = self.db.get_column_family_handle("ids")
        self.payloads_family = self.db.get_column_family_handle("payloads")
        self.held_family = self.db.get_column_family_handle("held")
        self.early_family = self.db.get_column_family_handle("early")
        self.chunks_family = self.db.get_column_family_handle("chunks")
        self.meta_family = self.db.get_column_family_handle("default")

    def meta(self) -> JoinMeta | None:
        """How far the state reflects the log; None in a new database and after an unfinished rebuild.

        Raises:
            StateDamaged: `meta` can't be read.
            JoinStateError: a newer version of Headrace has written the state.
        """
        try:
            packed = self.db.get(b"meta")
            if not packed:
                return None
            if (layout := msgspec.json.decode(packed, type=_Layout).layout) > LAYOUT:
                raise JoinStateError(
                    f"{self.path}: expected a state of layout {LAYOUT} or older, found layout {layout}: a newer version of "
                    "Headrace has written it. The folder is left as it is. Run that version, or set another state_dir to "
                    "rebuild from the log."
                )
            return msgspec.json.decode(packed, type=JoinMeta)
        except msgspec.DecodeError as error:
            raise StateDamaged(f"{self.path}: expected positions in its `meta`, found: {error}. It is damaged.") from error
        except JoinStateError:
            raise
        except Exception as error:
            raise state_error(self.path, "could not read it", error) from error

    def batch(self) -> StateBatch:
        return StateBatch(self)

    def packed_entries(self, keys: list[bytes]) -> list[bytes | None]:
        """The stored form of each id's entry, None for an id that isn't remembered, by one multi-get."""
        return self.ids.get(keys) if keys else []

    def entries(self, keys: list[bytes]) -> list[Entry | None]:
        """Each id's entry (event time, offset, clicked); None for an id that isn't remembered."""
        return [None if packed is None else _ENTRY.unpack(packed) for packed in self.packed_entries(keys)]

    def pending(self, impressions: Sequence[TimeOffset]) -> list[Pending | None]:
        """Pending impressions by (event time, offset); None for one that isn't pending."""
        if not impressions:
            return []
        found = self.payloads.get([_ORDERED.pack(time_ms, offset) for time_ms, offset in impressions])
        return [None if row is None else _unpacked(impression, row) for impression, row in zip(impressions, found, strict=True)]

    def pending_between(self, begin: TimeOffset, end: TimeOffset) -> Iterator[Pending]:
        """Pending impressions with `begin <= (event time, offset) < end`, in that order."""
        if end <= begin:
            return
        read = self._range(end)
        unpack, length = _ORDERED.unpack, _U32.unpack_from
        key = start = _ORDERED.pack(*begin)
        for key, row in self.payloads.items(from_key=start, read_opt=read):
            time_ms, offset = unpack(key)
            size = length(row)[0]
            cut = 4 + (size & _LENGTH)
            yield time_ms, offset, row[4:cut], row[cut:], size >= _LABELLED
        self._check_end(self.payloads, key)

    @staticmethod
    def _range(end: TimeOffset) -> ReadOptions:
        """Options of a scan that ends before `end`. Keep them during the scan: the iterator points into their memory."""
        read = ReadOptions()
        read.set_iterate_upper_bound(_ORDERED.pack(*end))
        read.set_readahead_size(1 << 20)
        return read

    def held(self, impressions: Sequence[TimeOffset]) -> list[HeldClick | None]:
        """For each impression, the click that waits for its label; None without one."""
        if not impressions:
            return []
        found = self.held_clicks.get([_ORDERED.pack(time_ms, offset) for time_ms, offset in impressions])
        return [None if packed is None else unpack_held(packed) for packed in found]

    def held_between(self, begin: TimeOffset, end: TimeOffset) -> dict[TimeOffset, HeldClick]:
        """The waiting clicks of all impressions with `begin <= (event time, offset) < end`."""
        if end <= begin:
            return {}
        held: dict[TimeOffset, HeldClick] = {}
        read = self._range(end)
        key = start = _ORDERED.pack(*begin)
        for key, packed in self.held_clicks.items(from_key=start, read_opt=read):
            held[_ORDERED.unpack(key)] = unpack_held(packed)
        self._check_end(self.held_clicks, key)
        return held

    def early_clicks(self) -> Iterator[tuple[bytes, tuple[int, int, bytes]]]:
        """All early clicks: id and (event time, offset, record)."""
        size, key = _ORDERED.size, b""
        for key, value in self.early.items():
            time_ms, offset = _ORDERED.unpack(key[-size:])
            yield key[:-size], (time_ms, offset, value)
        self._check_end(self.early, key)

    def all_chunks(self) -> Iterator[Chunk]:
        """All chunks, in the order of their first offsets."""
        key = b""
        for key in self.chunks.keys():  # noqa: SIM118
            yield Chunk(*_CHUNK.unpack(key))
        self._check_end(self.chunks, key)

    def pending_impressions(self) -> Iterator[TimeOffset]:
        """Event time and offset of all pending impressions. This scans the family: use it in recovery and checks alone."""
        key = b""
        for key in self.payloads.keys():  # noqa: SIM118
            yield _ORDERED.unpack(key)
        self._check_end(self.payloads, key)

    @staticmethod
    def _check_end(family: Rdict, last: bytes) -> None:
        """Raise the error that ended a scan at key `last`, if any: rocksdict's iterators end silently at a damaged block."""
        rows = family.iter()
        rows.seek(last)
        if rows.valid():
            rows.next()
        rows.status()

    def flush(self) -> None:
        """Begin to flush all families at the same point of the log, so that little has to be read again after a crash.

        rocksdict's own flush flushes one family, so that positions could reach the disk without the changes that they stand
        for. RocksDB flushes all families together when a write buffer is full. So this fills a buffer.
        """
        for filler in (_FILLER, b""):  # RocksDB notices the full buffer at the next write
            self.db.put(b"filler", filler, write_opt=self.write_options)

    def close(self) -> None:
        """Flush everything and close. Closing twice is allowed.

        RocksDB flushes all families at the same point when the last handle is gone. rocksdict's `close` would flush one family
        after another, and a crash in between would leave them at different points.
        """
        for name in _HANDLES:
            self.__dict__.pop(name, None)

    @staticmethod
    def destroy(path: Path) -> None:
        """Delete the folder. The log has all of its data."""
        shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def set_aside(path: Path, why: str) -> Path:
        """Rename a closed folder to `partition-3.<why>-<time>`, and delete all but the newest two of these folders.

        The log may no longer have all of its data, because of retention. An operator can inspect the folder or restore it.
        """
        return set_aside(path, why)


def _unpacked(impression: TimeOffset, row: bytes) -> Pending:
    size = _U32.unpack_from(row)[0]
    cut = 4 + (size & _LENGTH)
    return *impression, row[4:cut], row[cut:], size >= _LABELLED
