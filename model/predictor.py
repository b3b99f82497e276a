"""The predictor: read-only weights of one snapshot, for scoring."""

from __future__ import annotations

import torch

from model.batch import FeatureBatch, Float32Array
from model.embedding import take
from model.network import choose_device, dense_model, embed, to_elements
from model.sampling import probabilities
from model.schema import FeatureSchema
from model.settings import ModelSettings
from model.table import KeyTable
from model.typical import Typical

__all__ = ["Predictor"]


class Predictor:
    """Scores batches with the serving weights of one snapshot. It is immutable, so several threads can use it at once.

        predictor = Predictor(schema, settings, store.serving(version))
        scores = predictor.predict(batch)

    `negative_rate` is the share of negatives that the weights were learned from; scores are corrected by it (`model.sampling`).
    Raises SnapshotMismatch if the weights are of another model or schema.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        settings: ModelSettings,
        serving: dict[str, torch.Tensor],
        *,
        device: str = "auto",
        negative_rate: float = 1.0,
    ) -> None:
        self.schema = schema
        self.negative_rate = negative_rate
        self.device = choose_device(device)
        self._dense = dense_model(schema, settings, self.device)
        self._dense.restore(serving)
        keys = take(serving, "keys", (-1,), torch.int64)
        embedding = take(serving, "embedding", (len(keys), schema.embedding_dim))
        first_order = take(serving, "first_order", (len(keys),))
        self._keys = KeyTable(self.device, expected=len(keys))
        self._keys.load(keys)
        typical = Typical(schema, torch.device("cpu"))
        typical.restore(serving)
        # Row 0 is unused, rows of keys begin at 1, and after them comes the average row of each field, for unknown values.
        self._unknown = len(keys) + 1
        self._embedding = torch.cat((torch.zeros(1, schema.embedding_dim), embedding, typical.embedding)).to(self.device)
        self._first_order = torch.cat((torch.zeros(1), first_order, typical.first_order)).to(self.device)

    @torch.inference_mode()
    def predict(self, batch: FeatureBatch) -> Float32Array:
        """Click probabilities float32 (B,)."""
        elements = to_elements(batch, self.schema, self.device)
        rows = self._keys.lookup(elements.keys)
        rows = torch.where(rows == 0, self._unknown + elements.fields(), rows)
        forward = self._dense.forward(*embed(elements, rows, self._embedding, self._first_order))
        return probabilities(forward.logits, self.negative_rate).cpu().numpy()
