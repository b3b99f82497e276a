"""The learner: incremental updates of the model, one batch at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from model.adam import Adam
from model.batch import FeatureBatch, Float32Array
from model.deferred import Deferred
from model.embedding import EmbeddingTable, take
from model.errors import ModelError, UpdateNotFinite
from model.intercept import Intercept
from model.network import choose_device, dense_model, embed, scatter_back, to_elements
from model.sampling import probabilities
from model.schema import FeatureSchema
from model.settings import ModelSettings
from model.slopes import slopes
from model.typical import Typical

__all__ = ["Learner"]


# Norms that are not below this are rejected. Optimizers sum squares of gradients in float32, whose largest number is 3e38, so
# they stay finite for a million gradients of this norm. The largest weight and the smallest sampling rate that the trainer
# accepts give gradients far below it (`stream.trainer.examples`).
_LARGEST_NORM = 1e16


class Learner:
    """Learns click probabilities from labelled batches; each batch is scored before it is learned.

        learner = Learner(schema, settings)
        scores = learner.learn(batch, labels)   # as the model was before it learned these labels
        snapshot = learner.serving_state(), learner.trainer_state()

    Updates:

    - embedding rows, by Adagrad with the gradient of the loss summed over the batch; only rows of the batch change;
    - the MLP, by Adam with the gradient of the mean loss;
    - the bias, by Newton's method (`model.intercept`).

    On the CPU it is deterministic: a restored learner continues bit for bit as if it had never stopped. It draws no random
    numbers after the start: a new row depends on its key, the seed and the average row of its field (`model.typical`).

    `negative_rate` is the share of negatives that the stream keeps. Scores that the learner returns are probabilities on the
    whole stream, corrected by this rate (`model.sampling`).

    Use it from one thread. It raises ModelError for labels, weights or batches that it can't use, before anything changes. It
    raises UpdateNotFinite for a batch whose update wouldn't be finite, before any weight or optimizer state changes; features
    that are new in such a batch keep their new rows.
    """

    def __init__(self, schema: FeatureSchema, settings: ModelSettings, *, device: str = "auto") -> None:
        self.schema = schema
        self.settings = settings
        self.device = choose_device(device)
        self.examples_seen = 0
        self.negative_rate = 1.0
        self._dense = dense_model(schema, settings, self.device)
        self._dense.initialise(settings.seed)
        self._table = EmbeddingTable(
            schema.embedding_dim,
            init_std=settings.init_std,
            accumulator_start=settings.row_accumulator_start,
            seed=settings.seed,
            room=settings.initial_rows,
            device=self.device,
        )
        self._typical = Typical(schema, self.device)
        self._deferred = Deferred(settings.initial_rows, self.device)
        self._intercept = Intercept(self.device)
        self._adam = Adam(self._dense.parameters, self._dense.gradients, settings.dense_learning_rate)

    @property
    def rows(self) -> int:
        """Number of embedding rows."""
        return len(self._table)

    @torch.no_grad()
    def learn(
        self,
        batch: FeatureBatch,
        labels: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        corrects: npt.ArrayLike | None = None,
        impression_ms: npt.ArrayLike | None = None,
    ) -> Float32Array:
        """One update from B examples; returns their scores before the update, float32 (B,).

        labels         (B,): 0 to 1
        weights        (B,): importance of each example's loss, 0 or more; 1 when None
        corrects       (B,) bool: which labels take back an earlier, opposite label (`model.slopes`); None if none does
        impression_ms  (B,): event times, by which the negatives of rows are deferred (`model.deferred`); not deferred when None
        """
        target = self._checked("labels", labels, len(batch), 1.0)
        weight = None if weights is None else self._checked("weights", weights, len(batch), np.inf)
        if not len(batch):
            return np.empty(0, np.float32)
        elements = to_elements(batch, self.schema, self.device)
        typical = self._typical
        rows = self._table.insert(elements.keys, elements.fields(), typical.embedding, typical.first_order)
        gathered = self._table.gather(rows)
        embedding, first_order = gathered.embedding, gathered.first_order
        forward = self._dense.forward(*embed(elements, gathered.inverse, embedding, first_order))
        scores = torch.sigmoid(forward.logits)  # on the stream as sampled
        answers = scores if self.negative_rate == 1 else probabilities(forward.logits, self.negative_rate)
        corrections = None if corrects is None else torch.from_numpy(np.asarray(corrects, np.bool_)).to(self.device)
        slope = slopes(scores, target, corrections, self.negative_rate)
        if weight is not None:
            slope.mul_(weight)
        deferred = self._deferred if impression_ms is not None and self.settings.defer_negatives else None
        factors = charge = None
        if deferred is not None:
            times_ms = torch.from_numpy(np.array(impression_ms, np.float64)).to(self.device)
            mass = scores if weight is None else scores * weight
            owners = elements.owners()
            factors = deferred.factors(gathered.distinct, gathered.inverse, owners, mass, slope, target, corrections, times_ms)
            charge = deferred.bias_charge
        gradient = self._dense.backward(forward, slope)
        row_gradient, first_order_gradient = scatter_back(
            elements, gathered.inverse, len(gathered.distinct), gradient, slope, factors
        )
        self._require_finite(len(batch), forward.logits, self._dense.gradients, row_gradient, first_order_gradient)
        self._table.step(gathered, row_gradient, first_order_gradient, self.settings.row_learning_rate)
        self._adam.step()
        self._intercept.step(self._dense.bias, scores, slope, weight, corrections, charge)
        if deferred is not None:
            deferred.keep()
        typical.follow(elements, gathered.inverse, embedding, first_order, self.examples_seen)
        self.examples_seen += len(batch)
        return answers.cpu().numpy()

    @torch.no_grad()
    def predict(self, batch: FeatureBatch) -> Float32Array:
        """Scores float32 (B,), without any change of the learner. An unknown value reads the average row of its field."""
        elements = to_elements(batch, self.schema, self.device)
        rows = self._table.keys.lookup(elements.keys)
        gathered = self._table.gather(rows)
        indices = torch.where(rows == 0, len(gathered.distinct) + elements.fields(), gathered.inverse)
        embedding = torch.cat((gathered.embedding, self._typical.embedding))
        first_order = torch.cat((gathered.first_order, self._typical.first_order))
        forward = self._dense.forward(*embed(elements, indices, embedding, first_order))
        return probabilities(forward.logits, self.negative_rate).cpu().numpy()

    def serving_state(self) -> dict[str, torch.Tensor]:
        """What scoring needs, copied to the CPU: rows (`keys`, `embedding`, `first_order`), dense parameters, average rows."""
        return {**self._table.serving_state(), **self._dense.serving_state(), **self._typical.serving_state()}

    def trainer_state(self) -> dict[str, torch.Tensor]:
        """What further learning needs besides, copied to the CPU: states of the optimizers and of `Deferred`, examples seen."""
        return {
            **self._table.trainer_state(),
            **{f"adam.{name}": value.to("cpu", copy=True) for name, value in self._adam.state().items()},
            **{f"intercept.{name}": value for name, value in self._intercept.state().items()},
            **{f"deferred.{name}": value for name, value in self._deferred.state(len(self._table)).items()},
            "examples_seen": torch.tensor(self.examples_seen),
        }

    def restore(self, serving: dict[str, torch.Tensor], trainer: dict[str, torch.Tensor]) -> None:
        """Continues from a snapshot. Raises SnapshotMismatch if it is of another model or schema."""
        seen = take(trainer, "examples_seen", (), torch.int64)
        step = trainer.get("adam.step")
        if step is not None and step.dtype == torch.float32:  # snapshots of Headrace 0.1.0
            trainer = {**trainer, "adam.step": step.long()}
        moments = {
            name: take(trainer, f"adam.{name}", tuple(value.shape), value.dtype) for name, value in self._adam.state().items()
        }
        self._dense.restore(serving)
        self._typical.restore(serving)
        self._table.restore(serving, trainer)
        self._deferred.restore(_part(trainer, "deferred."), len(self._table))
        self._intercept.restore(_part(trainer, "intercept."))
        self._adam.restore(moments)
        self.examples_seen = int(seen)

    def _checked(self, name: str, values: npt.ArrayLike, rows: int, most: float) -> torch.Tensor:
        array = np.asarray(values, dtype=np.float32)
        if array.shape != (rows,):
            raise ModelError(f"{name}: expected one for each of the batch's {rows} rows, found shape {array.shape}")
        wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0) & (array <= most)))
        if len(wrong):
            wanted = "a number from 0 to 1" if most == 1 else "a finite number, 0 or more"
            raise ModelError(f"{name}: expected {wanted}, found {array[wrong[0]]} in row {wrong[0]}")
        return torch.from_numpy(np.require(array, np.float32, ("C", "W"))).to(self.device)

    def _require_finite(self, batch: int, *tensors: torch.Tensor) -> None:
        norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
        if not (norms < _LARGEST_NORM).all():  # also true for NaN
            names = ("logits", "dense gradient", "rows' gradient", "first-order gradient")
            found = ", ".join(f"{name} {norm:g}" for name, norm in zip(names, norms.tolist(), strict=True))
            if torch.isfinite(self._dense.parameters).all():
                raise UpdateNotFinite(
                    f"update of {batch} examples: expected norms below {_LARGEST_NORM:g}, found {found}; nothing was written"
                )
            raise ModelError(
                f"the model's weights aren't finite after {self.examples_seen} examples (norms: {found}); nothing was written. "
                "Go back to an earlier version and lower model.row_learning_rate or model.dense_learning_rate"
            )


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
