"""`state.join_state` with dictionaries in the place of RocksDB. `tests/state/test_join_state.py` holds the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from state.errors import StateInUse
from state.held_click import HeldClick
from state.join_state import _ENTRY, Chunk, Entry, JoinMeta, Pending, TimeOffset

__all__ = ["DictState", "Disk"]


class DictState:
    """One open database; `disk` keeps its content when it is closed."""

    def __init__(self) -> None:
        self.path = Path()
        self.open = False
        self.ids: dict[bytes, Entry] = {}
        self.payloads: dict[tuple[int, int], tuple[bytes, bytes, bool]] = {}
        self.held_clicks: dict[TimeOffset, HeldClick] = {}
        self.early: dict[tuple[bytes, int, int], bytes] = {}
        self.chunks: dict[Chunk, list[bytes]] = {}
        self._meta: JoinMeta | None = None

    def meta(self) -> JoinMeta | None:
        return self._meta

    def batch(self) -> _Batch:
        return _Batch(self)

    def entries(self, keys: Sequence[bytes]) -> list[Entry | None]:
        return [self.ids.get(key) for key in keys]

    def packed_entries(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [None if entry is None else _ENTRY.pack(*entry) for entry in self.entries(keys)]

    def pending(self, places: Sequence[TimeOffset]) -> list[Pending | None]:
        return [(*place, *self.payloads[place]) if place in self.payloads else None for place in places]

    def pending_between(self, begin: TimeOffset, end: TimeOffset) -> Iterator[Pending]:
        for place in sorted(self.payloads):
            if begin <= place < end:
                yield (*place, *self.payloads[place])

    def held(self, places: Sequence[TimeOffset]) -> list[HeldClick | None]:
        return [self.held_clicks.get(place) for place in places]

    def held_between(self, begin: TimeOffset, end: TimeOffset) -> dict[TimeOffset, HeldClick]:
        return {place: click for place, click in self.held_clicks.items() if begin <= place < end}

    def early_clicks(self) -> Iterator[tuple[bytes, tuple[int, int, bytes]]]:
        for (key, time_ms, offset), value in sorted(self.early.items()):
            yield key, (time_ms, offset, value)

    def all_chunks(self) -> Iterator[Chunk]:
        yield from sorted(self.chunks)

    def pending_impressions(self) -> Iterator[TimeOffset]:
        yield from sorted(self.payloads)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.open = False


class _Batch:
    def __init__(self, state: DictState) -> None:
        self._state = state
        self._changes: list[Callable[[], Any]] = []

    def remember(self, impressions: Iterable[tuple[bytes, Entry]]) -> None:
        rows = dict(impressions)
        self._changes.append(lambda: self._state.ids.update(rows))

    def add_pending(self, impressions: Iterable[tuple[int, int, bytes, bytes]], *, labelled: bool = False) -> None:
        rows = {(time_ms, offset): (key, value, labelled) for time_ms, offset, key, value in impressions}
        self._changes.append(lambda: self._state.payloads.update(rows))

    def drop_pending(self, impressions: Iterable[tuple[int, int]]) -> None:
        for place in impressions:
            self._changes.append(lambda place=place: self._state.payloads.pop(place, None))

    def drop_pending_before(self, from_ms: int, until_ms: int) -> None:
        def drop() -> None:
            for place in [place for place in self._state.payloads if from_ms <= place[0] < until_ms]:
                del self._state.payloads[place]

        self._changes.append(drop)

    def hold(self, clicks: Iterable[tuple[TimeOffset, HeldClick]]) -> None:
        rows = dict(clicks)
        self._changes.append(lambda: self._state.held_clicks.update(rows))

    def drop_held(self, places: Iterable[TimeOffset]) -> None:
        for place in places:
            self._changes.append(lambda place=place: self._state.held_clicks.pop(place, None))

    def add_early(self, clicks: Iterable[tuple[bytes, tuple[int, int, bytes]]]) -> None:
        rows = {(key, time_ms, offset): value for key, (time_ms, offset, value) in clicks}
        self._changes.append(lambda: self._state.early.update(rows))

    def drop_early(self, clicks: Iterable[tuple[bytes, tuple[int, int, bytes]]]) -> None:
        for key, (time_ms, offset, _) in clicks:
            self._changes.append(lambda place=(key, time_ms, offset): self._state.early.pop(place, None))

    def add_chunk(self, chunk: Chunk, keys: Sequence[bytes]) -> None:
        self._changes.append(lambda: self._state.chunks.update({chunk: list(keys)}))

    def forget(self, chunk: Chunk, before_ms: Callable[[int], int], changed: Mapping[bytes, Entry]) -> None:
        for key in self._state.chunks.get(chunk, []):
            entry = changed.get(key, self._state.ids.get(key))
            if entry is not None and entry[0] < before_ms(entry[1]):
                self._changes.append(lambda key=key: self._state.ids.pop(key, None))
        self._changes.append(lambda: self._state.chunks.pop(chunk, None))

    def set_meta(self, meta: JoinMeta) -> None:
        self._changes.append(lambda: setattr(self._state, "_meta", meta))

    def drop_meta(self) -> None:
        self._changes.append(lambda: setattr(self._state, "_meta", None))

    def write(self) -> None:
        for change in self._changes:
            change()


class Disk:
    """In the place of the class `JoinState`: what was closed is there when it is opened again."""

    def __init__(self) -> None:
        self._folders: dict[Path, DictState] = {}

    def __call__(self, path: Path, options: object) -> DictState:
        state = self._folders.setdefault(path, DictState())
        if state.open:
            raise StateInUse(f"{path}: lock hold by current process")
        state.path, state.open = path, True
        return state

    def destroy(self, path: Path) -> None:
        self._folders.pop(path, None)

    def set_aside(self, path: Path, why: str) -> Path:
        self._folders.pop(path)
        return path.with_name(f"{path.name}.{why}-now")

    def copy(self, path: Path, to: Path) -> None:
        """A folder copied, as it is; nothing where there is none."""
        if path in self._folders:
            self.put(to, deepcopy(self._folders[path]))

    def get(self, path: Path) -> DictState | None:
        return self._folders.get(path)

    def put(self, path: Path, state: DictState) -> None:
        """A folder copied from elsewhere."""
        state.open = False
        self._folders[path] = state
