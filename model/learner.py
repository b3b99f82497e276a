"""The learner: incremental updates of the model, one batch at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from model.batch import FeatureBatch, Float32Array
from model.distinct import group
from model.errors import ModelError, UpdateNotFinite
from model.history import history_inputs
from model.learner_state import LearnerState
from model.network import HISTORY_NUMBERS, RowGradients, embed, scatter_back, to_elements
from model.sampling import probabilities
from model.slopes import slopes
from model.slots import ABSENT_ROW

__all__ = ["Learner"]


# Norms that are not below this are rejected. Optimizers sum squares of gradients in float32, whose largest number is 3e38, so
# they stay finite for a million gradients of this norm. The largest weight and the smallest sampling rate that the trainer
# accepts give gradients far below it (`stream.trainer.examples`).
_LARGEST_NORM = 1e16
_LARGEST_FLOAT = float(np.finfo(np.float32).max)


class Learner(LearnerState):
    """Learns click probabilities from labelled batches; each batch is scored before it is learned.

        learner = Learner(schema, settings)
        scores = learner.learn(batch, labels)   # as the model was before it learned these labels
        delta = learner.take_delta()            # what changed since the last one
        frozen = learner.freeze()               # the whole model, for a version that is written in another thread
        learner.evict(keys)                     # forgets rows; the next delta names their keys
        learner.table                           # how many rows there are, by field

    Updates:

    - embedding rows and first-order weights, by Adagrad, or the latter by FTRL-Proximal (`model.row_optimizers`), with the
      gradient of the loss summed over the batch; only rows of the batch change;
    - the dense parameters, by Adam with the gradient of the mean loss;
    - the bias, by Newton's method (`model.intercept`);
    - with `model.row_history`, the counts of the batch's rows (`model.history`).

    Which values get rows, and which rows are evicted after a batch, is decided by the settings `table` (`model.upkeep`). A
    value without a row reads the average row of its field, which its label doesn't change.

    On the CPU it is deterministic: a restored learner continues bit for bit as if it had never stopped. It draws no random
    numbers after the start: a new row depends on its key, the seed and the average row of its field (`model.typical`).

    `negative_rate` is the share of negatives that the stream keeps. Scores that the learner returns are probabilities on the
    whole stream, corrected by this rate (`model.sampling`).

    Use it from one thread; only what `freeze` returns is for another. It raises ModelError for labels, weights or batches that
    it can't use, before anything changes. It raises UpdateNotFinite for a batch whose update wouldn't be finite, before any
    weight or optimizer state changes; features that are new in such a batch keep their new rows.
    """

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
        self._require_restored()
        target = self._checked("labels", labels, len(batch), 1.0)
        weight = None if weights is None else self._checked("weights", weights, len(batch), _LARGEST_FLOAT)
        if not len(batch):
            return np.empty(0, np.float32)
        elements = to_elements(batch, self.schema, self.device)
        back = np.asarray(False if corrects is None else corrects, np.bool_)
        corrections = torch.from_numpy(back).to(self.device) if back.any() else None
        typical = self._typical
        self._upkeep.follow(impression_ms)
        read = self._upkeep.read(elements, typical, corrections)
        gathered = read.gathered
        times_ms = None if impression_ms is None else torch.from_numpy(np.array(impression_ms, np.float64)).to(self.device)
        history, extra = self._history, None
        if history is not None:
            extra = history.read(elements, gathered, target, weight, corrections, self.negative_rate, times_ms, read.own)
        embedded, linear = embed(elements, read.which, read.embedding, read.first_order)
        forward = self._dense.forward(embedded, linear, extra)
        scores = torch.sigmoid(forward.logits)  # on the stream as sampled
        answers = scores if self.negative_rate == 1 else probabilities(forward.logits, self.negative_rate)
        slope = slopes(scores, target, corrections, self.negative_rate)
        if weight is not None:
            slope.mul_(weight)
        deferred = self._deferred if self.settings.defer_negatives else None
        factors = charge = None
        if deferred is not None and times_ms is not None:
            mass = scores if weight is None else scores * weight
            owners = read.of_own(elements.owners())
            factors = deferred.factors(gathered.distinct, gathered.inverse, owners, mass, slope, target, corrections, times_ms)
            charge = deferred.bias_charge
        gradient = self._dense.backward(forward, slope)
        first_order_slope = slope if self._dense.reads_first_order else None
        gradients = scatter_back(elements, gathered.groups, read.own, gradient, first_order_slope, factors)
        self._require_finite(len(batch), forward.logits, gradients)
        self._rows.touch(gathered.distinct)
        self._table.step(gathered, gradients.embedding, gradients.first_order)
        if history is not None:
            history.keep()
        self._adam.step()
        self._intercept.step(self._dense.bias, scores, slope, weight, corrections, charge)
        if deferred is not None and times_ms is not None:
            deferred.keep()
        typical.follow(elements, embedded, read.which, read.first_order, self.examples_seen)
        self.examples_seen += len(batch)
        due = self._upkeep.learned(elements, read)
        if due is not None:
            self.evict(due)
        return answers.cpu().numpy()

    @torch.no_grad()
    def predict(self, batch: FeatureBatch) -> Float32Array:
        """Scores float32 (B,), without any change of the learner. An unknown value reads the average row of its field."""
        elements = to_elements(batch, self.schema, self.device)
        rows = self._table.keys.lookup(elements.keys)
        gathered = self._table.gather(group(rows))
        indices = torch.where(rows == 0, len(gathered.distinct) + elements.fields(), gathered.inverse)
        embedding = torch.cat((gathered.embedding, self._typical.embedding))
        first_order = torch.cat((gathered.first_order, self._typical.first_order))
        extra = None
        if self._history is not None and gathered.history is not None:
            counts = torch.cat((gathered.history, gathered.history.new_zeros(len(self.schema.fields), 2)))
            extra = history_inputs(elements, counts.index_select(0, indices), self._history.base)
        forward = self._dense.forward(*embed(elements, indices, embedding, first_order), extra)
        return probabilities(forward.logits, self.negative_rate).cpu().numpy()

    @torch.no_grad()
    def lifts(self, batch: FeatureBatch) -> Float32Array:
        """What the rows' history says of each field now (`model.history`): float32 (B, F), single-valued fields before lists.

        Raises:
            ModelError: the model has no row history.
        """
        if self._history is None:
            raise ModelError("lifts: expected a model with model.row_history, found one without; switch it on")
        elements = to_elements(batch, self.schema, self.device)
        rows = self._table.keys.lookup(elements.keys)
        counts = self._rows["history"].index_select(0, rows).mul_((rows != ABSENT_ROW).unsqueeze(1))
        inputs = history_inputs(elements, counts, self._history.base)
        return inputs.view(len(batch), -1, HISTORY_NUMBERS)[:, :, 0].cpu().numpy()

    def _checked(self, name: str, values: npt.ArrayLike, rows: int, most: float) -> torch.Tensor:
        array = np.asarray(values, dtype=np.float32)
        if array.shape != (rows,):
            raise ModelError(f"{name}: expected one for each of the batch's {rows} rows, found shape {array.shape}")
        right = (array >= 0) & (array <= most)  # neither is true for NaN
        if not right.all():
            wanted = "a number from 0 to 1" if most == 1 else "a finite number, 0 or more"
            row = int(right.argmin())
            raise ModelError(f"{name}: expected {wanted}, found {array[row]} in row {row}")
        return torch.from_numpy(np.require(array, np.float32, ("C", "W"))).to(self.device)

    def _require_finite(self, batch: int, logits: torch.Tensor, rows: RowGradients) -> None:
        named = {
            "logits": logits,
            "dense gradient": self._dense.gradients,
            "rows' gradient": rows.embedding,
            "first-order gradient": rows.first_order,
        }
        tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
        norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors.values()]).tolist()
        if not all(norm < _LARGEST_NORM for norm in norms):  # also true for NaN
            found = ", ".join(f"{name} {norm:g}" for name, norm in zip(tensors, norms, strict=True))
            if torch.isfinite(self._dense.parameters).all():
                raise UpdateNotFinite(
                    f"update of {batch} examples: expected norms below {_LARGEST_NORM:g}, found {found}; nothing was written"
                )
            raise ModelError(
                f"the model's weights aren't finite after {self.examples_seen} examples (norms: {found}); nothing was written. "
                "Go back to an earlier version and lower model.row_learning_rate or model.dense_learning_rate"
            )
