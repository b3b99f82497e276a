"""What counted examples were counted with, so that a correction of a label takes back exactly that."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.gate_blocks import FloatArray

__all__ = ["SLOTS", "Remembered", "logits_of"]

# Slots for counted examples; 32 bytes each, 4.2 MB together.
SLOTS = 1 << 17
# A float32 can't represent a score nearer to 1 than this.
_CLIP = 1e-7


class Remembered:
    """Four values of each of the examples that were counted last, by the hash of the id. Its size is fixed."""

    def __init__(self) -> None:
        self._keys = np.zeros(SLOTS, np.uint64)
        self._values = np.zeros((SLOTS, 4), np.float32)
        self._known = np.zeros(SLOTS, np.bool_)

    def put(self, keys: npt.NDArray[np.uint64], values: FloatArray) -> None:
        """Remember the values (N, 4) of keys (N,). They may take the place of older ones."""
        at = (keys % np.uint64(SLOTS)).astype(np.intp)
        self._keys[at], self._values[at], self._known[at] = keys, values, True

    def take(self, keys: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.bool_], FloatArray]:
        """Whether each key is in the table (N,), and its values (N, 4)."""
        at = (keys % np.uint64(SLOTS)).astype(np.intp)
        return self._known[at] & (self._keys[at] == keys), self._values[at].astype(np.float64)


def logits_of(scores: npt.NDArray[np.float32]) -> FloatArray:
    """Logits of scores (N,); of 0 and 1 those of the nearest score that can be told from them."""
    clipped = np.clip(scores.astype(np.float64), _CLIP, 1 - _CLIP)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))
