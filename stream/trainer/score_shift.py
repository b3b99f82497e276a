"""How far the scores of recent requests have shifted since they were last served: a check of each delta.

Blocks of clicks find out that weights have become worse, once there are enough clicks, and only if the labels are right. If the
labels themselves are wrong (a feed that flips them, say), the live weights follow them and look better than the anchor. What
shows then is how fast they move: some hundred examples later the same requests get other scores.

So some requests are held, with their logits by the weights that scorers had when they were taken up. Before a delta leaves, the
live weights score the same requests again. The shift is the mean absolute difference of the logits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from model.batch import FeatureBatch, Float32Array
from model.errors import ModelError
from model.schema import FeatureSchema
from stream.trainer.bookkeeping import State, from_json, to_json
from stream.trainer.columns import ExampleColumns
from stream.trainer.logits import logits

__all__ = ["HELD", "ScoreShift", "Scores"]

# Requests in a set; one of each batch, so that they are of the last 64 batches. Two sets are scored before each delta. That
# takes 2 ms (39 fields, MLP 400-400-400). The mean of 64 differences is within an eighth of their standard deviation.
HELD = 64
# Examples after which a set gives way to a new one, so that the older of the two sets is up to twice as old. It is counted in
# examples, since what a model learns doesn't depend on how fast they come. Flipped labels at a click rate of 3 % move DeepFM by
# 0.2 within 400 examples. A click rate that doubles moves it by less than that within 2,000, as a healthy model's noise does.
RENEWED_EXAMPLES = 1_000


# Part of a delta's shift in the usual one.
USUAL_PART = 0.01


class Scores(Protocol):
    """What the check needs of a `model.learner.Learner`."""

    @property
    def examples_seen(self) -> int: ...

    def predict(self, batch: FeatureBatch) -> Float32Array: ...


@dataclass(frozen=True, slots=True)
class _Set:
    """Requests with their logits (64,) by a model that had learned `examples` examples."""

    batch: FeatureBatch
    logits: npt.NDArray[np.float64]
    examples: int


class ScoreShift:
    """Holds requests and scores them again. For the training thread; as a part of the bookkeeping it is saved with versions.

    shift = ScoreShift(learner, schema)
    shift.observe(batch)            # all batches
    found = shift.measure()         # before a delta leaves; None while nothing is held
    shift.served(watermark_ms)      # after it has left
    shift.forget()                  # when the live weights are served whatever the shift is

    Args:
        schema: of the requests. Saved ones of another schema are not restored; None: the caller never has any.
    """

    def __init__(self, learner: Scores, schema: FeatureSchema | None = None) -> None:
        self._learner, self._schema = learner, schema
        self._recent: deque[FeatureBatch] = deque(maxlen=HELD)
        self._sets: list[_Set] = []  # the older one first
        self.last: float | None = None
        """What `measure` found last."""
        self.usual = 0.0
        """What it finds usually: the mean over the last hundred deltas or so that left."""

    def observe(self, batch: ExampleColumns, scores: Float32Array) -> None:
        """Take up one request of a batch, by the hash of its id."""
        if len(batch):
            self._recent.append(batch.batch.take([int(batch.id_hashes.argmin())]))

    def measure(self, low: float = 0.0, high: float = 0.0) -> float | None:
        """The shift since the older set and since the newer one, whichever is larger; None while nothing is held.

        Args:
            low, high: logits by which clicks explain that all scores move. As much of the mean change as lies between them is
                taken out.
        """
        self.last = None
        if self._sets:
            now = logits(self._learner.predict(FeatureBatch.concat([each.batch for each in self._sets])))
            changes = (now - np.concatenate([each.logits for each in self._sets])).reshape(len(self._sets), HELD)
            found = float(np.abs(changes - np.clip(changes.mean(1, keepdims=True), low, high)).mean(1).max())
            self.last = found if np.isfinite(found) else float("inf")
        return self.last

    def served(self) -> None:
        """The live weights are served now: hold new requests if it is time."""
        if self.last is not None and np.isfinite(self.last):
            self.usual += USUAL_PART * (self.last - self.usual)
        seen = self._learner.examples_seen
        if len(self._recent) < HELD or (self._sets and seen - self._sets[-1].examples < RENEWED_EXAMPLES):
            return
        batch = FeatureBatch.concat(list(self._recent))
        self._sets = [*self._sets[-1:], _Set(batch, logits(self._learner.predict(batch)), seen)]

    def forget(self) -> None:
        """Hold nothing, so that the next delta isn't checked. What was served last is too old to be compared with."""
        self._sets = []

    def state(self) -> State:
        """The sets that are held, the schema of their features, and the usual shift."""
        found: dict[str, torch.Tensor] = {"usual": to_json(self.usual)}
        if self._schema is not None:
            found["schema"] = to_json(self._schema.fingerprint())
        for number, each in enumerate(self._sets):
            at = {"examples": each.examples, "lists": each.batch.lists}
            found[f"{number}.at"] = to_json(at)
            batch = each.batch
            arrays: dict[str, npt.NDArray[Any]] = {"keys": batch.keys, "list_keys": batch.list_keys}
            arrays |= {"list_offsets": batch.list_offsets, "logits": each.logits}
            if batch.scales is not None:
                arrays["scales"] = batch.scales
            for name, array in arrays.items():
                found[f"{number}.{name}"] = torch.from_numpy(np.array(array))
        return found

    def restore(self, state: State) -> None:
        """Go on from what `state` gave. Raises ModelError for an unknown layout, or features of another schema."""
        sets, schema = [], self._schema
        if schema is not None and "schema" in state and from_json(state["schema"], str) != schema.fingerprint():
            raise ModelError("saved requests: expected features of this schema, found others")
        for number in range(2):
            own = {name.removeprefix(f"{number}."): each for name, each in state.items() if name.startswith(f"{number}.")}
            if own:
                sets.append(_restored(own))
                batch = sets[-1].batch
                # Older releases saved no schema.
                if schema and (batch.keys.shape[1], batch.lists) != (len(schema.singles), len(schema.lists)):
                    raise ModelError("saved requests: expected features of this schema, found others")
        self.usual = from_json(state.get("usual"), float)
        self._sets = sets


def _restored(own: State) -> _Set:
    at = from_json(own.get("at"), dict[str, int])
    try:
        batch = FeatureBatch(
            keys=own["keys"].numpy(),
            list_keys=own["list_keys"].numpy(),
            list_offsets=own["list_offsets"].numpy(),
            lists=at["lists"],
            scales=own["scales"].numpy() if "scales" in own else None,
        )
        held = _Set(batch, own["logits"].numpy(), at["examples"])
    except KeyError as error:
        raise ModelError(f"saved requests: expected a tensor or number {error}, found none") from error
    if len(held.batch) != HELD or held.logits.shape != (HELD,):
        raise ModelError(f"saved requests: expected {HELD} of them with a logit each, found {len(held.batch)}")
    return held
