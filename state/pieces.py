"""The files of a version: rows in pieces of bounded size, and the tensors that are no rows.

| file | tensors |
| --- | --- |
| `dense.safetensors` | serving tensors that are no rows |
| `serving-00000.safetensors`, … | `keys`, `embedding` and `first_order` of some rows; `history` in a model with row history |
| `trainer-00000.safetensors`, … | what the trainer keeps for the same rows |
| `trainer.safetensors` | trainer tensors that are no rows |

Format 1, of Headrace 0.1.0, has all serving tensors in `serving.safetensors` and all trainer tensors in `trainer.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from model.rows import Rows

__all__ = [
    "FORMAT",
    "OPTIONAL_ROW_TENSORS",
    "ROW_TENSORS",
    "TRAINER_ROW_TENSORS",
    "Piece",
    "RowsWithState",
    "bounded",
    "piece_count",
    "piece_kind",
    "piece_rows",
    "serving_piece",
    "trainer_piece",
]

FORMAT = 2

ROW_TENSORS = ("keys", "embedding", "first_order")
"""Names of the serving tensors that have a row for each key, in every version."""

OPTIONAL_ROW_TENSORS = ("history",)
"""Names of those that only versions of some models have."""

TRAINER_ROW_TENSORS = (
    *("adagrad.embedding", "adagrad.first_order", "deferred.owed", "deferred.since_ms"),
    *("table.seen", "table.uses", "table.field"),
)
"""Names of the trainer tensors that have a row for each key. Those of `table` are there only where rows are evicted."""

# Most bytes of a piece's data. Writer and reader hold a few pieces in memory, so they should be small beside a table; but each
# costs a flush of the disk or a request, some 5 to 50 ms, so they shouldn't be tiny. 20 MB take 20 ms to hash. A table of 10
# million rows of 16 weights has 48 pieces of each kind; S3's limit on one PUT, 5 GB, is far away.
PIECE_BYTES = 20_000_000

_PIECE = re.compile(r"(serving|trainer)-(\d{5,})\.safetensors")


class RowsWithState(Protocol):
    """Some rows of a model: serving weights, and by name what the trainer keeps for the same rows."""

    @property
    def serving(self) -> Rows: ...

    @property
    def trainer(self) -> Mapping[str, torch.Tensor]: ...


class Piece(NamedTuple):
    """N rows of a version: serving weights, and by name what the trainer keeps for the same rows, each (N, …)."""

    serving: Rows
    trainer: dict[str, torch.Tensor]


def piece_rows(dim: int) -> int:
    """Rows of `dim` weights that fit into a piece, with all that the trainer keeps for them."""
    return max(1, PIECE_BYTES // (4 * dim + 32))


def bounded(pieces: Iterable[RowsWithState]) -> Iterator[Piece]:
    """Pieces of at most `PIECE_BYTES`: larger ones are cut, others stay as they are. The cuts share the tensors' memory."""
    for piece in pieces:
        rows, state = piece.serving, piece.trainer
        most = piece_rows(rows.embedding.shape[1])
        for start in range(0, len(rows) or 1, most):
            part = slice(start, start + most)
            yield Piece(rows.map(itemgetter(part)), {name: tensor[part] for name, tensor in state.items()})


def serving_piece(index: int) -> str:
    """The file of a piece's serving weights."""
    return f"serving-{index:05d}.safetensors"


def trainer_piece(index: int) -> str:
    """The file of what the trainer keeps for the rows of a piece."""
    return f"trainer-{index:05d}.safetensors"


def piece_kind(name: str) -> str | None:
    """`serving` or `trainer` for the file of a piece, None for another file."""
    match = _PIECE.fullmatch(name)
    return None if match is None else match[1]


def piece_count(names: Iterable[str], kind: str) -> int | None:
    """How many pieces of a kind, `serving` or `trainer`, are among the files; None if one of them is missing in between."""
    found = (_PIECE.fullmatch(name) for name in names)
    indices = {int(match[2]) for match in found if match and match[1] == kind}
    return len(indices) if indices == set(range(len(indices))) else None
