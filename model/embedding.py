"""The embedding table: rows of weights that a `KeyTable` finds by key, and a step of the optimizer on the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.distinct import Groups, put_rows
from model.errors import SnapshotMismatch
from model.frozen import ModelRows
from model.growing import Column
from model.hashing import EMPTY_KEY
from model.row_optimizers import Adagrad, RowOptimizer
from model.rows import Rows
from model.table import ABSENT_ROW, Choose, Items, KeyTable

__all__ = ["EmbeddingTable", "Gathered", "initial_rows", "take"]

_LANE = (1 << 16) - 1
_LANES_MEAN = 4 * _LANE / 2
_LANES_STD = (4 * ((1 << 32) - 1) / 12) ** 0.5  # standard deviation of the sum of four uniform 16-bit integers


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, in place; the masks make the shifts logical."""
    x.bitwise_xor_((x >> 30) & ((1 << 34) - 1)).mul_(-4658895280553007687)
    x.bitwise_xor_((x >> 27) & ((1 << 37) - 1)).mul_(-7723592293110705685)
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))


def initial_rows(keys: torch.Tensor, dim: int, std: float, seed: int) -> torch.Tensor:
    """Initial embeddings float32 (N, D) of `keys` (N,), nearly normal with standard deviation `std`.

    They depend on key, column and seed alone, not on the order of arrival or the device. Each number is the scaled sum of four
    16-bit lanes of a hash, which is exact in integers. The usual Box-Muller transform takes a logarithm and a cosine, whose
    last bits differ between devices.
    """
    start = _mix(torch.tensor([seed + 1], device=keys.device))
    state = _mix(keys ^ start)
    columns = torch.arange(1, dim + 1, device=keys.device) * -7046029254386353131  # SplitMix64's increment
    bits = _mix(state.unsqueeze(1) + columns)  # (N, D)
    total = bits & _LANE
    for shift in (16, 32, 48):
        total += (bits >> shift) & _LANE
    return (total - int(_LANES_MEAN)).to(torch.float32) * (std / _LANES_STD)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The U distinct rows of a batch, copied out of the table.

    groups              which rows they are, and which elements of the batch read each of them
    embedding_values    float32 (U, 2D): weights, then Adagrad's accumulators
    first_order_values  float32 (U, 1 + K): weight, then the K numbers of its optimizer's state
    history             float32 (U, 2): examples and clicks (`model.history`); None in a table without row history
    """

    groups: Groups
    embedding_values: torch.Tensor
    first_order_values: torch.Tensor
    history: torch.Tensor | None = None

    @property
    def distinct(self) -> torch.Tensor:
        """Row numbers int64 (U,), in no particular order."""
        return self.groups.distinct

    @property
    def inverse(self) -> torch.Tensor:
        """Index in `distinct` of the row of each element of the batch, int64 (N,)."""
        return self.groups.inverse

    @property
    def embedding(self) -> torch.Tensor:
        """Embeddings (U, D)."""
        return self.embedding_values.chunk(2, dim=1)[0].contiguous()

    @property
    def first_order(self) -> torch.Tensor:
        """First-order weights (U,)."""
        return self.first_order_values[:, 0].contiguous()


class Inserted(NamedTuple):
    """What `EmbeddingTable.insert` found and gave.

    rows      int64 (U,): rows of the keys; `ABSENT_ROW` for keys that were refused one
    new_rows  int64 (M,): the new ones among them
    kinds     int64 (M,): their kinds
    """

    rows: torch.Tensor
    new_rows: torch.Tensor
    kinds: torch.Tensor


class EmbeddingTable:
    """Embeddings float32 (R, D) and first-order weights float32 (R,) by key, with their optimizers' state beside them.

    A row holds D weights and their D accumulators, so that an update reads and writes one contiguous range of memory for each
    row of the batch. Row 0 is all zeros, for unknown keys. No operation gets slower as the table fills. The row of a key that
    was evicted is zeros with the key `EMPTY_KEY`, until another key gets that row.

    rows         where the rows are; it has the columns of `columns(dim, first_order)` besides others
    embedding    optimizer of the embeddings
    first_order  optimizer of the first-order weights
    expected     number of keys that fit before the index of keys has to grow
    """

    def __init__(
        self,
        dim: int,
        rows: ModelRows,
        *,
        init_std: float,
        embedding: Adagrad,
        first_order: RowOptimizer,
        seed: int,
        expected: int,
    ) -> None:
        self.dim = dim
        self._rows = rows
        self._init_std = init_std
        self._embedding, self._first_order = embedding, first_order
        self._seed = seed
        self.keys = KeyTable(rows.device, expected=expected)

    @staticmethod
    def columns(dim: int, first_order: RowOptimizer, *, history: bool = False) -> dict[str, Column]:
        """The columns of a table of dimension `dim`: by the optimizer of first-order weights, with row history or without."""
        state = {f"{name}.first_order": at for at, name in enumerate(first_order.STATE, start=1)}
        columns = {
            "keys": Column(dtype=torch.int64, parts={"keys": slice(None)}),
            "embedding": Column((2 * dim,), parts={"embedding": slice(0, dim), "adagrad.embedding": slice(dim, 2 * dim)}),
            "first_order": Column((1 + len(state),), parts={"first_order": 0, **state}),
        }
        return {**columns, "history": Column((2,), parts={"history": slice(None)})} if history else columns

    def __len__(self) -> int:
        """Number of keys, and of rows with keys."""
        return len(self.keys)

    @property
    def has_free_rows(self) -> bool:
        """Whether there are rows whose keys were evicted."""
        return self.keys.last_row > len(self.keys)

    def insert(
        self,
        groups: Groups,
        kinds: Callable[[], torch.Tensor],
        embedding: torch.Tensor,
        first_order: torch.Tensor,
        choose: Choose | None = None,
    ) -> Inserted:
        """Row numbers of U keys, by which N elements are grouped. A new key gets a new row with initial weights.

        kinds        gives int64 (N,): the kind (the field) of each element, 0 to K - 1; called if a key is new
        embedding    (K, D): initial embedding of each kind, to which random numbers by key are added (`initial_rows`)
        first_order  (K,): initial first-order weight of each kind
        choose       says which new keys get a row; all when None
        """
        found = self.keys.insert(groups.distinct, choose)
        new = found.new
        if not len(new.keys):
            return Inserted(found.rows, new.rows, new.rows)
        self._rows.make_room(self.keys.last_row + 1)
        self._rows.touch(new.rows)  # a row that another key had may be in a freeze, as a row without a key
        if self._rows.moments is not None:
            self._rows.moments.given_away(new.rows)
        # A key that occurs as several kinds gets the lowest of them, so that all devices agree.
        kind = torch.full_like(new.rows, len(first_order))
        elements, group = groups.members(found.absent)
        kind.scatter_reduce_(0, found.which.index_select(0, group), kinds().index_select(0, elements), "amin")
        random = initial_rows(new.keys, self.dim, self._init_std, self._seed)
        weights = self._embedding.begin(embedding.index_select(0, kind) + random)
        first_orders = self._first_order.begin(first_order.index_select(0, kind).unsqueeze(1))
        for name, values in (("keys", new.keys), ("embedding", weights), ("first_order", first_orders)):
            self._rows[name].index_copy_(0, new.rows, values)
        return Inserted(found.rows, new.rows, kind)

    def find(self, keys: torch.Tensor) -> Items:
        """Those of `keys` (N,) that have rows, each once, with their rows."""
        keys = torch.unique(keys)
        rows = self.keys.lookup(keys)
        return Items(keys[rows != ABSENT_ROW], rows[rows != ABSENT_ROW])

    def evict(self, found: Items) -> None:
        """Removes keys that `find` found.

        Everything that versions hold of their rows is 0 then, so that another key can have them.
        """
        if len(found.rows):
            self._rows.touch(found.rows)
            for name, column in self._rows.columns.items():
                if column.parts:
                    self._rows[name].index_fill_(0, found.rows, EMPTY_KEY if name == "keys" else 0)
            self.keys.delete(found.keys)

    def gather(self, groups: Groups) -> Gathered:
        """The rows by which elements are grouped, with their weights, accumulators and history."""
        distinct = groups.distinct
        embedding, first_order = (self._rows[name].index_select(0, distinct) for name in ("embedding", "first_order"))
        return Gathered(groups, embedding, first_order, self._history(distinct))

    def step(self, rows: Gathered, embedding: torch.Tensor | None, first_order: torch.Tensor | None) -> None:
        """One step of the optimizers on gathered rows; gradients (U, D) and (U,), None where nothing changes.

        Call `ModelRows.touch` for the rows before.
        """
        if embedding is not None:
            self._embedding.step(rows.embedding_values, embedding)
            put_rows(self._rows["embedding"], rows.distinct, rows.embedding_values)
        if first_order is not None:
            self._first_order.step(rows.first_order_values, first_order.unsqueeze(1))
            put_rows(self._rows["first_order"], rows.distinct, rows.first_order_values)

    def serving(self, rows: torch.Tensor) -> Rows:
        """Copies of the serving weights of these rows (N,), on the table's device."""
        first_order = self._rows["first_order"]
        return Rows(
            keys=self._rows["keys"].index_select(0, rows),
            # A row's weights come first, then the state of their optimizer.
            embedding=self._rows["embedding"].view(-1, self.dim).index_select(0, rows * 2),
            first_order=first_order.view(-1).index_select(0, rows * first_order.shape[1]),
            history=self._history(rows),
        )

    def _history(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Copies of the counts (N, 2) of these rows (N,)."""
        return self._rows["history"].index_select(0, rows) if "history" in self._rows.columns else None

    def begin_fill(self, count: int, free: torch.Tensor) -> None:
        """Forgets all keys, to be filled with `count` others, whose table had these free rows (N,).

        The rows are cleared by who holds them, before.
        """
        del self.keys  # so that its memory is free before the new one takes some
        self.keys = KeyTable(self._rows.device, expected=count + len(free))
        self.keys.begin_fill(free)
        self._rows["keys"].index_fill_(0, free.to(self._rows.device, torch.int64), EMPTY_KEY)


def take(
    state: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`state[name]`, if it has this shape and dtype; -1 in `shape` means any length. Raises SnapshotMismatch."""
    wanted = "×".join("n" if size < 0 else str(size) for size in shape) or "a single number"
    expected = f"snapshot: tensor {name!r}: expected {wanted} of {dtype}"
    tensor = state.get(name)
    if tensor is None:
        raise SnapshotMismatch(f"{expected}, found no such tensor; the snapshot was made by another model")
    fits = len(tensor.shape) == len(shape) and all(want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != dtype:
        found = "×".join(map(str, tensor.shape)) or "a single number"
        raise SnapshotMismatch(
            f"{expected}, found {found} of {tensor.dtype}; use the features and model settings that the snapshot was made with"
        )
    return tensor
