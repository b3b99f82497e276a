"""Scores by a model as it was at an earlier moment, without a second table: saved rows over the live ones (`model.moments`)."""

from __future__ import annotations

import torch

from model.batch import FeatureBatch, Float32Array
from model.dense.dense_model import DenseModel
from model.distinct import group
from model.embedding import EmbeddingTable
from model.errors import SnapshotMismatch
from model.frozen import ModelRows
from model.history import history_inputs
from model.moments import Moment
from model.network import embed, to_elements
from model.rows import Rows
from model.sampling import probabilities
from model.schema import FeatureSchema
from model.typical import Typical

__all__ = ["EarlierModel"]


class EarlierModel:
    """A model as it was at one moment.

    It scores as a `model.predictor.Predictor` of that moment's serving weights would, bit for bit on the CPU.

        earlier = learner.keep()            # in the training thread, between two batches, as everything below
        ...                                 # training goes on
        earlier.predict(batch)
        earlier.close()

    A key without a row at that moment reads the average row of its field as of that moment.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        table: EmbeddingTable,
        moment: Moment,
        columns: ModelRows,
        dense: DenseModel,
        typical: Typical,
        base: torch.Tensor | None,
        negative_rate: float,
    ) -> None:
        self._schema, self._table, self._moment, self._columns = schema, table, moment, columns
        self._dense, self._typical, self._base, self._negative_rate = dense, typical, base, negative_rate
        self._restored = 0

    @property
    def rows(self) -> int:
        """Number of rows at that moment."""
        return self._moment.count

    @property
    def saved(self) -> int:
        """Number of rows whose values are held for it, since they have changed until the next moment."""
        return self._moment.saved

    @property
    def is_open(self) -> bool:
        """Whether it can score."""
        return self._moment.is_open

    @torch.no_grad()
    def predict(self, batch: FeatureBatch) -> Float32Array:
        """Click probabilities float32 (B,). Raises ModelError once it is closed."""
        elements = to_elements(batch, self._schema, self._table.keys.device)
        numbers = self._moment.known(self._table.keys.lookup(elements.keys))
        groups = group(numbers)
        distinct = groups.distinct
        rows = self._moment.read(distinct)
        where = torch.where(numbers == 0, len(distinct) + elements.fields(), groups.inverse)
        embedding = torch.cat((rows.embedding, self._typical.embedding))
        first_order = torch.cat((rows.first_order, self._typical.first_order))
        extra = None
        if self._base is not None and rows.history is not None:
            counts = torch.cat((rows.history, rows.history.new_zeros(len(first_order) - len(distinct), 2)))
            extra = history_inputs(elements, counts.index_select(0, where), self._base)
        logits = self._dense.forward(*embed(elements, where, embedding, first_order), extra).logits
        return probabilities(logits, self._negative_rate).cpu().numpy()

    def restore(self, rows: Rows) -> None:
        """The next rows of the version that it was made of (`Learner.model_of`), in the version's order.

        Raises:
            SnapshotMismatch: the version isn't from this model's past. It is closed then.
        """
        first = self._restored + 1
        self._restored += len(rows)
        keys = rows.keys.to(self._table.keys.device)
        if self._restored > self._moment.count or not torch.equal(
            self._table.keys.keys_of(slice(first, first + len(keys))), keys
        ):
            self.close()
            raise SnapshotMismatch(
                f"rows {first} to {self._restored} of a version: expected the keys of the model's own rows, found others. The "
                "version isn't from this model's past, or rows were evicted since"
            )
        self._moment.correct(first, rows.map(lambda part: part.to(keys.device)))

    def close(self) -> None:
        """Ends it, and frees the memory of saved rows; further calls do nothing."""
        self._moment.close()
