"""The embedding table: rows of weights that a `KeyTable` finds by key, and Adagrad on the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.errors import SnapshotMismatch
from model.table import KeyTable

__all__ = ["EmbeddingTable", "Gathered", "initial_rows", "take", "unique_rows"]

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


def unique_rows(rows: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows (U,), in no particular order, and the inverse (N,): the index in them of each of `rows` (N,).

    scratch  int32, longer than the largest row number; its contents don't matter before and have no meaning after

    It needs no sorting: each row's cell of `scratch` gets one of the positions at which the row occurs in `rows`, and that
    position represents the row.
    """
    positions = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    scratch.scatter_(0, rows, positions)  # any one of a row's positions may win
    representative = scratch.index_select(0, rows)
    represents = representative == positions
    index = torch.cumsum(represents, 0).sub_(1)
    return rows[represents], index.index_select(0, representative)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The U distinct rows of a batch, copied out of the table.

    distinct            int64 (U,): row numbers
    inverse             int64 (N,): index in `distinct` of the row of each element of the batch
    embedding_values    float32 (U, 2D): weights, then Adagrad's accumulators
    first_order_values  float32 (U, 2): weight, then Adagrad's accumulator
    """

    distinct: torch.Tensor
    inverse: torch.Tensor
    embedding_values: torch.Tensor
    first_order_values: torch.Tensor

    @property
    def embedding(self) -> torch.Tensor:
        """Embeddings (U, D)."""
        return self.embedding_values.chunk(2, dim=1)[0].contiguous()

    @property
    def first_order(self) -> torch.Tensor:
        """First-order weights (U,)."""
        return self.first_order_values[:, 0].contiguous()


class EmbeddingTable:
    """Embeddings float32 (R, D) and first-order weights float32 (R,) by key, with Adagrad's accumulators beside them.

    A row holds D weights and their D accumulators, so that an update reads and writes one contiguous range of memory for each
    row of the batch. Row 0 is all zeros, for unknown keys. The allocated room grows by doubling; apart from that, no operation
    gets slower as the table fills.
    """

    def __init__(
        self, dim: int, *, init_std: float, accumulator_start: float, seed: int, room: int, device: torch.device
    ) -> None:
        self.dim = dim
        self._init_std = init_std
        self._accumulator_start = accumulator_start
        self._seed = seed
        self.keys = KeyTable(device, expected=room)
        self._embedding = torch.zeros((room, 2 * dim), device=device)
        self._first_order = torch.zeros((room, 2), device=device)
        self._row_keys = torch.zeros(room, dtype=torch.int64, device=device)
        self._scratch = torch.zeros(room, dtype=torch.int32, device=device)

    def __len__(self) -> int:
        return len(self.keys)

    def insert(
        self, keys: torch.Tensor, kinds: torch.Tensor, embedding: torch.Tensor, first_order: torch.Tensor
    ) -> torch.Tensor:
        """Row numbers (N,) of `keys` (N,). A new key gets a new row with initial weights.

        kinds        (N,): the kind (the field) of each key, 0 to K - 1
        embedding    (K, D): initial embedding of each kind, to which random numbers by key are added (`initial_rows`)
        first_order  (K,): initial first-order weight of each kind
        """
        before = len(self.keys)
        rows = self.keys.insert(keys)
        after = len(self.keys)
        if after > before:
            self._make_room(after + 1)
            new = rows > before
            self._row_keys[rows[new]] = keys[new]
            fresh = slice(before + 1, after + 1)
            # A key that occurs as several kinds gets the lowest of them, so that all devices agree.
            kind = torch.full((after - before,), len(first_order), device=keys.device)
            kind.scatter_reduce_(0, rows[new] - (before + 1), kinds[new], "amin")
            random = initial_rows(self._row_keys[fresh], self.dim, self._init_std, self._seed)
            self._embedding[fresh, : self.dim] = embedding.index_select(0, kind) + random
            self._embedding[fresh, self.dim :] = self._accumulator_start
            self._first_order[fresh, 0] = first_order.index_select(0, kind)
            self._first_order[fresh, 1] = self._accumulator_start
        return rows

    def gather(self, rows: torch.Tensor) -> Gathered:
        """The distinct rows among `rows` (N,), with their weights and accumulators."""
        distinct, inverse = unique_rows(rows, self._scratch)
        values = self._embedding.index_select(0, distinct), self._first_order.index_select(0, distinct)
        return Gathered(distinct, inverse, *values)

    def step(self, rows: Gathered, embedding: torch.Tensor, first_order: torch.Tensor, rate: float) -> None:
        """One step of Adagrad (Duchi et al., JMLR 2011) with learning rate `rate` on gathered rows; gradients (U, D) and (U,).

        It needs no epsilon, since the accumulators start above zero.
        """
        parts = (
            (self._embedding, rows.embedding_values, embedding),
            (self._first_order, rows.first_order_values, first_order.unsqueeze(1)),
        )
        for table, values, gradient in parts:
            weights, sums = values.chunk(2, dim=1)
            sums.addcmul_(gradient, gradient)
            weights.addcdiv_(gradient, sums.contiguous().sqrt(), value=-rate)  # sqrt of strided memory is slow
            table.index_copy_(0, rows.distinct, values)

    def serving_state(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU, without row 0: `keys` (R,), `embedding` (R, D), `first_order` (R,)."""
        used = slice(1, len(self) + 1)
        return {
            "keys": self._row_keys[used].to("cpu", copy=True),
            "embedding": _copy(self._embedding[used, : self.dim]),
            "first_order": _copy(self._first_order[used, 0]),
        }

    def trainer_state(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of Adagrad's accumulators, row by row as in `serving_state`."""
        used = slice(1, len(self) + 1)
        return {
            "adagrad.embedding": _copy(self._embedding[used, self.dim :]),
            "adagrad.first_order": _copy(self._first_order[used, 1]),
        }

    def restore(self, serving: dict[str, torch.Tensor], trainer: dict[str, torch.Tensor]) -> None:
        """Replaces all rows by saved ones. Raises SnapshotMismatch before anything is written."""
        count = len(take(serving, "keys", (-1,), torch.int64))
        device = self._embedding.device
        embedding = take(serving, "embedding", (count, self.dim)), take(trainer, "adagrad.embedding", (count, self.dim))
        first_order = take(serving, "first_order", (count,)), take(trainer, "adagrad.first_order", (count,))
        self.keys = KeyTable(device, expected=count)
        self.keys.load(serving["keys"])
        self._make_room(count + 1)
        used = slice(1, count + 1)
        self._row_keys[used] = serving["keys"].to(device)
        self._embedding[used] = torch.cat(embedding, dim=1).to(device)
        self._first_order[used] = torch.stack(first_order, dim=1).to(device)

    def _make_room(self, rows: int) -> None:
        """Grows, by doubling, until there are at least `rows` rows."""
        room = len(self._embedding)
        if rows <= room:
            return
        while room < rows:
            room *= 2
        for name in ("_embedding", "_first_order", "_row_keys", "_scratch"):
            old = getattr(self, name)
            new = torch.zeros((room, *old.shape[1:]), dtype=old.dtype, device=old.device)
            new[: len(old)] = old
            setattr(self, name, new)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def take(state: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
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
