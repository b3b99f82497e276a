"""What a learner keeps between two batches, and how it leaves: as deltas, as versions, and back again after a restart."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model.anchor import EarlierModel
from model.census import TableStats
from model.deferred import Deferred
from model.deltas import Deltas
from model.embedding import EmbeddingTable, take
from model.errors import ModelError, SnapshotMismatch
from model.frozen import FrozenModel, ModelRows
from model.hashing import EMPTY_KEY
from model.history import RowHistory, take_base
from model.intercept import Intercept
from model.key_set import KeySet
from model.moments import Moment, Moments
from model.network import choose_device, dense_model
from model.row_optimizers import Adagrad, Ftrl, RowOptimizer
from model.rows import ROW_PARTS, ModelDelta, RowPrecision, Rows, serving_columns
from model.schema import FeatureSchema
from model.settings import ModelSettings
from model.table import ABSENT_ROW
from model.table_settings import TableSettings
from model.typical import Typical
from model.upkeep import Upkeep

__all__ = ["LearnerState"]

FREE = "table.free"
"""Name in versions of the rows whose keys were evicted, in the order in which new keys get them."""

# Rows that a restore from memory copies at once: enough that the fixed cost of a copy is nothing, and small beside the table.
_RESTORED_AT_ONCE = 1 << 17


class LearnerState:
    """The weights, the optimizers' state and the rest that `model.learner.Learner` updates.

    `row_precision` is how scorers have the rows: deltas and the digest are of rows that are rounded so. Training goes on with
    all their digits, and versions hold these.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        settings: ModelSettings,
        *,
        table: TableSettings | None = None,
        device: str = "auto",
        row_precision: RowPrecision = "float32",
    ) -> None:
        self.schema = schema
        table = table or TableSettings()
        self.row_precision = row_precision
        self.settings = settings
        self.device = choose_device(device)
        self.examples_seen = 0
        self.negative_rate = 1.0
        self._dense = dense_model(schema, settings, self.device)
        self._dense.initialise(settings.seed)
        adagrad = Adagrad(settings.row_learning_rate, settings.row_accumulator_start)
        first_order: RowOptimizer = adagrad
        if settings.first_order == "ftrl":
            first_order = Ftrl(settings.ftrl_alpha, settings.ftrl_beta, settings.ftrl_l1, settings.ftrl_l2)
        dim, counts = schema.embedding_dim, settings.row_history
        columns = {
            **EmbeddingTable.columns(dim, first_order, history=counts),
            **Deferred.COLUMNS,
            **Upkeep.columns(table),
            **Deltas.COLUMNS,
        }
        self._rows = ModelRows(columns, settings.initial_rows, self.device)
        self._table = EmbeddingTable(
            dim,
            self._rows,
            init_std=settings.init_std,
            embedding=adagrad,
            first_order=first_order,
            seed=settings.seed,
            expected=settings.initial_rows,
        )
        values = serving_columns(dim, history=counts)
        self._moments = self._rows.moments = Moments(self._table.serving, values, self.device)
        self._history = RowHistory(self._rows) if counts else None
        self._typical = Typical(schema, self.device)
        self._upkeep = Upkeep(schema, table, self._rows, self._table)
        self._deferred = Deferred(self._rows)
        self._intercept = Intercept()
        self._adam = self._dense.optimizer(settings)
        self._deltas = Deltas(self._rows, self._dense_serving(), row_precision)
        self._without_row = KeySet(self.device)  # those that had no row when `expect` or `evict` was called
        self._restoring: int | None = None  # the number of rows that a restore under way will have
        self._free = torch.empty(0, dtype=torch.int64)  # the free rows that it will have

    @property
    def rows(self) -> int:
        """Number of embedding rows."""
        return len(self._table)

    @property
    def table(self) -> TableStats:
        """Rows, memory, and counts by field. For any thread."""
        keys = self._table.keys
        return TableStats(len(keys), self._rows.used_bytes(keys.last_row) + keys.size, self._upkeep.census.fields())

    @property
    def table_is_growing(self) -> bool:
        """Whether the index of keys is being replaced by a larger one, step by step."""
        return self._table.keys.is_growing

    @property
    def touched(self) -> int:
        """Number of rows that the next delta has, at most."""
        return len(self._rows.touched) + len(self._without_row)

    def touched_keys(self) -> torch.Tensor:
        """Keys of these rows on the CPU, int64 (N,), each once. The next delta has them all the same."""
        keys = self._table.keys.keys_of(self._rows.touched.listed())
        return torch.cat((keys[keys != EMPTY_KEY], self._gone())).cpu()

    def expect(self, keys: torch.Tensor) -> None:
        """Have the rows of `keys` (N,) in the next delta, touched or not.

        A key that has no row when the delta is taken is among those that are gone. A trainer that goes on from an older version
        needs this for the rows that deltas have changed since.
        """
        keys = keys.to(self.device)
        rows = self._table.keys.lookup(keys)
        self._rows.touched.add(rows[rows != ABSENT_ROW])
        self._without_row.add(keys[rows == ABSENT_ROW])

    def evict(self, keys: torch.Tensor) -> int:
        """Forgets the rows of `keys` (N,), and returns how many of them had one. The next delta says that they are gone.

        Call it between batches. A key that comes back later begins anew, as a key that was never there. If it comes back before
        the next delta is taken, its new row is in that delta.
        """
        self._require_restored()
        found = self._table.find(keys.to(self.device))
        self._upkeep.evicted(found.rows)
        self._table.evict(found)
        # Scorers know nothing of the others, and while deltas are withheld there may be many of them.
        self._without_row.add(found.keys[self._deltas.evicted(found.rows)])
        return len(found.keys)

    @property
    def digest(self) -> int:
        """The digest of the serving weights (`model.digest`) as of the last delta, or as of the start or restore before it."""
        return self._deltas.digest

    def take_delta(self, *, dense: bool = True) -> ModelDelta:
        """What changed in the serving weights since the last delta, or since the start or restore before it.

        Call it between batches. What it costs grows with the number of touched rows, and not with the table. Without `dense`,
        the delta leaves the dense part as last taken, and its digest is that of the present rows with that dense part.
        """
        self._require_restored()
        touched = self._rows.touched.take()
        if self._table.has_free_rows:
            touched = touched[self._table.keys.keys_of(touched) != EMPTY_KEY]
        gone = self._gone()
        self._without_row.clear()
        return self._deltas.take(touched, self._table.serving(touched), gone, self._dense_serving() if dense else None)

    def _gone(self) -> torch.Tensor:
        """Keys (N,) without a row that the next delta names."""
        keys = self._without_row.distinct()
        return keys[self._table.keys.lookup(keys) == ABSENT_ROW] if len(keys) else keys

    def freeze(self) -> FrozenModel:
        """The model as it is now, to be written in another thread while training goes on.

        Call it between batches. It costs the same whatever the table holds. Take a delta with its dense part right before, and
        `digest` is the digest of what is frozen.

        Raises:
            ModelError: the last one isn't closed yet.
        """
        self._require_restored()
        freeze = self._rows.freeze(self._table.keys.last_row)
        return FrozenModel(freeze, len(self._table), self._dense_serving(), self._small())

    def keep(self) -> EarlierModel:
        """The model as it is now, to score with while training goes on. Its rows aren't copied until they change.

        Call it between batches, in the training thread, as all methods of what it returns.
        """
        self._require_restored()
        moment = self._moments.add(self._table.keys.last_row)
        return self._earlier_model(moment, self._dense_serving(), self.negative_rate)

    def model_of(self, rows: int, dense: Mapping[str, torch.Tensor], negative_rate: float) -> EarlierModel:
        """An earlier version of this model, to score with. Its rows come in pieces by `EarlierModel.restore`.

            earlier = learner.model_of(reader.row_count, reader.dense(), manifest.negative_rate)
            for rows in reader.rows():
                earlier.restore(rows)  # in the training thread; only what differs takes memory

        Raises:
            SnapshotMismatch: the version is of another model, or of a later moment than now.
        """
        self._require_restored()
        if rows > len(self._table):
            raise SnapshotMismatch(
                f"version of {rows} rows: expected at most {len(self._table)}, as the model has now, found more. It isn't from "
                "this model's past"
            )
        return self._earlier_model(self._moments.add_oldest(rows), dense, negative_rate)

    def _earlier_model(self, moment: Moment, dense: Mapping[str, torch.Tensor], negative_rate: float) -> EarlierModel:
        model = dense_model(self.schema, self.settings, self.device)
        typical = Typical(self.schema, self.device)
        try:
            model.restore(dense)
            typical.restore(dense)
            base = take_base(dense).to(self.device) if self.settings.row_history else None
        except SnapshotMismatch:
            moment.close()
            raise
        return EarlierModel(self.schema, self._table, moment, self._rows, model, typical, base, negative_rate)

    def serving_state(self) -> dict[str, torch.Tensor]:
        """What scoring needs, copied to the CPU: the parts of `Rows`, and all serving tensors that are no rows."""
        return {**{name: self._part(name) for name in self._rows.parts if name in ROW_PARTS}, **self._dense_serving()}

    def trainer_state(self) -> dict[str, torch.Tensor]:
        """What further learning needs besides, copied to the CPU: states of the optimizers and of `Deferred`, examples seen."""
        return {**{name: self._part(name) for name in self._rows.parts if name not in ROW_PARTS}, **self._small()}

    def restore(self, serving: dict[str, torch.Tensor], trainer: dict[str, torch.Tensor]) -> None:
        """Continues from a snapshot that is in memory whole.

        Raises:
            SnapshotMismatch: it is of another model or schema.
            ModelError: a freeze is open.
        """
        count = len(take(serving, "keys", (-1,), torch.int64))
        parts = self._fitting({**trainer, **serving}, count)
        self._rows.require_no_freeze()
        self._restore_small(serving, trainer)
        self.begin_restore(count, trainer)
        for first in range(0, count, _RESTORED_AT_ONCE):
            self._add_rows({name: value[first : first + _RESTORED_AT_ONCE] for name, value in parts.items()})
        self._end_restore(trainer)

    def begin_restore(self, rows: int, small: Mapping[str, torch.Tensor] | None = None) -> None:
        """Begins to continue from a snapshot of this many rows, which comes in pieces: they need no second copy of it.

            learner.begin_restore(rows, small)
            for piece in pieces:
                learner.restore_rows(piece.serving, piece.trainer)
            learner.finish_restore(dense, small)

        The learner forgets all rows now. Until `finish_restore` it can do nothing else; after a failure begin again.

        small  tensors of the trainer's state that are no rows; not needed for a snapshot without evicted rows

        Raises:
            ModelError: a freeze is open.
            SnapshotMismatch: the snapshot's list of free rows is damaged.
        """
        free = _free_rows(small or {}, rows)
        self._rows.clear(rows + len(free) + 1)
        self._table.begin_fill(rows, free)
        self._free = free
        self._deltas.forget_rows()
        self._without_row.clear()
        self._restoring = rows

    def restore_rows(self, serving: Rows, trainer: Mapping[str, torch.Tensor]) -> None:
        """Adds the next rows (N,) of the snapshot, with the parts of the trainer's state that belong to them.

        Raises:
            SnapshotMismatch: they are of another model, or more than `begin_restore` was given.
            ModelError: no restore has begun.
        """
        parts = self._fitting({**serving.parts(), **trainer}, len(serving))
        self._require_rows(len(self._table) + len(serving), at_most=True)
        self._add_rows(parts)

    def finish_restore(self, dense: Mapping[str, torch.Tensor], small: Mapping[str, torch.Tensor]) -> None:
        """Ends a restore with the tensors that are no rows, of the serving weights and of the trainer's state.

        Raises:
            SnapshotMismatch: they are of another model, or rows are missing.
            ModelError: no restore has begun.
        """
        self._require_rows(len(self._table))
        if not torch.equal(_free_rows(small, len(self._table)), self._free):
            raise SnapshotMismatch(
                f"snapshot: expected {len(self._free)} free rows, as begin_restore was given, found others; call it again with "
                "the tensors of the trainer's state"
            )
        self._restore_small(dense, small)
        self._end_restore(small)

    def _dense_serving(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of the serving tensors that are no rows."""
        base = {} if self._history is None else self._history.serving_state()
        return {**self._dense.serving_state(), **self._typical.serving_state(), **base}

    def _small(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of the trainer's tensors that are no rows."""
        return {
            **{f"adam.{name}": value.to("cpu", copy=True) for name, value in self._adam.state().items()},
            **{f"intercept.{name}": value for name, value in self._intercept.state().items()},
            **{f"deferred.{name}": value for name, value in self._deferred.state().items()},
            **{f"upkeep.{name}": value for name, value in self._upkeep.state().items()},
            **({FREE: self._table.keys.free.to("cpu", torch.int32)} if self._table.has_free_rows else {}),
            "examples_seen": torch.tensor(self.examples_seen),
        }

    def _part(self, name: str) -> torch.Tensor:
        """A copy on the CPU of a part of all rows with keys."""
        used = self._rows.part(name)[1 : self._table.keys.last_row + 1]
        if self._table.has_free_rows:
            used = used.index_select(0, self._table.keys.items().rows - 1)
        return used.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def _fitting(self, state: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The parts of `count` rows in `state`, by name. Raises SnapshotMismatch if they don't fit this model."""
        parts = {name: self._rows.part(name) for name in self._rows.parts if name in state or not self._rows.optional(name)}
        return {name: take(state, name, (count, *part.shape[1:]), part.dtype) for name, part in parts.items()}

    def _add_rows(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Adds restored rows (N,) after those that are there."""
        rows = self._table.keys.load(parts["keys"])
        if not len(rows):
            return
        first, last = int(rows[0]), int(rows[-1])
        where = slice(first, last + 1) if last - first + 1 == len(rows) else rows
        for name, value in parts.items():
            self._rows.part(name)[where] = value.to(self.device)
        self._deltas.loaded(where, Rows.of(parts))

    def _restore_small(self, serving: Mapping[str, torch.Tensor], trainer: Mapping[str, torch.Tensor]) -> None:
        """Restores the tensors that are no rows."""
        seen = take(trainer, "examples_seen", (), torch.int64)
        step = trainer.get("adam.step")
        if step is not None and step.dtype == torch.float32:  # snapshots of Headrace 0.1.0
            trainer = {**trainer, "adam.step": step.long()}
        moments = {
            name: take(trainer, f"adam.{name}", tuple(value.shape), value.dtype) for name, value in self._adam.state().items()
        }
        base = None if self._history is None else take_base(serving)
        self._dense.restore(serving)
        self._typical.restore(serving)
        self._deferred.restore(_under("deferred.", trainer))
        self._intercept.restore(_under("intercept.", trainer))
        self._adam.restore(moments)
        if self._history is not None and base is not None:
            self._history.base.copy_(base)
        self.examples_seen = int(seen)

    def _end_restore(self, trainer: Mapping[str, torch.Tensor]) -> None:
        self._table.keys.end_fill(self._free)
        self._upkeep.restore(_under("upkeep.", trainer))
        self._deltas.took_dense(self._dense_serving())
        self._restoring = None

    def _require_restored(self) -> None:
        if self._restoring is not None:
            raise ModelError(
                f"learner: expected a whole model, found a restore under way with {len(self._table)} of {self._restoring} "
                "rows; call finish_restore first, or begin_restore again if it failed"
            )

    def _require_rows(self, rows: int, *, at_most: bool = False) -> None:
        """Requires that a restore is under way whose number of rows is `rows`, or is at least that."""
        if self._restoring is None:
            raise ModelError("restore: expected a call of begin_restore first, found none")
        if rows > self._restoring or (rows < self._restoring and not at_most):
            found = f"at least {rows}" if at_most else f"{rows}"
            raise SnapshotMismatch(
                f"snapshot: expected {self._restoring} rows, as begin_restore was given, found {found}; pieces of it are "
                "missing or come twice"
            )


def _free_rows(small: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
    """The free rows (N,) int64 of a snapshot of so many rows. Raises SnapshotMismatch if they can't be those."""
    if FREE not in small:
        return torch.empty(0, dtype=torch.int64)
    free = take(small, FREE, (-1,), torch.int32).long()
    ascending = free.sort().values
    if len(free) and (ascending[0] < 1 or ascending[-1] > rows + len(free) or (ascending[1:] == ascending[:-1]).any()):
        raise SnapshotMismatch(
            f"snapshot: tensor {FREE!r}: expected different rows from 1 to {rows + len(free)}, found others; it is damaged"
        )
    return free


def _under(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
