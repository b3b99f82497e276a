"""The embedding table: rows of weights behind a `KeyTable`, and Adagrad on the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.errors import SnapshotMismatch
from model.table import KeyTable

__all__ = ["EmbeddingTable", "Gathered", "initial_rows", "take", "unique_rows"]

_LANE = (1 << 16) - 1
_LANES_MEAN = 4 * _LANE / 2
_LANES_STD = (4 * ((1 << 32) - 1) / 12) ** 0.5  # of the sum of four uniform 16-bit integers


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, in place; the masks make the shifts logical."""
    x.bitwise_xor_((x >> 30) & ((1 << 34) - 1)).mul_(-4658895280553007687)
    x.bitwise_xor_((x >> 27) & ((1 << 37) - 1)).mul_(-7723592293110705685)
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))


def initial_rows(keys: torch.Tensor, dim: int, std: float, seed: int) -> torch.Tensor:
    """First embeddings float32 (N, D) of `keys` (N,): a function of key, column and seed alone, so that neither the
    order of arrival nor the device matters.

    The sum of four 16-bit lanes of a hash, scaled: near enough to a normal distribution, and exact in integers, where
    the logarithm and cosine of the usual way differ in the last bit between devices.
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
    """Distinct rows (U,), in no particular order, and for each of `rows` (N,) its place among them (N,).

    scratch  int32, longer than the largest row; what it holds doesn't matter, before or after

    Without sorting: each row's cell is told a position where the row occurs, and that position speaks for the row.
    """
    positions = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    scratch.scatter_(0, rows, positions)  # of a row's positions any one wins
    speaker = scratch.index_select(0, rows)
    speaks = speaker == positions
    place = torch.cumsum(speaks, 0).sub_(1)
    return rows[speaks], place.index_select(0, speaker)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The U distinct rows of a batch, copied out of the table.

    distinct                         int64 (U,)
    place                            int64 (N,): which of them each element of the batch is
    embedding_values                 float32 (U, 2D): weights, then Adagrad's accumulators
    first_order_values               float32 (U, 2): likewise
    """

    distinct: torch.Tensor
    place: torch.Tensor
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

    A row holds D weights and their D accumulators, so that a step reads and writes one stretch of memory for each of
    the batch's rows. Row 0 is all zeros: it is what an unknown key reads. Room grows by doubling; nothing else costs
    more as it fills.
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
        """Rows (N,) of `keys` (N,); new keys get a new row with its first weights.

        kinds                   (N,) which of the K kinds of rows each key is
        embedding, first_order  (K, D) and (K,): where rows of a kind begin, give or take what is random of the key
        """
        before = len(self.keys)
        rows = self.keys.insert(keys)
        after = len(self.keys)
        if after > before:
            self._make_room(after + 1)
            new = rows > before
            self._row_keys[rows[new]] = keys[new]
            fresh = slice(before + 1, after + 1)
            # A key that came as several kinds is of the first of them, on every device.
            kind = torch.full((after - before,), len(first_order), device=keys.device)
            kind.scatter_reduce_(0, rows[new] - (before + 1), kinds[new], "amin")
            random = initial_rows(self._row_keys[fresh], self.dim, self._init_std, self._seed)
            self._embedding[fresh, : self.dim] = embedding.index_select(0, kind) + random
            self._embedding[fresh, self.dim :] = self._accumulator_start
            self._first_order[fresh, 0] = first_order.index_select(0, kind)
            self._first_order[fresh, 1] = self._accumulator_start
        return rows

    def gather(self, rows: torch.Tensor) -> Gathered:
        """The distinct ones of `rows` (N,), with their weights."""
        distinct, place = unique_rows(rows, self._scratch)
        return Gathered(distinct, place, self._embedding.index_select(0, distinct), self._first_order.index_select(0, distinct))

    def step(self, rows: Gathered, embedding: torch.Tensor, first_order: torch.Tensor, rate: float) -> None:
        """Adagrad (Duchi et al., JMLR 2011) on gathered rows, with gradients (U, D) and (U,).

        No epsilon: the accumulators start above zero.
        """
        parts = (
            (self._embedding, rows.embedding_values, embedding),
            (self._first_order, rows.first_order_values, first_order.unsqueeze(1)),
        )
        for table, values, gradient in parts:
            weights, sums = values.chunk(2, dim=1)
            sums.addcmul_(gradient, gradient)
            weights.addcdiv_(gradient, sums.contiguous().sqrt(), value=-rate)  # a root of strided memory is slow
            table.index_copy_(0, rows.distinct, values)

    def serving_state(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU: `keys` (R,), `embedding` (R, D), `first_order` (R,), without row 0."""
        used = slice(1, len(self) + 1)
        return {
            "keys": self._row_keys[used].to("cpu", copy=True),
            "embedding": _copy(self._embedding[used, : self.dim]),
            "first_order": _copy(self._first_order[used, 0]),
        }

    def trainer_state(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of Adagrad's accumulators, in the order of `serving_state`'s keys."""
        used = slice(1, len(self) + 1)
        return {
            "adagrad.embedding": _copy(self._embedding[used, self.dim :]),
            "adagrad.first_order": _copy(self._first_order[used, 1]),
        }

    def restore(self, serving: dict[str, torch.Tensor], trainer: dict[str, torch.Tensor]) -> None:
        """Takes over saved rows. Raises SnapshotMismatch, before anything is written."""
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
    """`state[name]`, checked: -1 in `shape` is any length. Raises SnapshotMismatch."""
    wanted = "×".join("n" if size < 0 else str(size) for size in shape) or "a single number"
    expected = f"snapshot: tensor {name!r}: expected {wanted} of {dtype}"
    tensor = state.get(name)
    if tensor is None:
        raise SnapshotMismatch(f"{expected}, found no such tensor; the snapshot was made by another model")
    fits = len(tensor.shape) == len(shape) and all(want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != dtype:
        found = "×".join(map(str, tensor.shape)) or "a single number"
        raise SnapshotMismatch(
            f"{expected}, found {found} of {tensor.dtype}; use the features and model settings it was made with"
        )
    return tensor
