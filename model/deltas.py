"""What a trainer's serving weights changed since the last delta, and their digest as of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model.digest import dense_hash, digest_sum, row_hashes
from model.frozen import ModelRows
from model.growing import Column
from model.rows import ModelDelta, RowPrecision, Rows, rounded

__all__ = ["Deltas"]

_MODULUS = 1 << 64


class Deltas:
    """Takes deltas of the serving weights, and keeps the digest that results from them (`model.digest`).

    It keeps the hash of each row as it was last taken, so that both cost what the touched rows cost, not what the table does.
    Rows are rounded as scorers have them, and hashes and digest are of the rounded rows.
    """

    COLUMNS: Mapping[str, Column] = {"hash": Column(dtype=torch.int64)}

    def __init__(self, rows: ModelRows, dense: Mapping[str, torch.Tensor], precision: RowPrecision) -> None:
        self._rows = rows
        self._precision = precision
        self._rows_sum = 0
        self._gone_sum = 0  # of the hashes, as last taken, of rows that were evicted since
        self._dense_hash = dense_hash(dense)

    @property
    def digest(self) -> int:
        """The digest of the serving weights as last taken."""
        return (self._rows_sum + self._dense_hash) % _MODULUS

    def forget_rows(self) -> None:
        """Begins anew without rows. Their hashes must be 0 already."""
        self._rows_sum = self._gone_sum = 0

    def took_dense(self, dense: Mapping[str, torch.Tensor]) -> None:
        """Counts dense parameters as taken."""
        self._dense_hash = dense_hash(dense)

    def loaded(self, numbers: slice | torch.Tensor, rows: Rows) -> None:
        """Counts restored rows (N,) with these numbers as taken; none of them was taken before."""
        hashes = row_hashes(rounded(rows, self._precision))
        self._rows["hash"][numbers] = hashes.to(self._rows.device)
        self._rows_sum += digest_sum(hashes)

    def evicted(self, numbers: torch.Tensor) -> torch.Tensor:
        """Takes note that rows (N,) lose their keys. The digest is without them once the next delta is taken.

        Returns which of them were ever taken, bool (N,).
        """
        hashes = self._rows["hash"]
        last = hashes.index_select(0, numbers)
        self._gone_sum += digest_sum(last)
        hashes.index_fill_(0, numbers, 0)
        return last != 0

    def take(
        self, numbers: torch.Tensor, rows: Rows, gone: torch.Tensor, dense: Mapping[str, torch.Tensor] | None
    ) -> ModelDelta:
        """The delta of touched rows, of keys that are gone, and of the dense parameters, if they are in it.

        numbers  int64 (N,), of the touched rows
        rows     their present weights, on the device of the table
        gone     int64 (M,), keys that have no row now
        dense    copies on the CPU of all dense parameters; None leaves them as last taken
        """
        rows = rounded(rows, self._precision)
        hashes, last = row_hashes(rows), self._rows["hash"]
        self._rows_sum += digest_sum(hashes) - digest_sum(last.index_select(0, numbers)) - self._gone_sum
        self._gone_sum = 0
        last.index_copy_(0, numbers, hashes)
        if dense is not None:
            self.took_dense(dense)
        return ModelDelta(
            rows=rows.map(torch.Tensor.cpu),
            gone=gone.cpu(),
            dense=dense,
            digest=self.digest,
        )
